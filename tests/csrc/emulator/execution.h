// Runs CUDA kernels on the host: each CUDA thread is a fiber, all of them on one OS thread. A seed chooses who runs when and when
// asynchronous copies land, so that a run can be had again. prims_host.h calls what stands here; tests read the counters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "common/machine.h"

namespace fastseq::gpu::host {

using Where = std::source_location;

// Who runs when threads could run: anybody; a CTA, warp or thread is starved or favored for a while; always the first; always
// the last.
enum class Schedule { kRandom, kUneven, kFirst, kLast };
// When asynchronous copies arrive: when they are issued; when somebody waits for them and nobody else can run; at any time, in
// any order.
enum class Landing { kAtOnce, kLate, kRandom };

struct Counters {
  uint64_t st_async, st_async_bytes;
  uint64_t cp_async, cp_async_bytes;
  uint64_t flags_published, flags_waited;
  uint64_t cta_syncs, cluster_syncs;  // whole barriers, not threads
  uint64_t mma, ldmatrix;             // by warps
  uint64_t bank_conflicts;            // more wavefronts than ldmatrix needs
  uint64_t switches;                  // from one thread to another: equal in equal runs
};

// Before a launch. Without it the seed is FASTSEQ_HOST_SEED, or 0. The two orders follow from the seed: the first twelve have
// every pair of them, those after leave out the two fixed schedules.
void seed(uint64_t value);
void choose(Schedule schedule, Landing landing);

Counters counters();
void reset_counters();

// what prims_host.h is made of; Where is the kernel's line

struct Place {
  int tid, nthreads, bid, cta_rank;
};
extern const Place* place;  // the running thread's

void* take(int offset, int piece, int bytes, int taken, Where where);
void cta_sync(Where where);
void warp_sync(Where where);
void cluster_sync(Where where);
void mbarrier_init(Mbarrier* barriers, int count, uint32_t bytes, Where where);
void mbarrier_expect(Mbarrier* barrier, uint32_t bytes, Where where);
void mbarrier_wait(Mbarrier* barrier, uint32_t parity, Where where);
uint32_t peer(void* own, int rank, Where where);
void st_async(uint32_t to, Vec16 v, uint32_t barrier, Where where);
void cp_async16(void* shared, const void* global, Where where);
void cp_commit();
void cp_wait(int pending);
void flag_publish(uint32_t* flag, uint32_t value, Where where);
void flag_wait(const uint32_t* flag, uint32_t value, Where where);
float shuffle_xor(float value, int mask, Where where);
enum class Product { kHalf, kBfloat16, kTf32 };
void mma(Product product, float* d, const uint32_t* a, const uint32_t* b, Where where);
void ldmatrix(int matrices, uint32_t* r, const void* row, Where where);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

// Returns "" or what went wrong, in words that stay until the next launch.
const char* launch(const Launch& how, void (*entry)(const void*), const void* call);

}  // namespace fastseq::gpu::host

// the same for ctypes
extern "C" {
void fastseq_host_seed(uint64_t value);
void fastseq_host_counters(fastseq::gpu::host::Counters* out);
void fastseq_host_reset_counters();
}
