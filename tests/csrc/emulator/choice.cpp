// Who runs next, as the seed has it.

#include <bit>
#include <cstdlib>

#include "state.h"

namespace fastseq::gpu::host {

namespace {

int random_lane(uint32_t lanes, uint64_t bits) {
  const int turn = bits & 31;
  return (std::countr_zero(std::rotr(lanes, turn)) + turn) & 31;
}

// the first warp from `start` on, in a circle, that has a lane ready; -1: none has
int ready_warp(int start) {
  const int words = (warp_count() + 63) / 64;
  for (int i = 0; i <= words; ++i) {
    const int word = (start / 64 + i) % words;
    uint64_t bits = machine.ready[word];
    if (i == 0) bits &= ~uint64_t{0} << (start % 64);
    if (bits) return word * 64 + std::countr_zero(bits);
  }
  return -1;
}

int last_ready_warp() {
  for (int word = (warp_count() + 63) / 64 - 1; word >= 0; --word) {
    if (machine.ready[word]) return word * 64 + 63 - std::countl_zero(machine.ready[word]);
  }
  return -1;
}

// Of 32 choices; a collective goes on when all lanes of the warp have come to it.
bool stays(const Warp& warp, uint64_t bits) { return (bits >> 8 & 31) < (warp.arrived ? 31 : 24); }

void new_stretch() {
  const uint64_t bits = random_bits();
  const int warp = static_cast<int>((bits >> 32) % warp_count());
  const bool cta = bits % 3 == 0;
  machine.uneven_begin = cta ? warp / machine.warps_per_cta * machine.warps_per_cta : warp;
  machine.uneven_end = machine.uneven_begin + (cta ? machine.warps_per_cta : 1);
  machine.uneven_lanes = bits % 3 == 2 ? 1u << (bits >> 8 & 31) : ~0u;
  machine.favor = bits >> 16 & 1;
  machine.uneven_left = 1 << (bits >> 20) % 14;
}

Fiber* take_lane(int warp_index, int lane) {
  Warp& warp = machine.warps[warp_index];
  warp.ready &= ~(1u << lane);
  if (!warp.ready) machine.ready[warp_index / 64] &= ~(uint64_t{1} << (warp_index % 64));
  return warp.fibers + lane;
}

Fiber* choose_uneven(uint64_t bits) {
  if (machine.uneven_left-- <= 0) new_stretch();
  const int count = warp_count();
  if (machine.favor) {
    for (int warp = machine.uneven_begin; warp < machine.uneven_end; ++warp) {
      if (const uint32_t lanes = machine.warps[warp].ready & machine.uneven_lanes)
        return take_lane(warp, random_lane(lanes, bits));
    }
  } else {
    int warp = ready_warp(static_cast<int>((bits >> 16) % count));
    for (int i = 0; i < count && warp >= 0; ++i) {
      const bool starved = warp >= machine.uneven_begin && warp < machine.uneven_end;
      if (const uint32_t lanes = machine.warps[warp].ready & (starved ? ~machine.uneven_lanes : ~0u)) {
        return take_lane(warp, random_lane(lanes, bits));
      }
      warp = ready_warp((warp + 1) % count);
    }
  }
  const int warp = ready_warp(static_cast<int>((bits >> 16) % count));
  return warp < 0 ? nullptr : take_lane(warp, random_lane(machine.warps[warp].ready, bits));
}

}  // namespace

// splitmix64
uint64_t random_bits() {
  uint64_t z = machine.random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

void choose_order() {
  if (!machine.seeded) {
    const char* given = std::getenv("FASTSEQ_HOST_SEED");
    machine.seed = given ? std::strtoull(given, nullptr, 10) : 0;
    machine.seeded = true;
  }
  if (!machine.chosen) {
    machine.schedule = static_cast<Schedule>(machine.seed % (machine.seed < 12 ? 4 : 2));
    machine.landing = static_cast<Landing>((machine.seed + 1) % 3);
  }
  machine.random = machine.seed * 0x9e3779b97f4a7c15 + machine.launches++;
  machine.uneven_left = 0;
  machine.window = machine.slots / machine.how.cluster;
  if (!machine.how.cooperative && machine.window > 1) {
    machine.window = machine.schedule == Schedule::kUneven ? 1 + static_cast<int>(random_bits() % machine.window) : 1;
  }
  // Clusters start in a circle, up or down.
  const bool down = by_chance() ? random_bits() & 1 : machine.schedule == Schedule::kLast;
  machine.cluster_step = down ? machine.cluster_count - 1 : 1;
  machine.first_cluster = by_chance() ? static_cast<int>(random_bits() % machine.cluster_count)
                          : down      ? machine.cluster_count - 1
                                      : 0;
}

Fiber* choose_fiber() {
  if (machine.schedule == Schedule::kFirst) {
    const int warp = ready_warp(0);
    return warp < 0 ? nullptr : take_lane(warp, std::countr_zero(machine.warps[warp].ready));
  }
  if (machine.schedule == Schedule::kLast) {
    const int warp = last_ready_warp();
    return warp < 0 ? nullptr : take_lane(warp, 31 - std::countl_zero(machine.warps[warp].ready));
  }
  const uint64_t bits = random_bits();
  if (const Warp* same = running->warp; same && same->ready && stays(*same, bits)) {
    if (machine.schedule == Schedule::kRandom || same->arrived) {
      return take_lane(static_cast<int>(same - machine.warps), random_lane(same->ready, bits));
    }
  }
  if (machine.schedule == Schedule::kUneven) return choose_uneven(bits);
  const int warp = ready_warp(static_cast<int>((bits >> 16) % warp_count()));
  return warp < 0 ? nullptr : take_lane(warp, random_lane(machine.warps[warp].ready, bits));
}

}  // namespace fastseq::gpu::host
