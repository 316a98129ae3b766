// Reduce-scatter of partial sums: each CTA multiplies what it alone knows, its own gate gradients, with the weights that lead from
// its units to all units of the team, and sends every CTA the sums for that one's units (exchange.cuh).
//
// In a step a CTA receives units x CTAs sums per sequence in fp32, four sequences at a time, and adds them up in a fixed order; in an
// all-gather it would receive all gate gradients of the team.
#pragma once

#include "exchange.cuh"
#include "layout.h"
#include "quotient.h"
#include "weights.cuh"

namespace fastseq::recurrent {

template <class TileType, int kGates>
class ReduceScatter : Exchange {
 public:
  using Tile = TileType;
  using Number = typename Tile::Number;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kMostUnits = most_units(kGates, false, false);
  static constexpr bool kSendsSums = true;

  FASTSEQ_DEVICE ReduceScatter(const Split& split, const ExchangeBuffers& buffers, const CtaCoords& cta, gpu::Smem& smem)
      : Exchange(split, cta), layout_(split, facts_of_tile<Tile>(1)), weights_(split, row_tiles(split, 1), smem),
        per_eight_units_(split.units / 8), per_sent_(layout_.sent) {
    received_ = smem.take<gpu::Vec16>(clusters() ? 2 * split.ctas * layout_.sent : 0);
    sums_ = smem.take<float>(layout_.groups * kColumns * layout_.stride);
    own_ = smem.take<gpu::Vec16>(split.batch_tiles * own_vectors());
    find_flags(buffers, cta);
    inboxes_ = static_cast<gpu::Vec16*>(buffers.operands) + int64_t{2} * cta.team * split.batch_tiles * split.ctas * inbox();
  }

  template <class At>
  FASTSEQ_DEVICE void load(const At& at) {
    weights_.load(at);
  }

  // Before the first step. Depth beyond the gates of the CTA's units, up to whole tiles, is zero for good.
  FASTSEQ_DEVICE void begin(gpu::Mbarrier* arrived) {
    arrived_ = arrived;
    const int used = split_.units * kGates / Tile::kVector * kColumns;
    for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) {
      for (int i = used + gpu::tid(); i < own_vectors(); i += kThreads) own_[batch_tile * own_vectors() + i] = {};
    }
    if (clusters()) meet(bytes());
  }

  // Sets gate gradient `which` of a unit.
  FASTSEQ_DEVICE void send(int batch_tile, int unit, int column, int which, Number x) {
    const int depth = which * split_.units + unit;
    auto* numbers = reinterpret_cast<Number*>(own_ + batch_tile * own_vectors() + depth / Tile::kVector * kColumns + column);
    numbers[depth % Tile::kVector] = Tile::operand(x);
  }

  // Multiplies them and sends the sums, of this epoch: 1, 2, ... The CTA has synchronized since they were set.
  FASTSEQ_DEVICE void publish(uint32_t epoch) {
    for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) {
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
          inbox_of(to, epoch, batch_tile)[which] = v;
        }
      };
      const int row = weights_.multiply(sums, reinterpret_cast<const Number*>(own_ + batch_tile * own_vectors()), 0, scatter);
      if (weights_.works()) scatter(row);
    }
    if (clusters()) return;
    gpu::cta_sync();  // all warps have sent
    if (gpu::warp() == 0) raise_flag(epoch);
  }

  // Until the sums of this epoch have arrived.
  FASTSEQ_DEVICE void wait(uint32_t epoch) {
    epoch_ = epoch;
    if (clusters()) {
      await_bytes(epoch, bytes());
    } else {
      await_flags(epoch);
    }
  }

  // Adds up those of a batch tile, ready for sums(). Chunks come in order after a wait().
  FASTSEQ_DEVICE void product(int batch_tile) {
    if (batch_tile > 0) gpu::cta_sync();  // nobody reads the sums of the batch tile before
    const int group = per_sent_.of(gpu::tid()), which = gpu::tid() - group * layout_.sent;
    if (group < layout_.groups) {
      const gpu::Vec16* from = (clusters() ? received_ + (epoch_ & 1) * inbox() : inbox_of(rank_, epoch_, batch_tile)) + which;
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

  FASTSEQ_DEVICE int own_vectors() const { return layout_.vectors * kColumns; }
  FASTSEQ_DEVICE int inbox() const { return split_.ctas * layout_.sent; }
  FASTSEQ_DEVICE uint32_t bytes() const { return inbox() * sizeof(gpu::Vec16); }
  FASTSEQ_DEVICE gpu::Vec16* inbox_of(int cta, uint32_t epoch, int batch_tile) const {
    return inboxes_ + (((epoch & 1) * split_.batch_tiles + batch_tile) * split_.ctas + cta) * inbox();
  }

  const ReduceScatterLayout layout_;
  Weights<Tile> weights_;
  const Quotient per_eight_units_, per_sent_;
  gpu::Vec16* received_;  // of a cluster: [2] inboxes: [CTA][unit][quarter], four columns in each
  float* sums_;           // [groups][kColumns][stride]
  gpu::Vec16* own_;       // [batch_tiles][depth][kColumns]
  gpu::Vec16* inboxes_;   // in global memory: [2][batch_tiles][CTA] inboxes
};

}  // namespace fastseq::recurrent
