#include <sched.h>

#include "recurrent_kernel.h"

namespace fastseq::cpu {

void Barrier::wait(int64_t weight) {
  const int64_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(weight, std::memory_order_acq_rel) + weight == total_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  // a step takes microseconds, so spin; but give the core away if more threads run than there are cores
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins > 4096) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

}  // namespace fastseq::cpu
