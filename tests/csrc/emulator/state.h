// What the host execution knows of a launch. Lists are intrusive and memory is mapped before the threads start: malloc, memcpy
// and memset would be seen by ThreadSanitizer as accesses of the thread that happens to run.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>

#include "context.h"
#include "execution.h"
#include "sanitizers.h"

namespace fastseq::gpu::host {

constexpr int kMaxThreads = 16384;  // that run at a time
constexpr int kMaxCtas = kMaxThreads / 32;
constexpr int kMaxMbarriers = 64;     // of a CTA
constexpr int kMaxFlights = 1 << 20;  // st_async on their way
constexpr int kMaxCopies = 1 << 20;   // cp_async on their way
constexpr size_t kStackBytes = 256 << 10;

enum class Wait : uint8_t { kNone, kCtaSync, kClusterSync, kWarpSync, kShuffle, kMma, kLdmatrix, kMbarrier, kFlag };

struct Cta;
struct Warp;

// a cp_async that has not been waited for
struct Copy {
  void* to;
  const void* from;
  int group;
  bool landed;
  Copy* next;
  Where where;
};

struct Fiber : Place {
  Context context;
  void* tsan;
  void* fake_stack;
  unsigned char* stack;
  size_t stack_bytes;
  Warp* warp;
  Cta* cta;
  uint32_t bit;  // of its lane
  Wait wait;
  Where where;
  const void* awaited;     // the mbarrier or flag
  uint32_t awaited_value;  // parity or the flag's value
  Fiber* next_waiting;
  Copy* copies;     // newest first
  int groups;       // committed
  void* arguments;  // of a collective
};

// A barrier has two clocks in turns: an early arrival at the next one must not lend its order to a late leaver of this one.
struct Barrier {
  int arrived;
  uint32_t generation;
  uint64_t clock[2];
  Where where;  // the last to arrive
};

struct Warp {
  uint32_t all;  // lanes that exist
  uint32_t ready;
  uint32_t exited;
  uint32_t arrived;  // at the collective below
  uint32_t at_cta_sync;
  Wait collective;
  Where where;
  Where cta_sync_where;
  Barrier sync;
  Cta* cta;
  Fiber* fibers;
};

struct MbarrierRecord {
  Mbarrier* address;
  uint64_t phase;
  int pending;    // arrivals
  int64_t bytes;  // still to come; below zero when they came first
  uint64_t clock[2];
  Fiber* waiting;
};

struct Cluster {
  int live;  // CTAs
  int live_threads;
  Barrier sync;
};

struct Cta {
  int live;  // threads
  unsigned char* shared;
  Cluster* cluster;
  Warp* warps;
  Barrier sync;
  int mbarriers;
  MbarrierRecord mbarrier[kMaxMbarriers];
};

// an st_async on its way
struct Flight {
  unsigned char* to;
  Vec16 value;
  MbarrierRecord* barrier;
};

struct Machine {
  Launch how;
  void (*entry)(const void*);
  const void* call;

  uint64_t seed, launches, random;
  bool seeded;
  Schedule schedule;
  Landing landing;
  bool chosen;

  Fiber main;
  Fiber* fibers;
  Warp* warps;
  Cta* ctas;
  Cluster* clusters;
  int warps_per_cta, slots;               // slots: places for CTAs that run at a time
  uint64_t ready[kMaxThreads / 32 / 64];  // warps with a lane that can run

  int cluster_count, started, running, window;  // clusters: of the grid, begun, that run, that may run at a time
  int first_cluster, cluster_step;
  int free_head, free_count;  // a ring of places for clusters
  int* free_places;

  unsigned char* shared;
  size_t shared_bytes;   // mapped
  size_t shared_used;    // of it by one CTA; what follows shows who writes past the end
  size_t shared_stride;  // from CTA to CTA

  Flight* flights;
  int flight_count;
  Copy* copies;
  Copy* free_copies;
  int copy_count;
  Fiber* flag_waiters;

  // for Schedule::kUneven: who is favored or starved, and for how many more choices
  int uneven_begin, uneven_end;
  uint32_t uneven_lanes;
  bool favor;
  int uneven_left;

  uint64_t start_clock, end_clock;
  bool failed, dirty;
  char message[2048];
  Counters counters;
};

extern Machine machine;
extern Fiber* running;

inline int warp_count() { return machine.slots * machine.warps_per_cta; }
inline bool by_chance() { return machine.schedule == Schedule::kRandom || machine.schedule == Schedule::kUneven; }
inline bool runs(const Cta& cta) { return cta.live > 0; }

// choice.cpp

uint64_t random_bits();
// For a launch: what the seed says of it.
void choose_order();
// A thread that can run, which then counts as running; null: there is none.
Fiber* choose_fiber();

// report.cpp

const char* name_of(Wait wait);
void report(Where where, const char* format, va_list arguments);
void report_deadlock();

// scheduler.cpp

// What a fiber runs.
void thread_main();
// The running thread gives way to another, for good when it has ended.
void resume(Fiber& next, bool for_good = false);
// Who runs next; the launch itself when all threads have ended or none can go on.
Fiber& next_fiber();
// Ends the launch with a message that begins with the kernel's line.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Where where, const char* format, ...);
// Until somebody wakes the running thread.
void block(Wait wait, Where where);
void wake(Fiber& fiber);
void wake(Warp& warp, uint32_t lanes);
// Where another thread may run though this one could go on, and where copies may land.
void step();

// primitives.cpp: asynchronous copies arrive

void land_flight(int index);
void land_copy(Copy& copy);

// launch.cpp: 0xff everywhere, and 16 bytes moved, by loops that no compiler turns into memset or memcpy

void fill(void* p, size_t bytes);
void move16(void* to, const void* from);

// fragments.cpp

struct MmaArguments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
// For a whole warp.
void multiply_fragments(Product product, MmaArguments* const* lanes);

// Wavefronts beyond one that reading these rows of 16 bytes takes.
int conflicts(const unsigned char* const (&rows)[8]);

}  // namespace fastseq::gpu::host
