#include "common/device.h"
#include "common/on_device.h"
#include "common/stream.h"

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

namespace fastseq {
namespace {

// Compiled for every architecture like all other kernels, so whether the driver finds an image for it holds for them too.
__global__ void probe() {}

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

std::vector<int64_t> cuda_limits(int64_t device) {
  const int index = static_cast<int>(device);
  OnDevice guard(index);
  int multiprocessors = 0, shared_bytes = 0, cooperative = 0, major = 0, cluster = 0;
  cudaError_t status = guard.status();
  const auto ask = [&](int& answer, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&answer, attribute, index);
  };
  ask(multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(cooperative, cudaDevAttrCooperativeLaunch);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  STD_TORCH_CHECK(status == cudaSuccess, "cannot ask device ", device, " for its limits: ", cudaGetErrorString(status));
  if (major >= 9) {
    cudaLaunchConfig_t config = {};
    config.gridDim = 16, config.blockDim = 256, config.dynamicSmemBytes = shared_bytes;
    status = cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status == cudaSuccess) status = cudaFuncSetAttribute(probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status == cudaSuccess) status = cudaOccupancyMaxPotentialClusterSize(&cluster, probe, &config);
    if (status != cudaSuccess) {
      cluster = 0; // a driver or a slice of a GPU without clusters
      static_cast<void>(cudaGetLastError());
    }
  }
  return {multiprocessors, shared_bytes, cluster, cooperative};
}

bool cuda_stream_lent() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}

} // namespace fastseq
