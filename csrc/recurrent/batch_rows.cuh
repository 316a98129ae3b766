// Which sequences a team works on, when each of them ends, and where the rows of a step lie.
#pragma once

#include "../common/prims.cuh"
#include "cta_coords.cuh"
#include "params.h"
#include "tile_sizes.h"

namespace fastseq::recurrent {

// The rows of the batch that a team takes, [batch_tiles][kColumns].
template <int kColumns>
class BatchRows {
 public:
  FASTSEQ_DEVICE BatchRows(const Walk& walk, const Split& split, const CtaCoords& cta, gpu::Smem& smem)
      : walk_(walk), taken_(split.rows), first_(cta.part * split.rows), backwards_(walk.reverse >> cta.lane & 1) {
    const int count = split.batch_tiles * kColumns;
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
  FASTSEQ_DEVICE bool exists(int batch_tile, int column) const {
    return batch_tile * kColumns + column < taken_ && batch_row(batch_tile, column) < walk_.batch;
  }
  FASTSEQ_DEVICE int batch_row(int batch_tile, int column) const { return first_ + batch_tile * kColumns + column; }
  FASTSEQ_DEVICE bool active(int batch_tile, int column, int t) const { return t < lengths_[batch_tile * kColumns + column]; }
  FASTSEQ_DEVICE int64_t row(int batch_tile, int column, int t) const {
    return (walk_.starts ? walk_.starts[t] : int64_t{t} * walk_.batch) + batch_row(batch_tile, column);
  }
  // of step `s` in the lane's own order
  FASTSEQ_DEVICE int time(int s) const { return backwards_ ? longest_ - 1 - s : s; }
  // of an active row at time t, the time of the step before; -1: it starts from the initial state
  FASTSEQ_DEVICE int before(int batch_tile, int column, int t) const {
    if (!backwards_) return t - 1;
    return active(batch_tile, column, t + 1) ? t + 1 : -1;
  }
  // the time after t in the lane's own order
  FASTSEQ_DEVICE int after(int t) const { return backwards_ ? t - 1 : t + 1; }
  // Not 0 where a row that has time t begins anew with it, in the lane's own order; a reset stands at the later of two times. resets:
  // null without any. The number as it is read: nobody waits for it here.
  FASTSEQ_DEVICE uint8_t cut(const uint8_t* resets, int batch_tile, int column, int t) const {
    const int at = backwards_ ? t + 1 : t;
    return resets && t >= 0 && active(batch_tile, column, at) ? resets[row(batch_tile, column, at)] : uint8_t{0};
  }

 private:
  const Walk& walk_;
  const int taken_, first_;
  const bool backwards_;
  int32_t* lengths_;
  int longest_ = 0;
};

}  // namespace fastseq::recurrent
