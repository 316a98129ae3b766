// torch's current CUDA stream.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

// Declared here, weak: only libtorch_cuda has it, and this library must load where there is none. torch's own header declares it strong.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastseq {

// Raises where torch has none.
inline void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "torch has no current CUDA stream for device ", device);
  return stream;
}

} // namespace fastseq
