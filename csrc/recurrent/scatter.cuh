// The exchange of partial sums: each CTA multiplies what it alone knows, its own gate gradients, with the weights that lead from its
// units to all units of the team, and sends every CTA the sums for that one's units.
//
// In a step a CTA receives units x CTAs sums per sequence in fp32, four sequences at a time, and adds them up in a fixed order;
// gathering, it would receive all gate gradients of the team (gather.cuh). What is received alternates between two slots: a CTA sends
// for the next but one step only after all others have sent for the next, for which they had to be done with this one. All that is
// sent is waited for: a CTA that leaves has received everything.
#pragma once

#include "place.cuh"
#include "weights.cuh"

namespace fastseq::recurrent {

template <class TileType, int kGates>
class ScatterEngine {
 public:
  using Tile = TileType;
  using Number = typename Tile::Number;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kMostUnits = most_units(kGates, false, false);
  static constexpr bool kScatters = true;

  FASTSEQ_DEVICE ScatterEngine(const Split& split, const Meeting& meeting, const Place& place, gpu::Smem& smem)
      : split_(split), layout_(split, {Tile::kDepth, Tile::kVector, Tile::kResident, kColumns, 0}), rank_(place.rank),
        weights_(split, row_tiles(split, 1), smem), per_eight_units_(split.units / 8), per_sent_(layout_.sent) {
    received_ = smem.take<gpu::Vec16>(clusters() ? 2 * split.ctas * layout_.sent : 0);
    sums_ = smem.take<float>(layout_.groups * kColumns * layout_.stride);
    own_ = smem.take<gpu::Vec16>(split.chunks * own_vectors());
    flags_ = meeting.flags + place.team * split.ctas;
    inboxes_ = static_cast<gpu::Vec16*>(meeting.operands) + int64_t{2} * place.team * split.chunks * split.ctas * inbox();
  }

  template <class At>
  FASTSEQ_DEVICE void load(const At& at) {
    weights_.load(at);
  }

  // Before the first step. Depth beyond the gates of the CTA's units, up to whole tiles, is zero for good.
  FASTSEQ_DEVICE void begin(gpu::Mbarrier* arrived) {
    arrived_ = arrived;
    const int used = split_.units * kGates / Tile::kVector * kColumns;
    for (int chunk = 0; chunk < split_.chunks; ++chunk) {
      for (int i = used + gpu::tid(); i < own_vectors(); i += kThreads) own_[chunk * own_vectors() + i] = {};
    }
    if (!clusters()) return;
    gpu::mbarrier_init(arrived_, 2, bytes());
    gpu::cluster_sync();
  }

  // Sets gate gradient `which` of a unit.
  FASTSEQ_DEVICE void send(int chunk, int unit, int column, int which, Number x) {
    const int depth = which * split_.units + unit;
    auto* numbers = reinterpret_cast<Number*>(own_ + chunk * own_vectors() + depth / Tile::kVector * kColumns + column);
    numbers[depth % Tile::kVector] = Tile::operand(x);
  }

  // Multiplies them and sends the sums, of this epoch: 1, 2, ... The CTA has synchronised since they were set.
  FASTSEQ_DEVICE void publish(uint32_t epoch) {
    for (int chunk = 0; chunk < split_.chunks; ++chunk) {
      Sums<Tile, 1> sums;
      const auto scatter = [&](int row_tile) {
        float total[Tile::kSums];
        sums.take(total, 0);
        const gpu::Vec16 v = Tile::vector(total);
        const int row = row_tile * kTileRows + Tile::row(), to = per_eight_units_.of(row >> 3), unit = row - to * split_.units;
        // rows up to a whole tile, and columns without sequences
        if (to >= split_.ctas || Tile::quarter() >> layout_.quarter_bits) return;
        const int which = rank_ * layout_.sent + (unit << layout_.quarter_bits) + Tile::quarter();
        if (clusters()) {
          gpu::st_async(gpu::peer(received_ + (epoch & 1) * inbox() + which, to), v, gpu::peer(arrived_ + (epoch & 1), to));
        } else {
          inbox_of(to, epoch, chunk)[which] = v;
        }
      };
      const int row = weights_.multiply(sums, reinterpret_cast<const Number*>(own_ + chunk * own_vectors()), 0, scatter);
      if (weights_.works()) scatter(row);
    }
    if (clusters()) return;
    gpu::cta_sync();  // all warps have sent
    if (gpu::warp() == 0) gpu::flag_publish(flags_ + rank_, epoch);
  }

