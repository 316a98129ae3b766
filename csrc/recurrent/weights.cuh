// Recurrent weights that stay in registers and shared memory for a whole launch.
#pragma once

#include "../common/prims.cuh"
#include "layout.h"
#include "params.h"
#include "tiles.cuh"

namespace fastseq::recurrent {

// Of one tile of rows; products of a tile depend on each other, and several sums at a time hide that.
template <class Tile, int kNTiles>
class Sums {
 public:
  FASTSEQ_DEVICE float (&at(int n, int tile))[Tile::kSums] { return sums_[n % kChains][tile]; }

  // of a tile of columns, which begins anew
  FASTSEQ_DEVICE void take(float (&total)[Tile::kSums], int tile) {
    FASTSEQ_UNROLL
    for (int i = 0; i < Tile::kSums; ++i) {
      total[i] = sums_[0][tile][i];
      FASTSEQ_UNROLL
      for (int chain = 1; chain < kChains; ++chain) total[i] += sums_[chain][tile][i];
      FASTSEQ_UNROLL
      for (int chain = 0; chain < kChains; ++chain) sums_[chain][tile][i] = 0;
    }
  }

 private:
  static constexpr int kChains = Tile::kSums == 4 && kNTiles < 4 ? 4 / kNTiles : 1;

  float sums_[kChains][kNTiles][Tile::kSums] = {};
};

// Adds up partial sums, `stride` numbers apart, of places that lie `step` apart.
template <int kPlaces>
FASTSEQ_DEVICE void add_up(float (&total)[kPlaces], const float* at, int step, int parts, int stride) {
  FASTSEQ_UNROLL
  for (int i = 0; i < kPlaces; ++i) total[i] = at[i * step];
  FASTSEQ_ROLLED
  for (int part = 1; part < parts; ++part) {
    at += stride;
    FASTSEQ_UNROLL
    for (int i = 0; i < kPlaces; ++i) total[i] += at[i * step];
  }
}

// A CTA's rows of the product, in tiles of 16 rows, dealt to its warps: 2^m_bits share the rows, k_warps the depth of each segment. A
// warp has its tiles row by row, the first Tile::kResident of them in registers.
template <class Tile>
class Weights {
 public:
  using Number = typename Tile::Number;

  FASTSEQ_DEVICE Weights(const Split& split, int row_tiles, gpu::Smem& smem)
      : split_(split), row_tiles_(row_tiles),
        shared_(smem.take<gpu::Vec16>(tiles_beyond(most_tiles(split, row_tiles), Tile::kResident) * kThreads)) {}

  FASTSEQ_DEVICE int m_warp() const { return gpu::warp() & (split_.m_warps() - 1); }
  FASTSEQ_DEVICE int k_warp() const { return gpu::warp() >> split_.m_bits; }
  // Whether this warp has a part of the product, be it of no depth.
  FASTSEQ_DEVICE bool works() const { return k_warp() < split_.k_warps && m_warp() < row_tiles_; }
  // of this warp: tiles m_warp(), m_warp() + 2^m_bits, ... of the rows
  FASTSEQ_DEVICE int rows() const { return (row_tiles_ - m_warp() + split_.m_warps() - 1) >> split_.m_bits; }
  FASTSEQ_DEVICE int tiles() const { return works() ? rows() * split_.k_segments * split_.k_tiles : 0; }

  // Takes them: at(row, depth), zero outside the matrix.
  template <class At>
  FASTSEQ_DEVICE void load(const At& at) {
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kResident; block += kLoaded) {
      FASTSEQ_ROLLED
      for (int i = 0; i < kLoaded && block + i < tiles(); ++i) {
        uint32_t a[4];
        load_tile(a, at, block + i);
        FASTSEQ_UNROLL
        for (int r = 0; r < 4 * kLoaded; ++r) resident_[block + r / 4][r % 4] = r / 4 == i ? a[r % 4] : resident_[block + r / 4][r % 4];
      }
    }
    FASTSEQ_ROLLED
    for (int i = Tile::kResident; i < tiles(); ++i) {
      uint32_t a[4];
      load_tile(a, at, i);
      shared_[(i - Tile::kResident) * kThreads + gpu::tid()] = {{a[0], a[1], a[2], a[3]}};
    }
  }

  // Adds to the sums the products of this warp's tiles with a segment of the operand, [depth][columns] in shared memory. After each
  // tile of rows but the last, calls done(row), which takes the sums. Returns the last row.
  template <int kNTiles, class Done>
  FASTSEQ_DEVICE int multiply(Sums<Tile, kNTiles>& sums, const Number* operand, int segment, const Done& done) const {
    constexpr int kColumns = kNTiles * kTileColumns, kStride = Tile::kDepth * kColumns;
    constexpr int kBlock = kNTiles > 1 ? Tile::kWideBlock : Tile::kBlock;
    static_assert(Tile::kResident % kBlock == 0);
    if (!works()) return 0;
    const int k_tiles = split_.k_tiles, first = segment * k_tiles, last = split_.k_segments > 1 ? first + k_tiles : tiles();
    operand += Tile::Operand::offset(kColumns) + (k_warp() * k_tiles - first) * kStride;  // where tile 0 of the warp would be
    int row = m_warp(), end = rows() > 1 ? k_tiles : last;
    const auto block = [&](int i, const uint32_t (*a)[4]) {
      FASTSEQ_UNROLL
      for (int n = 0; n < kBlock; n += 2) {
        FASTSEQ_UNROLL
        for (int tile = 0; tile < kNTiles; ++tile) {
          const typename Tile::Operand two(operand + (i + n) * kStride + tile * kTileColumns * Tile::kVector, kColumns);
          Tile::multiply(sums.at(n, tile), a[n], two, 0);
          Tile::multiply(sums.at(n + 1, tile), a[n + 1], two, 1);
        }
      }
      if (i + kBlock != end || end == last) return;
      done(row);
      operand -= k_tiles * kStride;
      row += split_.m_warps(), end += k_tiles;
    };
    FASTSEQ_UNROLL
    for (int i = 0; i < Tile::kResident; i += kBlock) {
      if (i >= first && i < last) block(i, resident_ + i);
    }
    FASTSEQ_ROLLED
    for (int i = first > Tile::kResident ? first : Tile::kResident; i < last; i += kBlock) {
      uint32_t a[kBlock][4];
      FASTSEQ_UNROLL
      for (int n = 0; n < kBlock; ++n) {
        const gpu::Vec16 v = shared_[(i + n - Tile::kResident) * kThreads + gpu::tid()];
        a[n][0] = v.word[0], a[n][1] = v.word[1], a[n][2] = v.word[2], a[n][3] = v.word[3];
      }
      block(i, a);
    }
    return row;
  }

 private:
  static constexpr int kLoaded = 8;  // tiles that one copy of the loading code serves
  static_assert(Tile::kResident % kLoaded == 0);

  template <class At>
  FASTSEQ_DEVICE void load_tile(uint32_t (&a)[4], const At& at, int i) const {
    const int each = split_.k_tiles * split_.k_segments, row = m_warp() + (i / each << split_.m_bits);
    const int segment = i % each / split_.k_tiles, depth = (segment * split_.k_warps + k_warp()) * split_.k_tiles + i % split_.k_tiles;
    Tile::load(a, [&](int r, int d) { return at(row * kTileRows + r, depth * Tile::kDepth + d); });
  }

  const Split& split_;
  const int row_tiles_;
  uint32_t resident_[Tile::kResident][4];
  gpu::Vec16* shared_;  // [tiles beyond the registers][kThreads]
};

}  // namespace fastseq::recurrent
