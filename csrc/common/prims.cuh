// The machine, as kernels see it: the only file with inline PTX, built-in variables and shared memory. Kernels are written in these
// words alone, so that the same source runs on a GPU and, compiled by the host's compiler against the emulator of tests/csrc, on a CPU.
#pragma once

#include <cstdint>

#include "machine.h"

#if !defined(__CUDACC__)
#include "emulator/prims_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A kernel takes one struct of parameters and runs with exactly this many threads, alone on its multiprocessor.
#define FASTSEQ_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FASTSEQ_PARAMETERS const __grid_constant__
#define FASTSEQ_DEVICE __device__ __forceinline__
#define FASTSEQ_UNROLL _Pragma("unroll")
#define FASTSEQ_ROLLED _Pragma("unroll 1")

namespace fastseq::gpu {

// Whether the code is compiled for an architecture that has thread-block clusters; without them their words trap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// where a thread is

FASTSEQ_DEVICE int tid() { return threadIdx.x; }
FASTSEQ_DEVICE int lane() { return threadIdx.x & 31; }
FASTSEQ_DEVICE int warp() { return threadIdx.x >> 5; }
FASTSEQ_DEVICE int nthreads() { return blockDim.x; }
FASTSEQ_DEVICE int bid() { return blockIdx.x; }

// of the CTA in its cluster; 0 without one
FASTSEQ_DEVICE int cta_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// The CTA's dynamic shared memory, handed out from the beginning: every thread takes the same pieces in the same order.
class Smem {
 public:
  template <class T>
  FASTSEQ_DEVICE T* take(int count) {
    extern __shared__ __align__(128) unsigned char fastseq_shared_memory[];
    T* piece = reinterpret_cast<T*>(fastseq_shared_memory + used_);
    used_ += piece_bytes<T>(count);
    return piece;
  }

 private:
  int used_ = 0;
};

// synchronization inside a CTA and a cluster

FASTSEQ_DEVICE void cta_sync() { __syncthreads(); }
FASTSEQ_DEVICE void warp_sync() { __syncwarp(); }

FASTSEQ_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

FASTSEQ_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

FASTSEQ_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

#if defined(FASTSEQ_SPIN_BOUND)
FASTSEQ_DEVICE void spun(uint64_t& spins) {
  if (++spins > FASTSEQ_SPIN_BOUND) __trap();
}
#else
FASTSEQ_DEVICE void spun(uint64_t&) {}
#endif

// Called by all threads of a CTA, before a cluster_sync: each barrier completes a phase when so many bytes have arrived.
FASTSEQ_DEVICE void mbarrier_init(Mbarrier* barriers, int count, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (tid() == 0) {
    for (int i = 0; i < count; ++i) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + i)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int i = 0; i < count; ++i) {
      asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barriers + i)), "r"(bytes)
                   : "memory");
    }
  }
#else
  __trap();
#endif
}

// By one thread, after the CTA has waited for the phase before and before anybody sends for the next.
FASTSEQ_DEVICE void mbarrier_expect(Mbarrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#else
  __trap();
#endif
}

// Returns once the phase of this parity is complete; what arrived in it is then visible to the calling thread.
FASTSEQ_DEVICE void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  for (uint64_t spins = 0; !done; spun(spins)) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#else
  __trap();
#endif
}

template <class T>
FASTSEQ_DEVICE Peer<T> peer(T* own, int rank) {
  Peer<T> there{};
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there.address) : "r"(shared_address(own)), "r"(rank));
#else
  __trap();
#endif
  return there;
}

template <class T>
FASTSEQ_DEVICE Peer<T> operator+(Peer<T> p, int count) {
  return {p.address + count * static_cast<uint32_t>(sizeof(T))};
}

// Sends 16 bytes into a peer's shared memory; they count on the barrier, which is that peer's too, when they have arrived.
FASTSEQ_DEVICE void st_async(Peer<Vec16> to, Vec16 v, Peer<Mbarrier> barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to.address),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "r"(barrier.address)
               : "memory");
#else
  __trap();
#endif
}

// copies of 16 bytes from global to shared memory that land by cp_wait; through L2, never from a stale L1

FASTSEQ_DEVICE void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
FASTSEQ_DEVICE void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FASTSEQ_DEVICE void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// flags in global memory, between CTAs that run at the same time

// By all lanes of one warp: what they wrote before, or what reached them by a cta_sync, is visible to whoever sees the flag at `value`.
FASTSEQ_DEVICE void flag_publish(uint32_t* flag, uint32_t value) {
  warp_sync();
  if (lane() == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// By all lanes of one warp: returns when each of the flags has reached `value`.
FASTSEQ_DEVICE void flags_wait(const uint32_t* flags, int count, uint32_t value) {
  for (int i = lane(); i < count; i += 32) {
    uint32_t seen = 0;
    for (uint64_t spins = 0;; spun(spins)) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags + i) : "memory");
      if (static_cast<int32_t>(seen - value) >= 0) break;
    }
  }
  warp_sync();
}

// numbers

FASTSEQ_DEVICE float to_float(float x) { return x; }
FASTSEQ_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
FASTSEQ_DEVICE float to_float(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// rounded to nearest even
template <class T>
FASTSEQ_DEVICE T from_float(float x);
template <>
FASTSEQ_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FASTSEQ_DEVICE Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
FASTSEQ_DEVICE Bfloat16 from_float<Bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

FASTSEQ_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
FASTSEQ_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// the nearest number that TF32 has, in fp32's bits
FASTSEQ_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

FASTSEQ_DEVICE float exp_exact(float x) { return expf(x); }
FASTSEQ_DEVICE float tanh_exact(float x) { return tanhf(x); }
FASTSEQ_DEVICE float divide_exact(float a, float b) { return __fdiv_rn(a, b); }
FASTSEQ_DEVICE float exp_fast(float x) { return __expf(x); }
FASTSEQ_DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }

// matrix products of a warp, d += a b, in the fragment layouts of PTX's mma.m16n8k16 and m16n8k8

FASTSEQ_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FASTSEQ_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

FASTSEQ_DEVICE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two 8 x 8 matrices of 16-bit values; lanes 0..15 name a row of 16 bytes each (the other lanes' rows must be readable too).
FASTSEQ_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// Four of them; all lanes name a row.
FASTSEQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// launch

// A kernel with one parameter struct. Returns "" or what the CUDA runtime says.
template <class Params>
const char* launch(void (*kernel)(Params), const Launch& how, const Params& params) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.smem);
  if (status == cudaSuccess && how.cluster > 8) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (status == cudaSuccess) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = how.grid;
    config.blockDim = how.block;
    config.dynamicSmemBytes = how.smem;
    config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = attributes;
    if (how.cooperative) {
      attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[config.numAttrs++].val.cooperative = 1;
    }
    if (how.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim.x = how.cluster;
      attributes[config.numAttrs].val.clusterDim.y = 1;
      attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    status = cudaLaunchKernelEx(&config, kernel, params);
  }
  if (status == cudaSuccess) return "";
  static_cast<void>(cudaGetLastError()); // not to be found by the next launch
  return cudaGetErrorString(status);
}

}  // namespace fastseq::gpu

#endif
