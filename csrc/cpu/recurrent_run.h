// What the CPU ops of the recurrence share on the host: a layer as the ops make it of their arguments, its packed weights, its run.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "recurrent.h"
#include "recurrent_kernel.h"
#include "recurrent_plan.h"

namespace fastseq::cpu {

using torch::headeronly::ScalarType;

// The kernels that serve a call.
const Kernels& kernels_of(const Shape& shape);

Cell cell_of(const std::string& name);

inline bool is_stored(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}
Type type_of(ScalarType type);

// of an element in memory, and of one in the kernels' arithmetic
inline int64_t bytes_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }
inline int64_t wide_bytes(Type type) { return type == Type::kDouble ? 8 : 4; }

inline const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
inline const void* offset(const void* base, int64_t bytes) { return base ? static_cast<const char*>(base) + bytes : nullptr; }
inline const void* data(const Tensor& tensor) { return tensor.numel() ? tensor.const_data_ptr() : nullptr; }
inline const int64_t* integers(const std::optional<Tensor>& tensor) { return static_cast<const int64_t*>(data(tensor)); }
inline void* mutable_data(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

// What the kernels rely on; the Python side of the op sees to it, a caller of the raw op may not.
inline void expect(const std::optional<Tensor>& tensor, ScalarType type, int64_t elements, const char* name, bool contiguous = true) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->scalar_type() == type, "recurrent: ", name, " has a wrong dtype");
  STD_TORCH_CHECK(tensor->numel() == elements, "recurrent: ", name, " must have ", elements, " elements, got ", tensor->numel());
  STD_TORCH_CHECK(!contiguous || tensor->is_contiguous(), "recurrent: ", name, " must be contiguous");
}

inline bool any(const Zoneout& zoneout) { return zoneout.hold_h || zoneout.hold_c || zoneout.h > 0 || zoneout.c > 0; }

// Memory for packed weights and states, 64-byte aligned, since the kernels load whole registers. What it holds is undefined: with
// FASTSEQ_CPU_POISON set, NaN in every dtype, so that a test sees what is read before it is written. Each thread keeps what it has freed,
// up to kKept bytes: pages that the system has to clear anew at every call cost as much as a tenth of it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : size_((std::max<int64_t>(bytes, 1) + 4095) / 4096 * 4096) {
    auto& free = kept().blocks;
    const auto fits = [&](const Block& block) { return block.size >= size_ && block.size <= 2 * size_; };
    const auto found = std::find_if(free.begin(), free.end(), fits);
    if (found != free.end()) {
      data_ = found->data, size_ = found->size;
      kept().total -= size_;
      free.erase(found);
    } else {
      data_ = std::aligned_alloc(64, size_);
      STD_TORCH_CHECK(data_, "out of memory: ", size_, " bytes for packed recurrent weights or states");
    }
    if (std::getenv("FASTSEQ_CPU_POISON")) std::memset(data_, 0xff, size_);
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (!data_) return;
    if (kept().total + size_ > kKept) {
      std::free(data_);
    } else {
      kept().blocks.push_back({data_, size_});
      kept().total += size_;
    }
  }
  void* get() const { return data_; }

 private:
  static constexpr int64_t kKept = 16 << 20;
  struct Block {
    void* data;
    int64_t size;
  };
  struct Kept {
    std::vector<Block> blocks;
    int64_t total = 0;
    ~Kept() {
      for (const Block& block : blocks) std::free(block.data);
    }
  };
  static Kept& kept() {
    static thread_local Kept kept;
    return kept;
  }

  void* data_ = nullptr;
  int64_t size_ = 0;
};

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

}  // namespace fastseq::cpu
