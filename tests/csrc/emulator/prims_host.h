// The words of common/prims.cuh on the host; what they mean stands there.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/machine.h"
#include "execution.h"

#define FASTSEQ_KERNEL(threads) void
#define FASTSEQ_PARAMETERS const
#define FASTSEQ_DEVICE inline
#define FASTSEQ_UNROLL
#define FASTSEQ_ROLLED

namespace fastseq::gpu {

using host::Where;

constexpr bool kHasClusters = true;

inline int tid() { return host::place->tid; }
inline int lane() { return host::place->tid & 31; }
inline int warp() { return host::place->tid >> 5; }
inline int nthreads() { return host::place->nthreads; }
inline int bid() { return host::place->bid; }
inline int cta_rank() { return host::place->cta_rank; }

class Smem {
 public:
  template <class T>
  T* take(int count, Where where = Where::current()) {
    static_assert(alignof(T) <= kPieceAlignment);
    void* piece = host::take(used_, pieces_++, count * static_cast<int>(sizeof(T)), piece_bytes<T>(count), where);
    used_ += piece_bytes<T>(count);
    return static_cast<T*>(piece);
  }

 private:
  int used_ = 0;
  int pieces_ = 0;
};

inline void cta_sync(Where where = Where::current()) { host::cta_sync(where); }
inline void warp_sync(Where where = Where::current()) { host::warp_sync(where); }
inline void cluster_sync(Where where = Where::current()) { host::cluster_sync(where); }
inline float shuffle_xor(float value, int mask, Where where = Where::current()) { return host::shuffle_xor(value, mask, where); }

inline void mbarrier_init(Mbarrier* barriers, int count, uint32_t bytes, Where where = Where::current()) {
  host::mbarrier_init(barriers, count, bytes, where);
}
inline void mbarrier_expect(Mbarrier* barrier, uint32_t bytes, Where where = Where::current()) {
  host::mbarrier_expect(barrier, bytes, where);
}
inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity, Where where = Where::current()) {
  host::mbarrier_wait(barrier, parity, where);
}

template <class T>
Peer<T> peer(T* own, int rank, Where where = Where::current()) {
  return {host::peer(own, rank, where)};
}
template <class T>
Peer<T> operator+(Peer<T> p, int count) {
  return {p.address + count * static_cast<uint32_t>(sizeof(T))};
}
inline void st_async(Peer<Vec16> to, Vec16 v, Peer<Mbarrier> barrier, Where where = Where::current()) {
  host::st_async(to.address, v, barrier.address, where);
}

inline void cp_async16(void* shared, const void* global, Where where = Where::current()) {
  host::cp_async16(shared, global, where);
}
inline void cp_commit() { host::cp_commit(); }
template <int kPending>
void cp_wait() {
  host::cp_wait(kPending);
}

inline void flag_publish(uint32_t* flag, uint32_t value, Where where = Where::current()) {
  warp_sync(where);
  if (lane() == 0) host::flag_publish(flag, value, where);
}
inline void flags_wait(const uint32_t* flags, int count, uint32_t value, Where where = Where::current()) {
  for (int i = lane(); i < count; i += 32) host::flag_wait(flags + i, value, where);
  warp_sync(where);
}

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return host::half_to_float(x.bits); }
inline float to_float(Bfloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Half from_float<Half>(float x) {
  return {host::float_to_half(x)};
}
template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
  return {host::float_to_bfloat16(x)};
}

// Ties away from zero, as cvt.rna does.
inline uint32_t to_tf32(float x) {
  if (std::isnan(x)) return 0x7fffffff;
  return (as_bits(x) + 0x1000) & 0xffffe000;
}

inline float exp_exact(float x) { return std::exp(x); }
inline float tanh_exact(float x) { return std::tanh(x); }
inline float divide_exact(float a, float b) { return a / b; }

inline float exp_fast(float x) { return std::exp(x); }
// Nothing is divided by more than 2^126: so does div.approx.
inline float divide_fast(float a, float b) {
  if (std::fabs(b) > 0x1p126f && std::isfinite(b))
    return std::isinf(a) ? std::numeric_limits<float>::quiet_NaN() : std::copysign(0.0f, a);
  return a / b;
}

inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half, Where where = Where::current()) {
  host::mma(host::Product::kHalf, d, a, b, where);
}
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bfloat16, Where where = Where::current()) {
  host::mma(host::Product::kBfloat16, d, a, b, where);
}
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current()) {
  host::mma(host::Product::kTf32, d, a, b, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, Where where = Where::current()) { host::ldmatrix(2, r, row, where); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Where where = Where::current()) { host::ldmatrix(4, r, row, where); }

template <class Params>
const char* launch(void (*kernel)(Params), const Launch& how, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  };
  const Call call{kernel, &params};
  return host::launch(
      how,
      [](const void* p) {
        const Call& call = *static_cast<const Call*>(p);
        call.kernel(*call.params);
      },
      &call);
}

}  // namespace fastseq::gpu
