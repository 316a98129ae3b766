// Stands in for device.cu in a library without CUDA.
#include "common/device.h"
#include "common/stream.h"

#include <torch/headeronly/util/Exception.h>

namespace fastseq {

std::vector<int64_t> cuda_versions() {
  return {0, 0, 0};
}

std::string cuda_obstacle(int64_t) {
  return "this library was built without CUDA";
}

std::vector<int64_t> cuda_image(int64_t device) {
  STD_TORCH_CHECK(false, "no CUDA kernel of fastseq can run on device ", device, ": this library was built without CUDA");
}

std::vector<int64_t> cuda_limits(int64_t) {
  return {0, 0, 0, 0};
}

bool cuda_stream_lent() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}

} // namespace fastseq
