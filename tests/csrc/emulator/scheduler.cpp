// Threads as fibers: how one gives way to another, waits, is woken and ends.

#include <cstdarg>
#include <cstdlib>

#include "state.h"

namespace fastseq::gpu::host {

namespace {

void check_guard(const Cta& cta, Where where) {
  for (size_t i = machine.shared_used; i < machine.shared_stride; ++i) {
    if (cta.shared[i] != 0xff)
      fail(where, "the CTA wrote past its shared memory, %zu bytes from its end", i - machine.shared_used);
  }
}

[[noreturn]] void end_thread() {
  Fiber& self = *running;
  Warp& warp = *self.warp;
  Cta& cta = *self.cta;
  Cluster& cluster = *cta.cluster;
  if (self.copies) fail(self.copies->where, "the thread ends without having waited for this cp_async16");
  if (warp.arrived) fail(warp.where, "others of the warp wait in %s while this lane ends", name_of(warp.collective));
  if (cta.sync.arrived) fail(cta.sync.where, "%d threads of the CTA wait in cta_sync while this one ends", cta.sync.arrived);
  if (cluster.sync.arrived) {
    fail(cluster.sync.where, "%d threads of the cluster wait in cluster_sync while this one ends", cluster.sync.arrived);
  }
  warp.exited |= self.bit;
  --cluster.live_threads;
  if (--cta.live == 0) {
    check_guard(cta, self.where);
    for (int i = 0; i < machine.flight_count; ++i) {
      if (machine.flights[i].to >= cta.shared && machine.flights[i].to < cta.shared + machine.shared_stride) {
        fail(self.where, "the CTA ends while an st_async is on its way to it");
      }
    }
    if (--cluster.live == 0) {
      --machine.running;
      const int places = machine.slots / machine.how.cluster;
      machine.free_places[(machine.free_head + machine.free_count++) % places] = static_cast<int>(&cluster - machine.clusters);
      resume(machine.main, true);  // which starts others, perhaps on this stack
    }
  }
  resume(next_fiber(), true);
  std::abort();
}

}  // namespace

void resume(Fiber& next, bool for_good) {
  Fiber& self = *running;
  if (&next == &self) return;
  ++machine.counters.switches;
  running = &next;
  place = &next;
  if (tsan()) __tsan_switch_to_fiber(next.tsan, 1);
  if (asan()) __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, next.stack, next.stack_bytes);
  context_switch(self.context, next.context);
  if (asan()) __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

Fiber& next_fiber() {
  while (true) {
    if (Fiber* fiber = choose_fiber()) return *fiber;
    if (machine.flight_count) {
      land_flight(static_cast<int>(random_bits() % machine.flight_count));
      continue;
    }
    if (machine.running) report_deadlock();
    return machine.main;
  }
}

void thread_main() {
  if (asan()) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  acquire(&machine.start_clock);
  machine.entry(machine.call);
  release(&machine.end_clock);
  end_thread();
}

void fail(Where where, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(where, format, arguments);
  va_end(arguments);
  resume(machine.main);
  std::abort();
}

void wake(Warp& warp, uint32_t lanes) {
  if (!lanes) return;
  const auto index = &warp - machine.warps;
  warp.ready |= lanes;
  machine.ready[index / 64] |= uint64_t{1} << (index % 64);
}

void wake(Fiber& fiber) { wake(*fiber.warp, fiber.bit); }

void block(Wait wait, Where where) {
  Fiber& self = *running;
  self.wait = wait;
  self.where = where;
  resume(next_fiber());
  self.wait = Wait::kNone;
}

void step() {
  Fiber& self = *running;
  if (!by_chance() && machine.landing != Landing::kRandom) return;
  const uint64_t bits = random_bits();
  if (machine.landing == Landing::kRandom) {
    if (machine.flight_count && bits % 4 == 0) land_flight(static_cast<int>((bits >> 32) % machine.flight_count));
    if ((bits >> 2) % 4 == 0) {
      Copy* copy = self.copies;
      for (uint64_t skip = (bits >> 40) % 8; copy && (copy->landed || skip); copy = copy->next) skip -= skip > 0;
      if (copy) land_copy(*copy);
    }
  }
  if (by_chance() && (bits >> 4) % 16 == 0) {
    wake(self);
    resume(next_fiber());
  }
}

}  // namespace fastseq::gpu::host
