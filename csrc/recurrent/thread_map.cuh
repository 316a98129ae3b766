// Which hidden unit of which sequence a thread works on.
#pragma once

#include "../common/prims.cuh"
#include "cta_coords.cuh"
#include "tile_sizes.h"

namespace fastseq::recurrent {

// A thread's items of a batch tile, each a unit of a sequence (column). Lanes of a warp that are side by side take units side by side,
// blocks of 8, 16 or 32 of one column after the other.
template <int kColumns>
class ThreadMap {
 public:
  FASTSEQ_DEVICE ThreadMap(const Split& split, const CtaCoords& cta, int hidden)
      : units_(split.units), bits_(units_ & 8 ? 3 : units_ & 16 ? 4 : 5), first_unit_(cta.rank * units_), hidden_(hidden) {}

  FASTSEQ_DEVICE int index(int j) const { return gpu::tid() + j * kThreads; }
  FASTSEQ_DEVICE int unit(int j) const { return (index(j) >> bits_) / kColumns << bits_ | (index(j) & ((1 << bits_) - 1)); }
  FASTSEQ_DEVICE int column(int j) const { return (index(j) >> bits_) % kColumns; }
  FASTSEQ_DEVICE bool exists(int j) const { return index(j) < units_ * kColumns; }
  // of the lane's H; those of the last CTAs may lie beyond
  FASTSEQ_DEVICE int hidden_unit(int j) const { return first_unit_ + unit(j); }
  FASTSEQ_DEVICE bool has_unit(int j) const { return hidden_unit(j) < hidden_; }

 private:
  const int units_, bits_, first_unit_, hidden_;
};

// Of a thread in a batch tile.
constexpr int most_items(int units, int columns) { return (units * columns + kThreads - 1) / kThreads; }

}  // namespace fastseq::recurrent
