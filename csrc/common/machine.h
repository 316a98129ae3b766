// Plain types that kernels, their hosts and the host execution model share.
#pragma once

#include <cstdint>

#include "portable.h"

namespace fastseq::gpu {

// 16 bytes, moved as one
struct alignas(16) Vec16 {
  uint32_t word[4];
};

// 16-bit floating point numbers, by their bits
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// counts bytes that arrive in shared memory; only the functions on it know what it holds
struct alignas(8) Mbarrier {
  uint64_t state;
};

// a T in the shared memory of a CTA of the cluster: to be sent to, never dereferenced
template <class T>
struct Peer {
  uint32_t address;
};

struct Launch {
  int grid, block;
  int cluster;       // CTAs of a cluster; 1: none
  int smem;          // bytes of dynamic shared memory
  bool cooperative;  // all CTAs run at the same time
  void* stream;
};

// What Smem::take takes for a piece, so that a host can add up what a kernel needs.
constexpr int kPieceAlignment = 128;
template <class T>
constexpr FASTSEQ_HOST_DEVICE int piece_bytes(int count) {
  const int bytes = count * static_cast<int>(sizeof(T));
  return (bytes + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
}

}  // namespace fastseq::gpu
