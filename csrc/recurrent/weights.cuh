// Recurrent weights that stay in registers and shared memory for a whole launch.
#pragma once

#include "../common/prims.cuh"
#include "layout.h"
#include "params.h"
#include "tiles.cuh"

namespace fastseq::recurrent {

// A CTA's rows of the product, in tiles of 16 rows, dealt to its warps: m_warps share the rows, k_warps the depth. A warp has its
// tiles row by row, the first Tile::kResident of them in registers.
template <class Tile>
class Weights {
 public:
  FASTSEQ_DEVICE Weights(const Split& split, int row_tiles, gpu::Smem& smem)
      : split_(split), row_tiles_(row_tiles),
        shared_(smem.take<gpu::Vec16>(tiles_beyond(most_tiles(split, row_tiles), Tile::kResident) * kThreads)) {}

  FASTSEQ_DEVICE int m_warp() const { return gpu::warp() % split_.m_warps; }
  FASTSEQ_DEVICE int k_warp() const { return gpu::warp() / split_.m_warps; }
  // Whether this warp has a part of the product, be it of no depth.
  FASTSEQ_DEVICE bool works() const { return k_warp() < split_.k_warps && m_warp() < row_tiles_; }
  // of this warp: tiles m_warp(), m_warp() + m_warps, ... of the rows
  FASTSEQ_DEVICE int rows() const { return (row_tiles_ - m_warp() + split_.m_warps - 1) / split_.m_warps; }
  // of this warp in each of its rows: tiles k_warp(), k_warp() + k_warps, ... of the depth
  FASTSEQ_DEVICE int depths() const { return (split_.k_tiles - k_warp() + split_.k_warps - 1) / split_.k_warps; }
  FASTSEQ_DEVICE int tiles() const { return works() ? rows() * depths() : 0; }

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

  // Calls multiply(n, tile, depth) for this warp's tiles from `first` to before `last`: the n-th of them, its depth counted from the
  // first one's in its row. After the last tile of each row but the last, calls done(row). Returns the last row.
  template <class Multiply, class Done>
  FASTSEQ_DEVICE int each(int first, int last, const Multiply& multiply, const Done& done) const {
    const int depths = this->depths();
    int row = m_warp(), begin = first, end = rows() > 1 ? depths : last;
    const auto at_end = [&](int next) {
      if (next != end || next >= last) return;
      done(row);
      row += split_.m_warps, begin = end, end += depths;
    };
    FASTSEQ_UNROLL
    for (int i = 0; i < Tile::kResident; ++i) {
      if (i >= first && i < last) multiply(i, resident_[i], i - begin);
      if (i % 2) at_end(i + 1);  // rows have an even number of tiles
    }
    for (int i = first > Tile::kResident ? first : Tile::kResident; i < last; ++i) {
      const gpu::Vec16 v = shared_[(i - Tile::kResident) * kThreads + gpu::tid()];
      const uint32_t a[4] = {v.word[0], v.word[1], v.word[2], v.word[3]};
      multiply(0, a, i - begin);
      at_end(i + 1);
    }
    return row;
  }

 private:
  static constexpr int kLoaded = 8;  // tiles that one copy of the loading code serves
  static_assert(Tile::kResident % kLoaded == 0);

  template <class At>
  FASTSEQ_DEVICE void load_tile(uint32_t (&a)[4], const At& at, int i) const {
    const int row = m_warp() + i / depths() * split_.m_warps, depth = k_warp() + i % depths() * split_.k_warps;
    Tile::load(a, [&](int r, int d) { return at(row * kTileRows + r, depth * Tile::kDepth + d); });
  }

  const Split& split_;
  const int row_tiles_;
  uint32_t resident_[Tile::kResident][4];
  gpu::Vec16* shared_;  // [tiles beyond the registers][kThreads]
};

// Of one tile of rows; products of a tile depend on each other, and several sums at a time hide that.
template <class Tile, int kTiles>
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
  static constexpr int kChains = Tile::kSums == 4 && kTiles < 4 ? 4 / kTiles : 1;

  float sums_[kChains][kTiles][Tile::kSums] = {};
};

}  // namespace fastseq::recurrent
