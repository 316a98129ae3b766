#include "exchange.h"

#include "exchange_kernel.cuh"

namespace fastseq::limits {

const char* exchange(std::string_view kind, const ExchangeParams& p, void* stream) {
  const bool cluster = kind.substr(0, 7) == "cluster";
  const int own = gpu::piece_bytes<Vec16>(p.vectors), state = gpu::piece_bytes<Vec16>(p.vectors * p.ctas * (cluster ? 2 : 1));
  const auto how = [&](int smem) { return gpu::Launch{p.ctas, kExchangeThreads, cluster ? p.ctas : 1, smem, !cluster, stream}; };
  if (kind == "grid barrier") return gpu::launch(grid_barrier, how(0), p);
  if (kind == "cluster barrier") return gpu::launch(cluster_barrier, how(0), p);
  if (kind == "grid hand-off") return gpu::launch(grid_hand_off, how(own + state), p);
  if (kind == "cluster hand-off") return gpu::launch(cluster_hand_off, how(own + state + gpu::piece_bytes<gpu::Mbarrier>(2)), p);
  return "there is no such exchange";
}

}  // namespace fastseq::limits
