// Fragments of mma and ldmatrix on the host, against what CuTe says of these instructions: an independent source, compiled on the
// host.

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include "harness.h"

using namespace fastseq::gpu;
using harness::Array;

namespace {

struct Registers {
  float d[4];
  uint32_t a[4], b[2];
};

struct Params {
  Registers* registers;  // [32]
  const uint32_t* rows;  // [16][4]
  uint32_t* loaded;      // [32][2]
};

template <class T>
FASTSEQ_KERNEL(32)
multiply(FASTSEQ_PARAMETERS Params p) {
  Registers& own = p.registers[lane()];
  if constexpr (sizeof(T) == 2) {
    mma_16816(own.d, own.a, own.b, T{});
  } else {
    mma_1688_tf32(own.d, own.a, own.b);
  }
}

FASTSEQ_DEVICE void load_rows(uint32_t (&r)[2], const void* row) { ldmatrix_x2(r, row); }
FASTSEQ_DEVICE void load_rows(uint32_t (&r)[4], const void* row) { ldmatrix_x4(r, row); }

template <int kMatrices>
FASTSEQ_KERNEL(32) load(FASTSEQ_PARAMETERS Params p) {
  Smem smem;
  auto* rows = smem.take<uint32_t>(32 * kMatrices);
  for (int i = tid(); i < 32 * kMatrices; i += 32) rows[i] = p.rows[i];
  cta_sync();
  uint32_t r[kMatrices];
  load_rows(r, rows + lane() % (8 * kMatrices) * 4);
  for (int i = 0; i < kMatrices; ++i) p.loaded[kMatrices * lane() + i] = r[i];
}

template <class T>
void put(uint32_t* registers, int value, float x) {
  if constexpr (sizeof(T) == 2) {
    reinterpret_cast<T*>(registers)[value] = from_float<T>(x);
  } else {
    registers[value] = to_tf32(x);
  }
}

// Lanes and values get the elements that CuTe's layouts give them; the product of small whole numbers is exact.
template <class T, class Traits>
void check_product() {
  using namespace cute;
  constexpr int kM = size<0>(typename Traits::Shape_MNK{}), kN = size<1>(typename Traits::Shape_MNK{});
  constexpr int kK = size<2>(typename Traits::Shape_MNK{});
  float a[kM][kK], b[kN][kK], d[kM][kN];
  for (int m = 0; m < kM; ++m) {
    for (int k = 0; k < kK; ++k) a[m][k] = static_cast<float>((m * 37 + k * 11) % 17 - 8);
  }
  for (int n = 0; n < kN; ++n) {
    for (int k = 0; k < kK; ++k) b[n][k] = static_cast<float>((n * 23 + k * 29) % 19 - 9);
  }
  Array<Registers> registers(32);
  const typename Traits::ALayout a_of;
  const typename Traits::BLayout b_of;
  const typename Traits::CLayout c_of;
  CHECK(size<1>(a_of) == 16 / static_cast<int>(sizeof(T)) && size<1>(b_of) * 2 == size<1>(a_of) && size<1>(c_of) == 4,
        "values of a lane");
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < size<1>(a_of); ++v) put<T>(registers[lane].a, v, a[a_of(lane, v) % kM][a_of(lane, v) / kM]);
    for (int v = 0; v < size<1>(b_of); ++v) put<T>(registers[lane].b, v, b[b_of(lane, v) % kN][b_of(lane, v) / kN]);
    for (int v = 0; v < 4; ++v) registers[lane].d[v] = static_cast<float>(c_of(lane, v));
  }
  harness::must_run(multiply<T>, {1, 32, 1, 0, false, nullptr}, Params{registers.data(), nullptr, nullptr});
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      d[m][n] = static_cast<float>(n * kM + m);
      for (int k = 0; k < kK; ++k) d[m][n] += a[m][k] * b[n][k];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int v = 0; v < 4; ++v) {
      const float expected = d[c_of(lane, v) % kM][c_of(lane, v) / kM];
      CHECK(registers[lane].d[v] == expected, "lane %d, %d: %g, not %g", lane, v, registers[lane].d[v], expected);
    }
  }
}

void half() { check_product<Half, cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>>(); }
void bfloat16() { check_product<Bfloat16, cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>>(); }
void tf32() { check_product<float, cute::MMA_Traits<cute::SM80_16x8x8_F32TF32TF32F32_TN>>(); }

template <int kMatrices, class Traits>
void ldmatrix() {
  Array<uint32_t> rows(32 * kMatrices), loaded(32 * kMatrices);
  for (int i = 0; i < rows.count(); ++i) rows[i] = 0x01010101u * i;
  harness::must_run(load<kMatrices>, {1, 32, 1, 128 * kMatrices, false, nullptr}, Params{nullptr, rows.data(), loaded.data()});
  const typename Traits::SrcLayout source_of;
  const typename Traits::DstLayout target_of;
  for (int lane = 0; lane < 8 * kMatrices; ++lane) CHECK(source_of(lane, 0) == lane * 128, "lane %d names row %d", lane, lane);
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < kMatrices; ++r) {
      const int bit = target_of(lane, 32 * r);
      CHECK(bit % 32 == 0 && loaded[kMatrices * lane + r] == rows[bit / 32], "lane %d, register %d", lane, r);
    }
  }
}

void ldmatrix_2() { ldmatrix<2, cute::Copy_Traits<cute::SM75_U32x2_LDSM_N>>(); }
void ldmatrix_4() { ldmatrix<4, cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>>(); }

const harness::Test tests[] = {
    {"half", half, false}, {"bfloat16", bfloat16, false}, {"tf32", tf32, false}, {"ldmatrix_2", ldmatrix_2, false}, {"ldmatrix_4", ldmatrix_4, false}};

}  // namespace

int main(int argc, char** argv) { return harness::main(tests, argc, argv); }
