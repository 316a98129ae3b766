// For programs that try kernels, on the host and on a GPU alike: arrays in global memory, launches that wait, checks.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "common/prims.cuh"

namespace harness {

// In global memory, aligned to 16 bytes; both sides read and write it between launches. Neither leaves anything readable behind
// its end: on the host the sanitizer sees whoever goes there.
template <class T>
class Array {
 public:
  explicit Array(int count, T value = {}) : count_(count) {
    const size_t bytes = sizeof(T) * count;
#if defined(__CUDACC__)
    if (cudaMallocManaged(&data_, bytes) != cudaSuccess) std::abort();
#else
    data_ = static_cast<T*>(::operator new(bytes, std::align_val_t{16}));
#endif
    for (int i = 0; i < count; ++i) data_[i] = value;
  }
  ~Array() {
#if defined(__CUDACC__)
    cudaFree(data_);
#else
    ::operator delete(data_, std::align_val_t{16});
#endif
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() { return data_; }
  T& operator[](int i) { return data_[i]; }
  int count() const { return count_; }

 private:
  int count_;
  T* data_ = nullptr;
};

// What the words of kernels do, for expectations: with nvcc those are for devices only.
template <class T>
T rounded(float x);
template <>
inline float rounded<float>(float x) {
  return x;
}
template <>
inline fastseq::gpu::Bfloat16 rounded<fastseq::gpu::Bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float value(fastseq::gpu::Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float value(float x) { return x; }

// Failures of the test that runs.
inline int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && harness::failures++ < 3) {                \
      std::printf("  %s:%d: %s", __FILE__, __LINE__, #condition); \
      std::printf(": " __VA_ARGS__);                              \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

// Launches and waits; "" or what went wrong.
template <class Params>
const char* run(void (*kernel)(Params), const fastseq::gpu::Launch& how, const Params& params) {
  const char* error = fastseq::gpu::launch(kernel, how, params);
#if defined(__CUDACC__)
  if (!*error) {
    const cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) error = cudaGetErrorString(status);
  }
#endif
  return error;
}

template <class Params>
void must_run(void (*kernel)(Params), const fastseq::gpu::Launch& how, const Params& params) {
  const char* error = run(kernel, how, params);
  CHECK(!*error, "%s", error);
}

struct Test {
  const char* name;
  void (*run)();
  bool cluster;  // needs a device of compute capability 9.0
};

inline bool has_clusters() {
#if defined(__CUDACC__)
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  return major >= 9;
#else
  return true;
#endif
}

// Arguments: the first seed and the number of seeds (on a GPU: of repetitions), then names of tests; none: all.
template <int kCount>
int main(const Test (&tests)[kCount], int argc, char** argv) {
  const int first = argc > 1 ? std::atoi(argv[1]) : 0;
  const int seeds = argc > 2 ? std::atoi(argv[2]) : 1;
  int failed = 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // whoever reads along need not wait for the end
  for (const Test& test : tests) {
    bool wanted = argc <= 3;
    for (int i = 3; i < argc; ++i) wanted |= std::strcmp(argv[i], test.name) == 0;
    if (!wanted) continue;
    if (test.cluster && !has_clusters()) {
      std::printf("skipped %s: needs clusters\n", test.name);
      continue;
    }
    int wrong = 0;
    for (int seed = first; seed < first + seeds; ++seed) {
#if !defined(__CUDACC__)
      fastseq::gpu::host::seed(seed);
#endif
      failures = 0;
      test.run();
      if (failures) {
        std::printf("  with seed %d\n", seed);
        ++wrong;
      }
    }
    std::printf("%s %s: %d of %d\n", wrong ? "FAILED" : "passed", test.name, seeds - wrong, seeds);
    std::fflush(stdout);
    failed += wrong > 0;
  }
  return failed > 0;
}

}  // namespace harness
