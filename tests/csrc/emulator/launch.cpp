// Launches: memory for threads and CTAs, and who starts when.

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "state.h"

namespace fastseq::gpu::host {

Machine machine;
Fiber* running = nullptr;
const Place* place = nullptr;

namespace {

constexpr int kRedZone = kPieceAlignment;
constexpr int kMaxPieces = 64;
constexpr int kGuardBytes = 1024;
constexpr size_t kPage = 4096;

// By the system call, for ThreadSanitizer takes mmap itself for a write of the running thread to all of the memory.
void* map(void* at, size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  const long p = syscall(SYS_mmap, at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0L);
  if (p == -1) {
    std::perror("fastseq: the host execution has no memory");
    std::abort();
  }
  return reinterpret_cast<void*>(p);
}

template <class T>
T* reserve(size_t count) {
  return static_cast<T*>(map(nullptr, count * sizeof(T)));
}

// ThreadSanitizer forgets who used memory that is unmapped.
void renew(unsigned char* shared) {
  if (!tsan()) return;
  munmap(shared, machine.shared_stride);
  map(shared, machine.shared_stride);
}

void start_cta(int slot, int bid, int rank, Cluster& cluster, bool again) {
  Cta& cta = machine.ctas[slot];
  cta.live = machine.how.block;
  cta.shared = machine.shared + slot * machine.shared_stride;
  cta.cluster = &cluster;
  cta.warps = machine.warps + slot * machine.warps_per_cta;
  cta.sync = {};
  cta.mbarriers = 0;
  if (again) renew(cta.shared);
  fill(cta.shared, machine.shared_stride);
  if (asan()) __asan_poison_memory_region(cta.shared, machine.shared_stride);
  for (int w = 0; w < machine.warps_per_cta; ++w) {
    const int lanes = machine.how.block - 32 * w;
    Warp& warp = cta.warps[w];
    Fiber* fibers = machine.fibers + (slot * machine.warps_per_cta + w) * 32;
    warp = {};
    warp.all = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    warp.cta = &cta;
    warp.fibers = fibers;
    for (int lane = 0; lane < 32 && lane < lanes; ++lane) {
      Fiber& fiber = fibers[lane];
      static_cast<Place&>(fiber) = {32 * w + lane, machine.how.block, bid, rank};
      fiber.warp = &warp;
      fiber.cta = &cta;
      fiber.bit = 1u << lane;
      fiber.wait = Wait::kNone;
      fiber.where = {};
      fiber.fake_stack = nullptr;
      fiber.copies = nullptr;
      fiber.groups = 0;
      // Stacks that all begin at the same offset from a page would share a few cache sets.
      const size_t offset = (static_cast<size_t>(lane) * 17 % 64) * 64;
      context_make(fiber.context, fiber.stack, fiber.stack_bytes - offset, thread_main);
    }
    wake(warp, warp.all);
  }
}

void start_clusters() {
  const int size = machine.how.cluster;
  const int places = machine.slots / size;
  while (machine.running < machine.window && machine.started < machine.cluster_count && machine.free_count) {
    const bool again = machine.started >= places;
    const int64_t turn = static_cast<int64_t>(machine.started++) * machine.cluster_step + machine.first_cluster;
    const int index = static_cast<int>(turn % machine.cluster_count);
    const int free = machine.free_places[machine.free_head];
    machine.free_head = (machine.free_head + 1) % places;
    --machine.free_count;
    ++machine.running;
    Cluster& cluster = machine.clusters[free];
    cluster = {};
    cluster.live = size;
    cluster.live_threads = size * machine.how.block;
    for (int rank = 0; rank < size; ++rank) start_cta(free * size + rank, index * size + rank, rank, cluster, again);
  }
}

const char* refuse(const char* what, long long given, const char* accepted) {
  std::snprintf(machine.message, sizeof(machine.message), "%s is %lld, accepted is %s", what, given, accepted);
  return machine.message;
}

const char* refusal(const Launch& how) {
  if (running) return "a kernel cannot launch a kernel";
  if (how.block < 1 || how.block > 1024) return refuse("block", how.block, "1 to 1024");
  if (how.cluster < 1 || how.cluster > 16) return refuse("cluster", how.cluster, "1 to 16");
  if (how.grid < 1 || how.grid % how.cluster) return refuse("grid", how.grid, "a multiple of the cluster");
  if (how.smem < 0 || how.smem > 232448) return refuse("smem", how.smem, "0 to 232448");
  const long long threads = static_cast<long long>(how.cooperative ? how.grid : how.cluster) * ((how.block + 31) / 32 * 32);
  if (threads > kMaxThreads) return refuse("the number of threads at a time", threads, "at most 16384 on the host");
  return nullptr;
}

void map_once() {
  if (machine.fibers) return;
  machine.fibers = reserve<Fiber>(kMaxThreads);
  machine.warps = reserve<Warp>(kMaxThreads / 32);
  machine.ctas = reserve<Cta>(kMaxCtas);
  machine.clusters = reserve<Cluster>(kMaxCtas);
  machine.free_places = reserve<int>(kMaxCtas);
  machine.flights = reserve<Flight>(kMaxFlights);
  machine.copies = reserve<Copy>(kMaxCopies);
  auto* stacks = reserve<unsigned char>(kMaxThreads * kStackBytes);
  for (int i = 0; i < kMaxThreads; ++i) {
    machine.fibers[i].stack = stacks + i * kStackBytes + kPage;
    machine.fibers[i].stack_bytes = kStackBytes - kPage;
  }
}

// The page below a stack is closed once, when the stack is first used.
void prepare_fibers() {
  static int closed = 0;
  const int count = warp_count() * 32;
  for (; closed < count; ++closed) mprotect(machine.fibers[closed].stack - kPage, kPage, PROT_NONE);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.wait = Wait::kNone;
    if (tsan() && !fiber.tsan) fiber.tsan = __tsan_create_fiber(0);
    if (asan() && machine.dirty) __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
  }
  if (!tsan() && !asan()) return;
  if (tsan()) machine.main.tsan = __tsan_get_current_fiber();
  pthread_attr_t attributes;
  void* bottom = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &bytes);
  pthread_attr_destroy(&attributes);
  machine.main.stack = static_cast<unsigned char*>(bottom);
  machine.main.stack_bytes = bytes;
}

