// What both exchanges of a step's results are made of: a CTA says that it has sent, and waits until all of its team have.
//
// What is sent alternates between two slots: a CTA sends for the next epoch but one only after all others have sent for the next,
// for which they had to be done with this one. All that is sent is waited for: a CTA that leaves has received everything.
#pragma once

#include "../common/prims.cuh"
#include "cta_coords.cuh"
#include "params.h"
#include "tile_sizes.h"

namespace fastseq::recurrent {

class Exchange {
 protected:
  FASTSEQ_DEVICE Exchange(const Split& split, const CtaCoords& cta) : split_(split), rank_(cta.rank) {}

  // Near the end of construction: where the address is formed earlier, some kernels spill more.
  FASTSEQ_DEVICE void find_flags(const ExchangeBuffers& buffers, const CtaCoords& cta) {
    flags_ = buffers.flags + cta.team * split_.ctas;
  }

  FASTSEQ_DEVICE bool clusters() const { return gpu::kHasClusters && split_.cluster; }

  // In a cluster, before the first step: the CTA receives so many bytes in every epoch.
  FASTSEQ_DEVICE void meet(uint32_t bytes) {
    gpu::mbarrier_init(arrived_, 2, bytes);
    gpu::cluster_sync();
  }

  // In a cluster, until so many bytes have arrived, those of this epoch.
  FASTSEQ_DEVICE void await_bytes(uint32_t epoch, uint32_t bytes) {
    gpu::Mbarrier* arrived = arrived_ + (epoch & 1);
    gpu::mbarrier_wait(arrived, (epoch - 1) / 2 & 1);
    // What counts for the next phase is sent after this CTA's next publish, hence after all its threads have come here.
    if (gpu::tid() == 0) gpu::mbarrier_expect(arrived, bytes);
  }

  // Through global memory, by a warp: what it wrote, and what the CTA wrote before it synchronized, is there for who sees the flag.
  FASTSEQ_DEVICE void raise_flag(uint32_t epoch) { gpu::flag_publish(flags_ + rank_, epoch); }

  // Through global memory, until all CTAs have raised their flags for this epoch.
  FASTSEQ_DEVICE void await_flags(uint32_t epoch) {
    if (gpu::warp() == 0) gpu::flags_wait(flags_, split_.ctas, epoch);
    gpu::cta_sync();
  }

  const Split& split_;
  const int rank_;
  uint32_t* flags_;  // [ctas]
  gpu::Mbarrier* arrived_ = nullptr;
  uint32_t epoch_ = 0;
};

}  // namespace fastseq::recurrent