  // Until the sums of this epoch have arrived.
  FASTSEQ_DEVICE void wait(uint32_t epoch) {
    epoch_ = epoch;
    if (clusters()) {
      gpu::Mbarrier* arrived = arrived_ + (epoch & 1);
      gpu::mbarrier_wait(arrived, (epoch - 1) / 2 & 1);
      // What counts for the next phase is sent after this CTA's next publish, hence after all its threads have come here.
      if (gpu::tid() == 0) gpu::mbarrier_expect(arrived, bytes());
    } else {
      if (gpu::warp() == 0) gpu::flags_wait(flags_, split_.ctas, epoch);
      gpu::cta_sync();
    }
  }

  // Adds up those of a chunk, ready for sums(). Chunks come in order after a wait().
  FASTSEQ_DEVICE void product(int chunk) {
    if (chunk > 0) gpu::cta_sync();  // nobody reads the sums of the chunk before
    const int group = per_sent_.of(gpu::tid()), which = gpu::tid() - group * layout_.sent;
    if (group < layout_.groups) {
      const gpu::Vec16* from = (clusters() ? received_ + (epoch_ & 1) * inbox() : inbox_of(rank_, epoch_, chunk)) + which;
      float total[4] = {};
      for (int first = group; first < split_.ctas; first += kAtOnce * layout_.groups) {
        gpu::Vec16 v[kAtOnce] = {};
        FASTSEQ_UNROLL
        for (int n = 0; n < kAtOnce; ++n) {
          const int cta = first + n * layout_.groups;
          if (cta < split_.ctas) v[n] = from[cta * layout_.sent];
        }
        FASTSEQ_UNROLL
        for (int n = 0; n < kAtOnce; ++n) {
          FASTSEQ_UNROLL
          for (int i = 0; i < 4; ++i) total[i] += gpu::as_float(v[n].word[i]);
        }
      }
      const int unit = which >> layout_.quarter_bits, quarter = which & layout_.quarter_bits;
      float* at = sums_ + (group * kColumns + quarter * 4) * layout_.stride + unit;
      FASTSEQ_UNROLL
      for (int i = 0; i < 4; ++i) at[i * layout_.stride] = total[i];
    }
    gpu::cta_sync();  // the sums are there
  }

  FASTSEQ_DEVICE void sums(float (&total)[1], int column, int unit) const {
    add_up(total, sums_ + column * layout_.stride + unit, 0, layout_.groups, kColumns * layout_.stride);
  }

 private:
  static constexpr int kAtOnce = 4;  // loads that do not wait for each other

  FASTSEQ_DEVICE bool clusters() const { return gpu::kHasClusters && split_.cluster; }
  FASTSEQ_DEVICE int own_vectors() const { return layout_.vectors * kColumns; }
  FASTSEQ_DEVICE int inbox() const { return split_.ctas * layout_.sent; }
  FASTSEQ_DEVICE uint32_t bytes() const { return inbox() * sizeof(gpu::Vec16); }
  FASTSEQ_DEVICE gpu::Vec16* inbox_of(int cta, uint32_t epoch, int chunk) const {
    return inboxes_ + (((epoch & 1) * split_.chunks + chunk) * split_.ctas + cta) * inbox();
  }

  const Split& split_;
  const ScatterLayout layout_;
  const int rank_;
  Weights<Tile> weights_;
  const Quotient per_eight_units_, per_sent_;
  gpu::Vec16* received_;  // of a cluster: [2] inboxes: [CTA][unit][quarter], four columns in each
  float* sums_;           // [groups][kColumns][stride]
  gpu::Vec16* own_;       // [chunks][depth][kColumns]
  gpu::Vec16* inboxes_;   // in global memory: [2][chunks][CTA] inboxes
  uint32_t* flags_;       // [ctas]
  gpu::Mbarrier* arrived_ = nullptr;
  uint32_t epoch_ = 0;
};

}  // namespace fastseq::recurrent
