// What the CPU ops of the recurrence share on the host: a layer as the ops make it of their arguments, its packed weights, its run.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "host.h"
#include "recurrent.h"
#include "recurrent_kernel.h"
#include "recurrent_plan.h"

namespace fastseq::cpu {

// The kernels that serve a call.
const Kernels& kernels_of(const Shape& shape);

Cell cell_of(const std::string& name);

// What the kernels rely on; the Python side of the op sees to it, a caller of the raw op may not.
inline void expect(const std::optional<Tensor>& tensor, ScalarType type, int64_t elements, const char* name, bool contiguous = true) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->scalar_type() == type, "recurrent: ", name, " has a wrong dtype");
  STD_TORCH_CHECK(tensor->numel() == elements, "recurrent: ", name, " must have ", elements, " elements, got ", tensor->numel());
  STD_TORCH_CHECK(!contiguous || tensor->is_contiguous(), "recurrent: ", name, " must be contiguous");
}

inline const bool* flags(const std::optional<Tensor>& tensor) { return static_cast<const bool*>(data(tensor)); }

inline Zoneout zoneout_of(const std::optional<Tensor>& hold_h, const std::optional<Tensor>& hold_c, double h, double c) {
  return {static_cast<const bool*>(data(hold_h)), static_cast<const bool*>(data(hold_c)), h, c};
}
inline bool any(const Zoneout& zoneout) { return zoneout.hold_h || zoneout.hold_c || zoneout.h > 0 || zoneout.c > 0; }

// With zoneout, a cell that saves nothing saves its output.
inline int64_t saved_of(const Tiling& tiling, const Shape& shape) { return shape.zoned ? std::max<int64_t>(tiling.saved, 1) : tiling.saved; }

// Where the rows of a layer's sequences lie: padded, with lengths [B] or without, or packed, with batch_sizes [T]; resets of rows or null.
class Sequences {
 public:
  static constexpr int64_t kFirst = -1, kAnew = -2;

  Sequences(int64_t steps, int64_t batch, const int64_t* lengths, const int64_t* batch_sizes, const bool* resets)
      : lengths_(lengths), resets_(resets), begins_(steps), sizes_(steps, batch) {
    if (batch_sizes) sizes_.assign(batch_sizes, batch_sizes + steps);
    for (int64_t t = 0, row = 0; t < steps; row += sizes_[t++]) begins_[t] = row;
  }

  // Calls visit(row, before, slot) for every row that a sequence has, in order; before: the row of the step before it, kFirst at the first,
  // kAnew where the state before it was replaced.
  template <class F>
  void each(bool reverse, F&& visit) const {
    const int64_t steps = begins_.size();
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t slot = 0; slot < sizes_[t]; ++slot) {
        if (lengths_ && t >= lengths_[slot]) continue;
        const int64_t other = reverse ? t + 1 : t - 1;
        const bool inside = other >= 0 && other < steps && slot < sizes_[other] && !(lengths_ && other >= lengths_[slot]);
        const int64_t row = begins_[t] + slot, before = inside ? begins_[other] + slot : kFirst;
        const bool anew = resets_ && (reverse ? inside && resets_[before] : resets_[row]);
        visit(row, anew ? kAnew : before, slot);
      }
  }

 private:
  const int64_t* lengths_;
  const bool* resets_;
  std::vector<int64_t> begins_, sizes_;  // of every step: its first row, its rows
};

// A matrix [rows, columns] in memory, one row `stride` elements from the next, or its transpose.
inline Tensor matrix(const void* values, int64_t rows, int64_t columns, int64_t stride, ScalarType type, bool transposed = false) {
  const int64_t sizes[] = {transposed ? columns : rows, transposed ? rows : columns};
  const int64_t strides[] = {transposed ? 1 : stride, transposed ? stride : 1};
  return torch::stable::from_blob(const_cast<void*>(values), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU, 0), type);
}

