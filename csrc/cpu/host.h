// What the host parts of the CPU ops share: elements and pointers of tensors, and memory that a thread keeps.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "level.h"
#include "type.h"

namespace fastseq::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// Whether a tensor, if there is one, has its elements in the memory of the CPU, at strides.
inline bool plain(const Tensor& tensor) {
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return tensor.is_cpu() && layout == aoti_torch_layout_strided();
}
inline bool plain(const std::optional<Tensor>& tensor) { return !tensor || plain(*tensor); }

// Calls body.template operator()<S>(): the type of an element in memory, with PyTorch's conversions to fp32 and back.
template <class F>
void with_storage(Type type, F&& body) {
  switch (type) {
    case Type::kFloat: return body.template operator()<float>();
    case Type::kDouble: return body.template operator()<double>();
    case Type::kBfloat16: return body.template operator()<torch::headeronly::BFloat16>();
    case Type::kHalf: return body.template operator()<torch::headeronly::Half>();
  }
}

inline ScalarType wide_of(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// A new tensor on the CPU.
inline Tensor empty_strided(std::initializer_list<int64_t> sizes, const int64_t* strides, ScalarType type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides,
                                                         torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
// Contiguous, of up to four dimensions; `transposed`: but for the two before the last, which are exchanged in memory.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, bool transposed = false) {
  const int64_t n = sizes.size(), *size = sizes.begin();
  int64_t strides[4], stride = 1;
  for (int64_t i = n; i-- > 0; stride *= size[i]) strides[i] = stride;
  if (transposed) strides[n - 2] = size[n - 1] * size[n - 3], strides[n - 3] = size[n - 1];
  return empty_strided(sizes, strides, type);
}

using Sizes = std::initializer_list<int64_t>;

// Elements of a tensor, from its `first` on.
inline Tensor view(const Tensor& tensor, Sizes sizes, Sizes strides, int64_t first = 0) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), sizes.size(), sizes.begin(), strides.begin(), first, &handle));
  return Tensor(handle);
}

// Memory for packed weights, states and workspaces, 64-byte aligned, since the kernels load whole registers. What it holds is undefined: with
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
      STD_TORCH_CHECK(data_, "out of memory: ", size_, " bytes for packed weights, states or workspaces");
    }
    if (poisons_scratch()) std::memset(data_, 0xff, size_);
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

}  // namespace fastseq::cpu
