// How the threads share one call: teams over lanes and parts of the batch, and within a team, tiles of units.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastseq::cpu {

struct Plan {
  int64_t batch_parts;  // of each lane: teams = lanes * batch_parts
  int64_t members;      // of each team; more than one meet at a barrier every step
};

// Numbers of the plan, with their reasons.
constexpr int64_t kRowsOfPart = 8;        // with fewer rows, a row block does not hide the stream of weights behind its arithmetic
constexpr int64_t kCacheBytes = 512 << 10;  // half of a usual second-level cache: weights within it are cheap to stream for few rows
constexpr int64_t kWorkOfMember = 48 << 10;  // multiply-adds of a step that are worth a barrier (a few hundred nanoseconds)

constexpr int64_t kWorkOfPacking = 64 << 10;  // weights worth a thread to pack

// Whether a call of so few rows (steps times sequences) reads weights of a depth as PyTorch stores them. Packing them costs as much as
// some steps; unpacked, every product of a row ends with sums across lanes, which a depth of many vectors outweighs. AMX tiles, which
// multiply a row as fast as 16, take packed weights alone.
inline bool reads_in_place(int64_t rows, int64_t depth, bool tiles) { return rows * (tiles ? 64 : 6) <= depth; }

// Whether a single step of a batch is multiplied with lanes along its sequences (recurrent_step.h), in vectors of so many of them: the
// last must not be mostly empty.
constexpr int64_t kSequencesOfStep = 16;
inline bool steps_at_once(int64_t batch, int64_t width) {
  const int64_t whole = (batch + width - 1) / width * width;
  return batch >= kSequencesOfStep && 4 * batch >= 3 * whole;
}

// Whether a single step of fewer sequences is multiplied with lanes along the depth, by kernels that do nothing but steps.
inline bool steps_in_place(int64_t batch, int64_t input, int64_t hidden) {
  return batch < kSequencesOfStep && reads_in_place(batch, std::min(input, hidden), false);
}

// Whether weights kept in another type are read as they lie: they are what fits the caches. With many sequences, tiles made of them again
// are the faster ones; and the projected input of a long call, all of it at once, would take too much memory.
constexpr int64_t kProjectedElements = 16 << 20;
inline bool reads_kept_in_place(int64_t rows, int64_t batch, int64_t depth, int64_t columns) {
  return batch * 16 <= depth && rows * columns <= kProjectedElements;
}

// Whether float32 is multiplied by AMX in three parts, where there is AMX: with fewer sequences the weights' parts, half again as large as
// they are, are fetched for too few rows; less work than that of some steps does not pay for packing, nor fewer weights for the parts of
// the state (B = 32: LSTM of 25 units 0.9 of the speed of multiply-adds, of 64 and more 1.1 to 1.3; B = 8: 0.75 to 1.06).
inline bool multiplies_parts(int64_t batch, int64_t steps, int64_t weights) { return batch >= 16 && steps >= 16 && weights >= 12 << 10; }

// A split of the batch needs no barrier, but each part streams all weights; a split of the units streams each weight once.
inline Plan make_plan(int64_t threads, int64_t lanes, int64_t batch, int64_t depth, int64_t columns, int64_t tiles, int64_t bytes) {
  const int64_t of_lane = std::max<int64_t>(1, threads / lanes);
  const bool cheap = depth * columns * bytes <= kCacheBytes;
  const int64_t rows = cheap ? 1 : kRowsOfPart;
  Plan plan{std::clamp<int64_t>(batch / rows, 1, of_lane), 1};
  const int64_t part = (batch + plan.batch_parts - 1) / plan.batch_parts;
  // a small step is not worth sharing at all
  while (plan.batch_parts > 1 && part * depth * columns < kWorkOfMember / 8) plan.batch_parts = 1;
  const int64_t worth = std::max<int64_t>(1, part * depth * columns / kWorkOfMember);
  plan.members = std::min({of_lane / plan.batch_parts, tiles, worth});
  return plan;
}

}  // namespace fastseq::cpu
