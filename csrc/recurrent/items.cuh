// Which hidden unit of which sequence a thread works on, and where their numbers lie.
#pragma once

#include "../common/prims.cuh"
#include "layout.h"
#include "place.cuh"

namespace fastseq::recurrent {

// The rows of the batch that a team takes, [chunks][kColumns].
template <int kColumns>
class Rows {
 public:
  FASTSEQ_DEVICE Rows(const Walk& walk, const Split& split, const Place& place, gpu::Smem& smem)
      : walk_(walk), taken_(split.rows), first_(place.part * split.rows), backwards_(walk.reverse >> place.lane & 1) {
    const int count = split.chunks * kColumns;
    lengths_ = smem.take<int32_t>(count);
    for (int i = gpu::tid(); i < count; i += kThreads) {
      const int b = first_ + i;
      lengths_[i] = i >= taken_ || b >= walk.batch ? 0 : walk.lengths ? static_cast<int32_t>(walk.lengths[b]) : walk.steps;
    }
    gpu::cta_sync();
    for (int i = 0; i < count; ++i) longest_ = lengths_[i] > longest_ ? lengths_[i] : longest_;
  }

  // Steps until the last sequence of the team ends.
  FASTSEQ_DEVICE int longest() const { return longest_; }
  FASTSEQ_DEVICE bool exists(int chunk, int column) const {
    return chunk * kColumns + column < taken_ && batch_row(chunk, column) < walk_.batch;
  }
  FASTSEQ_DEVICE int batch_row(int chunk, int column) const { return first_ + chunk * kColumns + column; }
  FASTSEQ_DEVICE bool active(int chunk, int column, int t) const { return t < lengths_[chunk * kColumns + column]; }
  FASTSEQ_DEVICE int64_t row(int chunk, int column, int t) const {
    return (walk_.starts ? walk_.starts[t] : int64_t{t} * walk_.batch) + batch_row(chunk, column);
  }
  // of step `s` in the lane's own order
  FASTSEQ_DEVICE int time(int s) const { return backwards_ ? longest_ - 1 - s : s; }
  // of an active row at time t, the time of the step before; -1: it starts from the initial state
  FASTSEQ_DEVICE int before(int chunk, int column, int t) const {
    if (!backwards_) return t - 1;
    return active(chunk, column, t + 1) ? t + 1 : -1;
  }

 private:
  const Walk& walk_;
  const int taken_, first_;
  const bool backwards_;
  int32_t* lengths_;
  int longest_ = 0;
};

// A thread's items of a chunk. Lanes side by side take units side by side, blocks of 8, 16 or 32 of one column after the other.
template <int kColumns>
class Items {
 public:
  FASTSEQ_DEVICE Items(const Split& split, const Place& place, int hidden)
      : units_(split.units), bits_(units_ & 8 ? 3 : units_ & 16 ? 4 : 5), first_unit_(place.rank * units_), hidden_(hidden) {}

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

// Of a thread in a chunk.
constexpr int most_items(int units, int columns) { return (units * columns + kThreads - 1) / kThreads; }

}  // namespace fastseq::recurrent
