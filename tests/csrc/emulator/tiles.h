// AMX's tiles in software, for processors without them: what csrc/cpu/tiles.inl says in instructions, as Intel's manual defines these
// ("Instruction Set Extensions Programming Reference", chapter 3). Given to the compiler with -include, before a source of level "amx".
//
// What the hardware would answer with an exception ends the program; so does what it permits and those kernels never mean to do: a
// configuration in the place of another, and tiles whose configuration ended.
#pragma once

#define FASTSEQ_EMULATED_TILES

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastseq::emulated {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

// sixteen columns of a row
using Floats [[gnu::vector_size(kBytes)]] = float;
using Words [[gnu::vector_size(kBytes)]] = uint32_t;

struct Tile {
  int rows = 0, bytes = 0;
  Words row[kRows];
};

struct State {
  bool configured = false;
  Tile tiles[kTiles];
};

inline thread_local State state;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline Tile& tile(int i) {
  if (!state.configured) fail("a tile without a configuration");
  if (!state.tiles[i].rows) fail("a tile that the configuration leaves out");
  return state.tiles[i];
}

inline void tiles_configure(const void* configuration) {
  const auto* bytes = static_cast<const uint8_t*>(configuration);
  if (state.configured) fail("a configuration within another");
  if (bytes[0] != 1 || bytes[1] != 0) fail("a palette other than 1, or a row to start from");
  state = {};
  state.configured = true;
  for (int i = 0; i < 16; ++i) {
    uint16_t of_row;
    std::memcpy(&of_row, bytes + 16 + 2 * i, sizeof(of_row));
    const int rows = bytes[48 + i];
    if (i >= kTiles ? rows || of_row : rows > kRows || of_row > kBytes || !rows != !of_row) fail("a tile of more than 16 rows of 64 bytes");
    if (i < kTiles) state.tiles[i].rows = rows, state.tiles[i].bytes = of_row;
  }
}

inline void tiles_release() { state.configured = false; }

template <int kTile>
void tile_zero() {
  std::memset(tile(kTile).row, 0, sizeof(Tile::row));
}

template <int kTile>
void tile_load(const void* from, int64_t stride) {
  tile_zero<kTile>();
  Tile& to = tile(kTile);
  for (int i = 0; i < to.rows; ++i) std::memcpy(&to.row[i], static_cast<const char*>(from) + i * stride, to.bytes);
}

template <int kTile>
void tile_stream(const void* from, int64_t stride) {
  tile_load<kTile>(from, stride);
}

template <int kTile>
void tile_store(void* to, int64_t stride) {
  const Tile& from = tile(kTile);
  for (int i = 0; i < from.rows; ++i) std::memcpy(static_cast<char*>(to) + i * stride, &from.row[i], from.bytes);
}

// Subnormal numbers are zero, before and after each operation.
inline Floats flushed(Floats v) { return (Floats)((Words)v & (Words)(((Words)v & 0x7f800000u) != 0)); }

// The sums of a pair's first and of its second products are apart until the end of a row.
template <int kC, int kA, int kB>
void tile_multiply() {
  Tile& c = tile(kC);
  const Tile &a = tile(kA), &b = tile(kB);
  if (kC == kA || kC == kB || kA == kB) fail("a product with one tile twice");
  if (c.rows != a.rows || a.bytes / 4 != b.rows || c.bytes != b.bytes || a.bytes % 4 || b.bytes % 4) fail("a product of tiles that do not fit");
  for (int m = 0; m < c.rows; ++m) {
    Floats first{}, second{};
    for (int k = 0; k < b.rows; ++k) {
      const Words pair = Words{} + a.row[m][k];
      first = flushed(flushed((Floats)(pair << 16)) * flushed((Floats)(b.row[k] << 16)) + first);
      second = flushed(flushed((Floats)(pair & 0xffff0000u)) * flushed((Floats)(b.row[k] & 0xffff0000u)) + second);
    }
    Floats sum = flushed((Floats)c.row[m] + flushed(first + second));
    std::memset(&c.row[m], 0, kBytes);
    std::memcpy(&c.row[m], &sum, c.bytes);
  }
}

}  // namespace fastseq::emulated
