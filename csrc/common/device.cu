#include "common/device.h"
#include "common/stream.h"

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

namespace fastseq {
namespace {

// Compiled for every architecture like all other kernels, so whether the driver finds an image for it holds for them too.
__global__ void probe() {}

// The static runtime keeps its own current device; put it back, torch's runtime shares the thread.
class OnDevice {
 public:
  explicit OnDevice(int device) : status_(cudaGetDevice(&before_)) {
    if (status_ == cudaSuccess) {
      status_ = cudaSetDevice(device);
    }
  }
  ~OnDevice() {
    if (status_ == cudaSuccess) {
      static_cast<void>(cudaSetDevice(before_));
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaError_t status() const {
    return status_;
  }

 private:
  int before_ = 0;
  cudaError_t status_;
};

cudaError_t probe_attributes(int64_t device, cudaFuncAttributes& attributes) {
  OnDevice guard(static_cast<int>(device));
  cudaError_t status = guard.status();
  if (status == cudaSuccess) {
    status = cudaFuncGetAttributes(&attributes, probe);
  }
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError()); // not to be found by the next kernel launch
  }
  return status;
}

} // namespace

std::vector<int64_t> cuda_versions() {
  int driver = 0;
  int devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) {
    driver = 0;
  }
  if (cudaGetDeviceCount(&devices) != cudaSuccess) {
    devices = 0;
  }
  static_cast<void>(cudaGetLastError());
  return {CUDART_VERSION, driver, devices};
}

std::string cuda_obstacle(int64_t device) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = probe_attributes(device, attributes);
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

std::vector<int64_t> cuda_image(int64_t device) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = probe_attributes(device, attributes);
  STD_TORCH_CHECK(
      status == cudaSuccess, "no CUDA kernel of fastseq can run on device ", device, ": ", cudaGetErrorString(status));
  return {attributes.binaryVersion, attributes.ptxVersion};
}

bool cuda_stream_lent() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}

} // namespace fastseq
