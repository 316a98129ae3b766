// What went wrong, in words.

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace fastseq::gpu::host {

namespace {

// Threads that wait at the same line.
struct Queue {
  Wait wait;
  Where where;
  int threads;
  const Fiber* one;
};

void append_list(const char* format, va_list arguments) {
  const size_t used = std::strlen(machine.message);
  std::vsnprintf(machine.message + used, sizeof(machine.message) - used, format, arguments);
}

[[gnu::format(printf, 1, 2)]] void append(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  append_list(format, arguments);
  va_end(arguments);
}

void append_seed() {
  static const char* const schedules[] = {"anybody runs", "uneven", "the first runs", "the last runs"};
  static const char* const landings[] = {"at once", "late", "at any time"};
  append(" [FASTSEQ_HOST_SEED=%llu, launch %llu: %s, copies land %s]", static_cast<unsigned long long>(machine.seed),
         static_cast<unsigned long long>(machine.launches), schedules[static_cast<int>(machine.schedule)],
         landings[static_cast<int>(machine.landing)]);
}

void append_awaited(const Fiber& fiber) {
  if (fiber.wait == Wait::kFlag) {
    append(" (a flag is %u and has to reach %u)", *static_cast<const uint32_t*>(fiber.awaited), fiber.awaited_value);
  } else if (fiber.wait == Wait::kMbarrier) {
    const auto& barrier = *static_cast<const MbarrierRecord*>(fiber.awaited);
    append(" (phase %llu misses %d arrivals and %lld bytes)", static_cast<unsigned long long>(barrier.phase), barrier.pending,
           static_cast<long long>(barrier.bytes));
  }
}

}  // namespace

const char* name_of(Wait wait) {
  static const char* const names[] = {"nothing", "cta_sync",    "cluster_sync",  "warp_sync", "shuffle_xor",
                                      "mma",     "ldmatrix",    "mbarrier_wait", "flags_wait"};
  return names[static_cast<int>(wait)];
}

void report_deadlock() {
  constexpr int kMaxQueues = 12;
  Queue queues[kMaxQueues];
  int count = 0;
  for (int i = 0; i < warp_count() * 32; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.wait == Wait::kNone) continue;
    int q = 0;
    while (q < count && !(queues[q].wait == fiber.wait && queues[q].where.line() == fiber.where.line() &&
                          std::strcmp(queues[q].where.file_name(), fiber.where.file_name()) == 0)) {
      ++q;
    }
    if (q == kMaxQueues) continue;
    if (q == count) queues[count++] = {fiber.wait, fiber.where, 0, &fiber};
    ++queues[q].threads;
  }
  machine.message[0] = '\0';
  append("deadlock: ");
  for (int q = 0; q < count; ++q) {
    append("%s%d threads wait in %s at %s:%u", q ? "; " : "", queues[q].threads, name_of(queues[q].wait),
           queues[q].where.file_name(), static_cast<unsigned>(queues[q].where.line()));
    append_awaited(*queues[q].one);
  }
  if (machine.started < machine.cluster_count) {
    append("; %d of %d CTAs have not started, as may be: the launch is not cooperative",
           (machine.cluster_count - machine.started) * machine.how.cluster, machine.how.grid);
  }
  append_seed();
  machine.failed = true;
}

void report(Where where, const char* format, va_list arguments) {
  machine.message[0] = '\0';
  if (where.line()) append("%s:%u: ", where.file_name(), static_cast<unsigned>(where.line()));
  append_list(format, arguments);
  append(" (CTA %d, thread %d)", running->bid, running->tid);
  append_seed();
  machine.failed = true;
}

}  // namespace fastseq::gpu::host
