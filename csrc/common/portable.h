// What lets one source serve the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define FASTSEQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTSEQ_HOST_DEVICE inline __attribute__((always_inline))
#endif