void map_shared() {
  if (machine.shared) munmap(machine.shared, machine.shared_bytes);
  const size_t zones = asan() ? kRedZone * kMaxPieces : 0;
  machine.shared_used = machine.how.smem + zones;
  machine.shared_stride = (machine.shared_used + kGuardBytes + kPage - 1) / kPage * kPage;
  machine.shared_bytes = machine.shared_stride * machine.slots;
  machine.shared = reserve<unsigned char>(machine.shared_bytes);
}

// Threads that a failure left where they were: their order counts as finished, their stacks as free.
void abandon() {
  machine.dirty = true;
  if (!tsan()) return;
  for (int i = 0; i < warp_count() * 32; ++i) {
    Fiber& fiber = machine.fibers[i];
    __tsan_switch_to_fiber(fiber.tsan, 1);
    release(&machine.end_clock);
    __tsan_switch_to_fiber(machine.main.tsan, 1);
    __tsan_destroy_fiber(fiber.tsan);
    fiber.tsan = nullptr;
  }
}

}  // namespace

void fill(void* p, size_t bytes) {
  auto* q = static_cast<volatile uint64_t*>(p);
  for (size_t i = 0; i < bytes / 8; ++i) q[i] = ~uint64_t{0};
}

void move16(void* to, const void* from) {
  const auto* source = static_cast<const volatile uint64_t*>(from);
  auto* target = static_cast<volatile uint64_t*>(to);
  const uint64_t low = source[0], high = source[1];
  target[0] = low;
  target[1] = high;
}

// In a build for AddressSanitizer pieces lie further apart, and what lies between them is nobody's.
void* take(int offset, int piece, int bytes, int taken, Where where) {
  if (bytes < 0 || offset + taken > machine.how.smem) {
    fail(where, "the kernel takes %d bytes of shared memory, launched with %d", offset + taken, machine.how.smem);
  }
  unsigned char* p = running->cta->shared + offset;
  if (asan()) {
    if (piece >= kMaxPieces) fail(where, "more than %d pieces of shared memory", kMaxPieces);
    p += piece * kRedZone;
    __asan_unpoison_memory_region(p, bytes);
  }
  return p;
}

void seed(uint64_t value) {
  machine.seed = value;
  machine.seeded = true;
  machine.chosen = false;
  machine.launches = 0;
}

void choose(Schedule schedule, Landing landing) {
  machine.schedule = schedule;
  machine.landing = landing;
  machine.chosen = true;
}

Counters counters() { return machine.counters; }
void reset_counters() { machine.counters = {}; }

const char* launch(const Launch& how, void (*entry)(const void*), const void* call) {
  if (const char* reason = refusal(how)) return reason;
  map_once();
  machine.how = how;
  machine.entry = entry;
  machine.call = call;
  machine.failed = false;
  machine.warps_per_cta = (how.block + 31) / 32;
  machine.cluster_count = how.grid / how.cluster;
  const int at_a_time = std::max(how.cluster, (tsan() ? 512 : 4096) / (32 * machine.warps_per_cta) / how.cluster * how.cluster);
  machine.slots = how.cooperative ? how.grid : std::min(how.grid, at_a_time);
  machine.started = machine.running = 0;
  machine.flight_count = machine.copy_count = 0;
  machine.free_copies = nullptr;
  machine.flag_waiters = nullptr;
  machine.free_head = 0;
  machine.free_count = machine.slots / how.cluster;
  for (int i = 0; i < machine.free_count; ++i) machine.free_places[i] = i;
  for (uint64_t& word : machine.ready) word = 0;
  choose_order();
  map_shared();
  prepare_fibers();
  machine.dirty = false;
  release(&machine.start_clock);
  running = &machine.main;
  do {
    start_clusters();
    resume(next_fiber());
  } while (!machine.failed && (machine.running || machine.started < machine.cluster_count));
  running = nullptr;
  place = nullptr;
  acquire(&machine.end_clock);
  if (asan()) __asan_unpoison_memory_region(machine.shared, machine.shared_bytes);
  if (!machine.failed) return "";
  abandon();
  acquire(&machine.end_clock);
  return machine.message;
}

}  // namespace fastseq::gpu::host

using namespace fastseq::gpu;

extern "C" {

void fastseq_host_seed(uint64_t value) { host::seed(value); }
void fastseq_host_counters(host::Counters* out) { *out = host::counters(); }
void fastseq_host_reset_counters() { host::reset_counters(); }

// Fibers end where the scheduler stops, and a fake stack for each of them would be slow.
const char* __asan_default_options() { return "detect_leaks=0:detect_stack_use_after_return=0"; }
const char* __tsan_default_options() { return "halt_on_error=1:report_thread_leaks=0"; }
}
