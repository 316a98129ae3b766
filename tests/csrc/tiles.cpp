// The software tiles of emulator/tiles.h: products against loops, and what ends the program. Arguments: what to do.
#include <cmath>
#include <random>
#include <string_view>
#include <vector>

using namespace fastseq::emulated;

namespace {

struct Configuration {
  alignas(64) uint8_t bytes[64]{};
  void of(int tile, int rows, uint16_t row) { std::memcpy(bytes + 16 + 2 * tile, &row, sizeof(row)), bytes[48 + tile] = rows; }
};

Configuration whole() {
  Configuration found;
  found.bytes[0] = 1;
  for (int i = 0; i < kTiles; ++i) found.of(i, 16, 64);
  return found;
}

uint16_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits >> 16;
}
float value_of(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

// c += a b of `rows` rows, `pairs` pairs of depths and `columns` columns, twice; what the tiles leave alone stays
bool multiplies(int rows, int pairs, int columns) {
  std::mt19937 random(rows * 1000 + pairs * 20 + columns);
  std::normal_distribution<float> normal;
  Configuration wanted;
  wanted.bytes[0] = 1;
  wanted.of(0, rows, 4 * columns), wanted.of(1, rows, 4 * pairs), wanted.of(2, pairs, 4 * columns);
  constexpr int kStride = 20;
  std::vector<float> c(rows * kStride, 7);
  std::vector<uint16_t> a(rows * 2 * kStride), b(pairs * 2 * kStride);
  for (auto* values : {&a, &b})
    for (uint16_t& x : *values) x = bits_of(normal(random));
  if (pairs > 1) a[0] = 1;  // a subnormal number, which is zero
  tiles_configure(wanted.bytes);
  tile_zero<0>();
  tile_load<1>(a.data(), 4 * kStride), tile_stream<2>(b.data(), 4 * kStride);
  tile_multiply<0, 1, 2>(), tile_multiply<0, 1, 2>();
  tile_store<0>(c.data(), 4 * kStride);
  tiles_release();
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < kStride; ++n) {
      double sum = 0, size = 0;
      for (int k = 0; k < pairs; ++k)
        for (int i = 0; i < 2; ++i) {
          const double left = m + k + i == 0 && pairs > 1 ? 0 : value_of(a[m * 2 * kStride + 2 * k + i]);
          const double term = 2 * left * value_of(b[k * 2 * kStride + 2 * n + i]);
          sum += term, size += std::fabs(term);
        }
      if (n < columns ? !(std::fabs(c[m * kStride + n] - sum) <= 40 * size / (1 << 24)) : c[m * kStride + n] != 7) return false;
    }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const std::string_view what = arguments[1];
  if (what == "products") {
    for (int rows : {1, 5, 16})
      for (int pairs : {1, 7, 16})
        for (int columns : {1, 9, 16})
          if (!multiplies(rows, pairs, columns)) return std::printf("wrong result: %d rows, %d pairs, %d columns\n", rows, pairs, columns), 1;
    return 0;
  }
  Configuration wanted = whole();
  if (what == "a tile that the configuration leaves out") wanted.of(3, 0, 0);
  if (what == "a product of tiles that do not fit") wanted.of(3, 5, 64);
  if (what == "a tile of more than 16 rows of 64 bytes") wanted.of(3, 17, 64);
  if (what == "a palette other than 1, or a row to start from") wanted.bytes[1] = 3;
  tiles_configure(wanted.bytes);
  if (what == "a configuration within another") tiles_configure(wanted.bytes);
  if (what == "a tile without a configuration") tiles_release();
  if (what == "a product with one tile twice") tile_multiply<0, 1, 1>();
  tile_zero<3>();
  tile_multiply<0, 3, 1>();
}
