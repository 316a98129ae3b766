// The machine's words: what each thread does, checks and waits for.

#include <bit>

#include "state.h"

namespace fastseq::gpu::host {

namespace {

constexpr int kAcquire = 2, kRelease = 3;  // of __tsan_atomic32_*
constexpr uint64_t kMagic = 0x6d626172'00000000;

// A peer's address: its rank in the cluster, plus one, above the offset in shared memory.
constexpr int kRankShift = 24;

bool inside(const Cta& cta, const void* p, size_t bytes) {
  const auto* q = static_cast<const unsigned char*>(p);
  return q >= cta.shared && q + bytes <= cta.shared + machine.shared_used;
}

bool shared_anywhere(const void* p) {
  const auto* q = static_cast<const unsigned char*>(p);
  return q >= machine.shared && q < machine.shared + machine.shared_bytes;
}

bool same_line(Where a, Where b) { return a.line() == b.line() && a.column() == b.column(); }

// True in the last of `expected` threads.
bool arrive(Barrier& barrier, int expected, Where where) {
  barrier.where = where;
  release(&barrier.clock[barrier.generation & 1]);
  if (++barrier.arrived < expected) return false;
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}

// Of all lanes of a warp; the last to arrive does the work for all.
template <class Perform>
void collective(Wait what, Where where, void* arguments, Perform perform) {
  Fiber& self = *running;
  Warp& warp = *self.warp;
  if (warp.exited) fail(where, "%s, but lanes %08x of the warp have ended", name_of(what), warp.exited);
  if (what != Wait::kWarpSync && warp.all != ~0u)
    fail(where, "%s by a warp of only %d lanes", name_of(what), std::popcount(warp.all));
  if (!warp.arrived) {
    warp.collective = what;
    warp.where = where;
  } else if (what != warp.collective || !same_line(where, warp.where)) {
    fail(where, "%s, while other lanes of the warp are in %s at line %u", name_of(what), name_of(warp.collective),
         static_cast<unsigned>(warp.where.line()));
  }
  self.arguments = arguments;
  warp.arrived |= self.bit;
  if (warp.arrived != warp.all) {
    block(what, where);
    return;
  }
  perform(warp);
  warp.arrived = 0;
  wake(warp, warp.all & ~self.bit);
}

MbarrierRecord& record_of(Cta& cta, Mbarrier* barrier, Where where) {
  if (!inside(cta, barrier, sizeof(Mbarrier)) || reinterpret_cast<uintptr_t>(barrier) % 8)
    fail(where, "no place for an mbarrier");
  const uint64_t index = barrier->state - kMagic;
  if (index >= static_cast<uint64_t>(cta.mbarriers) || cta.mbarrier[index].address != barrier) {
    fail(where, "not an mbarrier: never initialized, or overwritten");
  }
  return cta.mbarrier[index];
}

void complete_phase(MbarrierRecord& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = 1;
  while (Fiber* fiber = barrier.waiting) {
    barrier.waiting = fiber->next_waiting;
    wake(*fiber);
  }
}

void expect(MbarrierRecord& barrier, uint32_t bytes, Where where) {
  if (!barrier.pending) fail(where, "a second arrival in one phase of an mbarrier");
  release(&barrier.clock[barrier.phase & 1]);
  barrier.pending = 0;
  barrier.bytes += bytes;
  complete_phase(barrier);
}

Cta& peer_of(uint32_t address, Where where) {
  const int rank = static_cast<int>(address >> kRankShift) - 1;
  if (rank < 0 || rank >= machine.how.cluster) fail(where, "address %08x is in no CTA of the cluster", address);
  Cta& cta = running->cta[rank - running->cta_rank];
  if (!runs(cta)) fail(where, "sends to CTA %d of the cluster, which has ended", rank);
  return cta;
}

unsigned char* pointer_of(const Cta& cta, uint32_t address) { return cta.shared + (address & ((1u << kRankShift) - 1)); }

uint32_t flag_value(const uint32_t* flag) {
  return tsan() ? __tsan_atomic32_load(flag, kAcquire) : __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

bool reached(uint32_t seen, uint32_t value) { return static_cast<int32_t>(seen - value) >= 0; }

}  // namespace

void cta_sync(Where where) {
  Fiber& self = *running;
  Warp& warp = *self.warp;
  Cta& cta = *self.cta;
  if (cta.live < machine.how.block) fail(where, "cta_sync, but %d threads of the CTA have ended", machine.how.block - cta.live);
  if (warp.arrived) fail(where, "cta_sync, while other lanes of the warp are in %s", name_of(warp.collective));
  if (warp.at_cta_sync && !same_line(where, warp.cta_sync_where)) {
    fail(where, "cta_sync, while other lanes of the warp are in the one at line %u",
         static_cast<unsigned>(warp.cta_sync_where.line()));
  }
  warp.cta_sync_where = where;
  warp.at_cta_sync |= self.bit;
  step();
  const uint32_t generation = cta.sync.generation;
  if (arrive(cta.sync, machine.how.block, where)) {
    ++machine.counters.cta_syncs;
    for (int w = 0; w < machine.warps_per_cta; ++w) {
      Warp& other = cta.warps[w];
      other.at_cta_sync = 0;
      wake(other, &other == &warp ? other.all & ~self.bit : other.all);
    }
  } else {
    block(Wait::kCtaSync, where);
  }
  acquire(&cta.sync.clock[generation & 1]);
}

void cluster_sync(Where where) {
  Fiber& self = *running;
  Cluster& cluster = *self.cta->cluster;
  const int threads = machine.how.cluster * machine.how.block;
  if (cluster.live_threads < threads)
    fail(where, "cluster_sync, but %d threads of the cluster have ended", threads - cluster.live_threads);
  step();
  const uint32_t generation = cluster.sync.generation;
  if (arrive(cluster.sync, threads, where)) {
    ++machine.counters.cluster_syncs;
    Cta* first = self.cta - self.cta_rank;
    for (int w = 0; w < machine.how.cluster * machine.warps_per_cta; ++w) {
      Warp& other = first->warps[w];
      wake(other, &other == self.warp ? other.all & ~self.bit : other.all);
    }
  } else {
    block(Wait::kClusterSync, where);
  }
  acquire(&cluster.sync.clock[generation & 1]);
}

void warp_sync(Where where) {
  Warp& warp = *running->warp;
  const uint32_t generation = warp.sync.generation;
  release(&warp.sync.clock[generation & 1]);
  collective(Wait::kWarpSync, where, nullptr, [](Warp& warp) { ++warp.sync.generation; });
  acquire(&warp.sync.clock[generation & 1]);
}

float shuffle_xor(float value, int mask, Where where) {
  struct Arguments {
    float value, result;
    int mask;
  } own{value, 0, mask};
  collective(Wait::kShuffle, where, &own, [](Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Arguments*>(warp.fibers[lane].arguments);
      to->result = static_cast<Arguments*>(warp.fibers[(lane ^ to->mask) & 31].arguments)->value;
    }
  });
  return own.result;
}

void mma(Product product, float* d, const uint32_t* a, const uint32_t* b, Where where) {
  MmaArguments own{d, a, b};
  collective(Wait::kMma, where, &own, [product](Warp& warp) {
    ++machine.counters.mma;
    MmaArguments* lanes[32];
    for (int lane = 0; lane < 32; ++lane) lanes[lane] = static_cast<MmaArguments*>(warp.fibers[lane].arguments);
    multiply_fragments(product, lanes);
  });
}

void ldmatrix(int matrices, uint32_t* r, const void* row, Where where) {
  struct Arguments {
    int matrices;
    uint32_t* r;
    const unsigned char* row;
  } own{matrices, r, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(where, "ldmatrix from a row that is not aligned to 16 bytes");
  if (!inside(*running->cta, row, 16) || poisoned(row, 16)) {
    fail(where, "ldmatrix reads outside of every piece of the CTA's shared memory");
  }
  if ((running->tid & 31) < 8 * matrices) reads(row, 16);
  collective(Wait::kLdmatrix, where, &own, [](Warp& warp) {
    ++machine.counters.ldmatrix;
    for (int matrix = 0; matrix < static_cast<Arguments*>(warp.fibers[0].arguments)->matrices; ++matrix) {
      const unsigned char* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = static_cast<Arguments*>(warp.fibers[8 * matrix + i].arguments)->row;
      for (int lane = 0; lane < 32; ++lane) {
        auto* to = static_cast<Arguments*>(warp.fibers[lane].arguments);
        to->r[matrix] = *reinterpret_cast<const volatile uint32_t*>(rows[lane / 4] + lane % 4 * 4);
      }
      machine.counters.bank_conflicts += conflicts(rows);
    }
  });
}

void mbarrier_init(Mbarrier* barriers, int count, uint32_t bytes, Where where) {
  if (running->tid) return;
  Cta& cta = *running->cta;
  for (int i = 0; i < count; ++i) {
    Mbarrier* barrier = barriers + i;
    if (!inside(cta, barrier, sizeof(Mbarrier)) || reinterpret_cast<uintptr_t>(barrier) % 8)
      fail(where, "no place for an mbarrier");
    if (poisoned(barrier, sizeof(Mbarrier))) fail(where, "an mbarrier outside of every piece of shared memory");
    const uint64_t index = barrier->state - kMagic;
    if (index < static_cast<uint64_t>(cta.mbarriers)) fail(where, "an mbarrier initialized twice");
    if (cta.mbarriers == kMaxMbarriers) fail(where, "more than %d mbarriers in a CTA", kMaxMbarriers);
    writes(barrier, sizeof(Mbarrier));
    barrier->state = kMagic + cta.mbarriers;
    cta.mbarrier[cta.mbarriers] = {barrier, 0, 1, 0, {}, nullptr};
    expect(cta.mbarrier[cta.mbarriers++], bytes, where);
  }
}

void mbarrier_expect(Mbarrier* barrier, uint32_t bytes, Where where) {
  step();
  MbarrierRecord& own = record_of(*running->cta, barrier, where);
  reads(barrier, sizeof(Mbarrier));
  expect(own, bytes, where);
}

void mbarrier_wait(Mbarrier* barrier, uint32_t parity, Where where) {
  step();
  if (parity > 1) fail(where, "parity %u, accepted is 0 or 1", parity);
  Fiber& self = *running;
  MbarrierRecord& own = record_of(*self.cta, barrier, where);
  reads(barrier, sizeof(Mbarrier));
  const uint64_t phase = own.phase;
  if ((phase & 1) == parity) {
    self.awaited = &own;
    self.awaited_value = parity;
    self.next_waiting = own.waiting;
    own.waiting = &self;
    block(Wait::kMbarrier, where);
    if (own.phase != phase + 1) fail(where, "the mbarrier went through two phases while the thread waited for one: it may hang");
  }
  acquire(&own.clock[parity]);
}

uint32_t peer(void* own, int rank, Where where) {
  const Cta& cta = *running->cta;
  if (!inside(cta, own, 1)) fail(where, "peer of an address outside the CTA's shared memory");
  if (rank < 0 || rank >= machine.how.cluster) fail(where, "peer %d in a cluster of %d", rank, machine.how.cluster);
  return static_cast<uint32_t>(rank + 1) << kRankShift | static_cast<uint32_t>(static_cast<unsigned char*>(own) - cta.shared);
}

// ThreadSanitizer is told that the sender writes, and that all it did before is over for who sees the phase complete. The latter
// is more than PTX promises, of the sent bytes alone.
void st_async(uint32_t to, Vec16 v, uint32_t barrier, Where where) {
  step();
  Cta& cta = peer_of(to, where);
  if (&cta != &peer_of(barrier, where)) fail(where, "st_async to one CTA counts on an mbarrier of another");
  unsigned char* target = pointer_of(cta, to);
  if (reinterpret_cast<uintptr_t>(target) % 16) fail(where, "st_async to an address that is not aligned to 16 bytes");
  if (!inside(cta, target, 16) || poisoned(target, 16)) {
    fail(where, "st_async writes outside of every piece of the peer's shared memory");
  }
  auto* count = reinterpret_cast<Mbarrier*>(pointer_of(cta, barrier));
  MbarrierRecord& record = record_of(cta, count, where);
  reads(count, sizeof(Mbarrier));
  writes(target, 16);
  release(&record.clock[record.phase & 1]);
  fill(target, 16);
  if (machine.flight_count == kMaxFlights) fail(where, "too many st_async on their way");
  machine.flights[machine.flight_count++] = {target, v, &record};
  ++machine.counters.st_async;
  machine.counters.st_async_bytes += 16;
  if (machine.landing == Landing::kAtOnce) land_flight(machine.flight_count - 1);
}

void land_flight(int index) {
  const Flight flight = machine.flights[index];
  machine.flights[index] = machine.flights[--machine.flight_count];
  move16(flight.to, &flight.value);
  flight.barrier->bytes -= 16;
  complete_phase(*flight.barrier);
}

// ThreadSanitizer is told that the issuer reads and writes, here and when the copy lands: whoever has no order with one of them
// races.
void cp_async16(void* shared, const void* global, Where where) {
  step();
  Fiber& self = *running;
  const Cta& cta = *self.cta;
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    fail(where, "cp_async16 between addresses that are not aligned to 16 bytes");
  }
  auto* to = static_cast<unsigned char*>(shared);
  if (!inside(cta, to, 16) || poisoned(to, 16)) {
    fail(where, "cp_async16 writes outside of every piece of the CTA's shared memory");
  }
  if (shared_anywhere(global)) fail(where, "cp_async16 from shared memory");
  if (poisoned(global, 16)) fail(where, "cp_async16 reads outside of an array in global memory");
  reads(global, 16);
  writes(shared, 16);
  fill(shared, 16);
  Copy* copy = machine.free_copies;
  if (copy) {
    machine.free_copies = copy->next;
  } else {
    if (machine.copy_count == kMaxCopies) fail(where, "too many cp_async16 on their way");
    copy = machine.copies + machine.copy_count++;
  }
  *copy = {shared, global, self.groups, false, self.copies, where};
  self.copies = copy;
  ++machine.counters.cp_async;
  machine.counters.cp_async_bytes += 16;
  if (machine.landing == Landing::kAtOnce) land_copy(*copy);
}

void land_copy(Copy& copy) {
  if (!copy.landed) move16(copy.to, copy.from);
  copy.landed = true;
}

void cp_commit() { ++running->groups; }

void cp_wait(int pending) {
  step();
  Fiber& self = *running;
  for (Copy** link = &self.copies; *link;) {
    Copy* copy = *link;
    if (copy->group + pending >= self.groups) {
      link = &copy->next;
      continue;
    }
    land_copy(*copy);
    reads(copy->from, 16);
    writes(copy->to, 16);
    *link = copy->next;
    copy->next = machine.free_copies;
    machine.free_copies = copy;
  }
}

void flag_publish(uint32_t* flag, uint32_t value, Where where) {
  step();
  if (reinterpret_cast<uintptr_t>(flag) % 4 || poisoned(flag, 4)) fail(where, "no place for a flag");
  ++machine.counters.flags_published;
  if (tsan()) {
    __tsan_atomic32_store(flag, value, kRelease);
  } else {
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  }
  for (Fiber** link = &machine.flag_waiters; *link;) {
    Fiber* fiber = *link;
    if (fiber->awaited == flag && reached(value, fiber->awaited_value)) {
      *link = fiber->next_waiting;
      wake(*fiber);
    } else {
      link = &fiber->next_waiting;
    }
  }
}

void flag_wait(const uint32_t* flag, uint32_t value, Where where) {
  step();
  if (reinterpret_cast<uintptr_t>(flag) % 4 || poisoned(flag, 4)) fail(where, "no place for a flag");
  ++machine.counters.flags_waited;
  Fiber& self = *running;
  while (!reached(flag_value(flag), value)) {
    self.awaited = flag;
    self.awaited_value = value;
    self.next_waiting = machine.flag_waiters;
    machine.flag_waiters = &self;
    block(Wait::kFlag, where);
  }
}

}  // namespace fastseq::gpu::host
