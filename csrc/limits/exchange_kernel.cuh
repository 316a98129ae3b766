// What it costs CTAs to wait for each other and to pass a state on, and nothing else: the floor of a recurrence in one launch.
#pragma once

#include "../common/prims.cuh"
#include "exchange.h"

namespace fastseq::limits {

using gpu::Vec16;

FASTSEQ_KERNEL(kExchangeThreads) grid_barrier(FASTSEQ_PARAMETERS ExchangeParams p) {
  for (int s = 1; s <= p.steps; ++s) {
    if (gpu::warp() == 0) {
      gpu::flag_publish(p.flags + gpu::bid(), s);
      gpu::flags_wait(p.flags, p.ctas, s);
    }
    gpu::cta_sync();
  }
  if (gpu::tid() == 0) p.results[gpu::bid()] = p.steps;
}

FASTSEQ_KERNEL(kExchangeThreads) cluster_barrier(FASTSEQ_PARAMETERS ExchangeParams p) {
  for (int s = 1; s <= p.steps; ++s) gpu::cluster_sync();
  if (gpu::tid() == 0) p.results[gpu::bid()] = p.steps;
}

// Every CTA has p.vectors of the state; from the whole state of a step it makes its part of the next, each word one more than one
// that a CTA sent it.
struct Part {
  const ExchangeParams& p;
  Vec16* own;

  FASTSEQ_DEVICE void begin() const {
    for (int i = gpu::tid(); i < p.vectors; i += kExchangeThreads) own[i] = {};
  }
  FASTSEQ_DEVICE void step(const Vec16* state) const {
    for (int i = gpu::tid(); i < p.vectors; i += kExchangeThreads) {
      const Vec16 v = state[(i + 1) * p.ctas - 1];
      own[i] = {{v.word[0] + 1, v.word[1] + 1, v.word[2] + 1, v.word[3] + 1}};
    }
  }
  FASTSEQ_DEVICE void end() const {
    uint32_t least = own[0].word[0];
    for (int i = 0; i < p.vectors; ++i) {
      for (int w = 0; w < 4; ++w) least = own[i].word[w] < least ? own[i].word[w] : least;
    }
    if (gpu::tid() == 0) p.results[gpu::bid()] = least;
  }
};

// Through global memory and flags.
FASTSEQ_KERNEL(kExchangeThreads) grid_hand_off(FASTSEQ_PARAMETERS ExchangeParams p) {
  gpu::Smem smem;
  const Part part{p, smem.take<Vec16>(p.vectors)};
  Vec16* state = smem.take<Vec16>(p.vectors * p.ctas);
  auto* slots = static_cast<Vec16*>(p.operands);
  part.begin();
  gpu::cta_sync();
  for (int s = 1; s <= p.steps; ++s) {
    Vec16* slot = slots + s % 2 * p.vectors * p.ctas;
    if (gpu::warp() == 0) {
      for (int i = gpu::lane(); i < p.vectors; i += 32) slot[gpu::bid() * p.vectors + i] = part.own[i];
      gpu::flag_publish(p.flags + gpu::bid(), s);
      gpu::flags_wait(p.flags, p.ctas, s);
    }
    gpu::cta_sync();
    for (int i = gpu::tid(); i < p.vectors * p.ctas; i += kExchangeThreads) gpu::cp_async16(state + i, slot + i);
    gpu::cp_commit();
    gpu::cp_wait<0>();
    gpu::cta_sync();
    part.step(state);
    gpu::cta_sync();
  }
  part.end();
}

// Through the shared memory of a cluster.
FASTSEQ_KERNEL(kExchangeThreads) cluster_hand_off(FASTSEQ_PARAMETERS ExchangeParams p) {
  gpu::Smem smem;
  const int vectors = p.vectors * p.ctas;
  const Part part{p, smem.take<Vec16>(p.vectors)};
  Vec16* slots = smem.take<Vec16>(2 * vectors);
  auto* arrived = smem.take<gpu::Mbarrier>(2);
  gpu::mbarrier_init(arrived, 2, vectors * sizeof(Vec16));
  part.begin();
  gpu::cluster_sync();
  for (int s = 1; s <= p.steps; ++s) {
    Vec16* slot = slots + s % 2 * vectors;
    gpu::Mbarrier* here = arrived + s % 2;
    for (int i = gpu::tid(); i < vectors; i += kExchangeThreads) {
      const int to = i / p.vectors, which = i % p.vectors;
      gpu::st_async(gpu::peer(slot + gpu::cta_rank() * p.vectors + which, to), part.own[which], gpu::peer(here, to));
    }
    gpu::mbarrier_wait(here, (s - 1) / 2 % 2);
    if (gpu::tid() == 0) gpu::mbarrier_expect(here, vectors * sizeof(Vec16));
    gpu::cta_sync();  // own vectors are sent
    part.step(slot);
    gpu::cta_sync();
  }
  gpu::cluster_sync();
  part.end();
}

}  // namespace fastseq::limits