// Kept weights [n, depth] in fp32 again, for calls of so many rows that tiles pay.
inline void restore(Stored stored, const void* weights, const float* scales, int64_t n, int64_t depth, float* to) {
  for (int64_t r = 0; r < n; ++r, to += depth) {
    if (stored == Stored::kInt8) {
      const auto* row = static_cast<const int8_t*>(weights) + r * depth;
      const float scale = scales[r];
      for (int64_t k = 0; k < depth; ++k) to[k] = row[k] * scale;
    } else {
      const auto* row = static_cast<const torch::headeronly::BFloat16*>(weights) + r * depth;
      for (int64_t k = 0; k < depth; ++k) to[k] = static_cast<float>(row[k]);
    }
  }
}

// Packed weights of all lanes, [lanes, tiles] of tile_bytes: pack(lane, tile, to) fills one.
template <class Pack>
void packed_tiles(int64_t lanes, int64_t tiles, int64_t tile_bytes, int64_t work_of_tile, void* packed, const Pack& pack) {
  const int64_t grain = std::max<int64_t>(1, kWorkOfPacking / std::max<int64_t>(work_of_tile, 1));
  torch::stable::parallel_for(0, lanes * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(i / tiles, i % tiles, static_cast<char*>(packed) + i * tile_bytes);
  });
}

inline int64_t tiles_of(int64_t columns, int64_t tile) { return (columns + tile - 1) / tile; }

// A layer forward, all its lanes, as the ops make it of their arguments.
struct Layer {
  Forward a{};  // all but what is made of the weights; x, if given, is projected here
  int64_t steps = 0, rows = 0, reverse = 0;
  const int64_t *lengths = nullptr, *batch_sizes = nullptr;
  const bool* resets = nullptr;               // of rows
  std::vector<const void*> w_ih, w_hh, w_hr;  // of each lane, laid out as PyTorch does
  // of weights packed before: either their tiles, as a call would make them, or w_ih and w_hh of another type, with scales
  const void *tiles_ih = nullptr, *tiles_hh = nullptr, *tiles_hr = nullptr;
  Stored stored = Stored::kAsGiven;
  std::vector<const void*> scales_ih, scales_hh;
};

// Sizes of packed weights, and how each is made.
class Packer {
 public:
  Packer(const Shape& shape, const Kernels& kernel)
      : shape_(shape), kernel_(kernel), tiling_(kernel_.tiling(shape)), unit_tile_(tiling_.unit_blocks * tiling_.width) {}

  int64_t unit_tiles() const { return tiles_of(shape_.hidden, unit_tile_); }
  int64_t output_tiles() const { return tiles_of(shape_.output, kTileVectors * tiling_.width); }
  int64_t units_bytes(int64_t depth) const { return shape_.lanes * unit_tiles() * kernel_.unit_tile_bytes(shape_, depth); }
  int64_t columns_bytes() const { return shape_.lanes * output_tiles() * kernel_.column_tile_bytes(shape_, shape_.hidden); }

  // of each lane [G*H, depth]
  void units(const std::vector<const void*>& weights, int64_t depth, void* to) const {
    const int64_t bytes = kernel_.unit_tile_bytes(shape_, depth), work = unit_tile_ * tiling_.gates * depth;
    packed_tiles(shape_.lanes, unit_tiles(), bytes, work, to,
                 [&](int64_t d, int64_t tile, void* part) { kernel_.pack_units(shape_, weights[d], depth, tile, part); });
  }
  // of each lane [P, H]
  void columns(const std::vector<const void*>& weights, void* to) const {
    const int64_t P = shape_.output, H = shape_.hidden, work = kTileVectors * tiling_.width * H;
    packed_tiles(shape_.lanes, output_tiles(), kernel_.column_tile_bytes(shape_, H), work, to,
                 [&](int64_t d, int64_t tile, void* part) { kernel_.pack_columns(shape_, weights[d], P, H, tile, part); });
  }

 private:
  const Shape& shape_;
  const Kernels& kernel_;
  const Tiling tiling_;
  const int64_t unit_tile_;
};

// All lanes of a layer, by the kernels that serve it.
void run(Layer& layer);

// Whether a layer is a single step that recurrent_step.h serves; then it runs all its lanes.
bool is_step(const Layer& layer);
void run_step(const Layer& layer);

}  // namespace fastseq::cpu
