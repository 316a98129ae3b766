// Makes a device the CUDA runtime's current one for a while.
#pragma once

#include <cuda_runtime.h>

namespace fastseq {

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

} // namespace fastseq
