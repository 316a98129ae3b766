// All-gather of each step's results: every CTA of a team has the results of all.
//
// In every step a CTA multiplies its rows of the weights with the whole operand of the step (the states, or the gate gradients, of
// all CTAs of its team), works on its own units, and sends its part of the next operand to the others (exchange.cuh).
//
// In shared memory an operand is [depth][kColumns] vectors, of which only those columns that hold sequences are exchanged; what the
// product makes of the others nobody reads. In global memory it is [depth][2^column_bits].
#pragma once

#include "exchange.cuh"
#include "layout.h"
#include "weights.cuh"

namespace fastseq::recurrent {

// kNTiles: column tiles of a batch tile. kRowGates: rows of the product per unit. kSentGates: numbers that a unit sends.
template <class TileType, int kNTiles, int kRowGates, int kSentGates>
class AllGather : Exchange {
 public:
  using Tile = TileType;
  using Number = typename Tile::Number;
  static constexpr int kColumns = kNTiles * kTileColumns;
  static constexpr int kMostUnits = most_units(kRowGates * kSentGates, kSentGates > 1, kNTiles > 1);
  static constexpr bool kSendsSums = false;

  FASTSEQ_DEVICE AllGather(const Split& split, const ExchangeBuffers& buffers, const CtaCoords& cta, gpu::Smem& smem)
      : Exchange(split, cta), layout_(split, facts_of_tile<Tile>(kNTiles), kRowGates, kSentGates),
        weights_(split, row_tiles(split, kRowGates), smem) {
    buffer_ = smem.take<gpu::Vec16>(layout_.buffers * buffer_vectors());
    sums_ = smem.take<float>(split.k_warps * kColumns * layout_.stride);
    own_ = smem.take<gpu::Vec16>(split.batch_tiles * layout_.own * kColumns);
    find_flags(buffers, cta);
    operands_ = static_cast<gpu::Vec16*>(buffers.operands) + int64_t{2} * cta.team * operand_vectors();
  }

  template <class At>
  FASTSEQ_DEVICE void load(const At& at) {
    weights_.load(at);
  }

  // Before the first step. Depth that no CTA owns, up to a whole tile, is zero for good.
  FASTSEQ_DEVICE void begin(gpu::Mbarrier* arrived) {
    arrived_ = arrived;
    const int used = split_.ctas * layout_.own;
    if (clusters()) {
      for (int slot = 0; slot < 2; ++slot) clear(buffer_ + slot * buffer_vectors(), used * kColumns, layout_.vectors * kColumns);
      meet(bytes());
    } else if (rank_ == split_.ctas - 1) {
      for (int block = 0; block < 2 * split_.batch_tiles; ++block) {
        clear(operands_ + int64_t{block} * batch_tile_vectors(), used << split_.column_bits, batch_tile_vectors());
      }
    }
  }

  // Of what this CTA sends: number `which` of a unit.
  FASTSEQ_DEVICE Number& own(int batch_tile, int unit, int column, int which = 0) {
    const int depth = which * split_.units + unit;
    auto* numbers = reinterpret_cast<Number*>(own_ + (batch_tile * layout_.own + depth / Tile::kVector) * kColumns + column);
    return numbers[depth % Tile::kVector];
  }
  // Sets one that only this step needs.
  FASTSEQ_DEVICE void send(int batch_tile, int unit, int column, int which, Number x) { own(batch_tile, unit, column, which) = x; }

  // Sends it, as the operand of this epoch: 1, 2, ... The CTA has synchronized since it was written.
  FASTSEQ_DEVICE void publish(uint32_t epoch) {
    const int vectors = layout_.own << split_.column_bits;
    if (clusters()) {
      gpu::Vec16* slot = buffer_ + (epoch & 1) * buffer_vectors() + rank_ * layout_.own * kColumns;
      for (int to = gpu::warp(); to < split_.ctas; to += kWarps) {
        const gpu::Peer<gpu::Vec16> there = gpu::peer(slot, to);
        const gpu::Peer<gpu::Mbarrier> arrived = gpu::peer(arrived_ + (epoch & 1), to);
        for (int i = gpu::lane(); i < vectors; i += 32) gpu::st_async(there + spread(i), Tile::sent(own_[spread(i)]), arrived);
      }
    } else if (gpu::warp() == 0) {
      for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) {
        gpu::Vec16* slot = operand(epoch, batch_tile) + rank_ * vectors;
        const gpu::Vec16* own = own_ + batch_tile * layout_.own * kColumns;
        for (int i = gpu::lane(); i < vectors; i += 32) slot[i] = Tile::sent(own[spread(i)]);
      }
      raise_flag(epoch);
    }
  }

  // Until the operand of this epoch is complete.
  FASTSEQ_DEVICE void wait(uint32_t epoch) {
    epoch_ = epoch;
    if (clusters()) {
      await_bytes(epoch, bytes());
    } else {
      await_flags(epoch);
      bring(0, 0, 0);
    }
  }

  // The batch tile's product, ready for sums(). Chunks come in order after a wait().
  FASTSEQ_DEVICE void product(int batch_tile) {
    Sums<Tile, kNTiles> sums;
    const auto store = [&](int row) {
      FASTSEQ_UNROLL
      for (int tile = 0; tile < kNTiles; ++tile) {
        float total[Tile::kSums];
        sums.take(total, tile);
        const int first = (weights_.k_warp() * kColumns + tile * kTileColumns) * layout_.stride + row * kTileRows;
        Tile::store(total, sums_ + first, layout_.stride);
      }
    };
    int row = 0;
    for (int segment = 0; segment < split_.k_segments; ++segment) {
      const gpu::Vec16* operand = buffer_ + (epoch_ & 1) * buffer_vectors();
      if (!clusters()) {
        const int piece = batch_tile * split_.k_segments + segment;
        operand = buffer_ + (piece & 1) * buffer_vectors();
        gpu::cp_wait<0>();
        gpu::cta_sync();  // it is here, and the other buffer is free
        const bool last = segment + 1 == split_.k_segments;
        if (!last || batch_tile + 1 < split_.batch_tiles) bring(piece + 1, last ? batch_tile + 1 : batch_tile, last ? 0 : segment + 1);
      }
      row = weights_.multiply(sums, reinterpret_cast<const Number*>(operand), segment, store);
    }
    if (weights_.works()) store(row);
    gpu::cta_sync();  // the sums are there
  }

  // The product's rows of a unit, all its gates.
  FASTSEQ_DEVICE void sums(float (&total)[kRowGates], int column, int unit) const {
    add_up(total, sums_ + column * layout_.stride + unit, split_.units, split_.k_warps, kColumns * layout_.stride);
  }

 private:
  FASTSEQ_DEVICE int buffer_vectors() const { return layout_.segment * kColumns; }
  FASTSEQ_DEVICE int batch_tile_vectors() const { return layout_.vectors << split_.column_bits; }
  FASTSEQ_DEVICE uint32_t bytes() const { return (split_.ctas * layout_.own << split_.column_bits) * sizeof(gpu::Vec16); }
  // Where vector i of those that are exchanged lies in shared memory.
  FASTSEQ_DEVICE int spread(int i) const {
    return (i >> split_.column_bits) * kColumns + (i & ((1 << split_.column_bits) - 1));
  }
  FASTSEQ_DEVICE int64_t operand_vectors() const { return int64_t{split_.batch_tiles} * batch_tile_vectors(); }
  FASTSEQ_DEVICE gpu::Vec16* operand(uint32_t epoch, int batch_tile) const {
    return operands_ + (epoch & 1) * operand_vectors() + int64_t{batch_tile} * batch_tile_vectors();
  }

  FASTSEQ_DEVICE void clear(gpu::Vec16* vectors, int from, int to) const {
    for (int i = from + gpu::tid(); i < to; i += kThreads) vectors[i] = {};
  }

  // Starts the copy of a piece of the operand to its buffer.
  FASTSEQ_DEVICE void bring(int piece, int batch_tile, int segment) {
    const int count = layout_.segment << split_.column_bits;
    const gpu::Vec16* from = operand(epoch_, batch_tile) + segment * count;
    gpu::Vec16* to = buffer_ + (piece & 1) * buffer_vectors();
    for (int i = gpu::tid(); i < count; i += kThreads) gpu::cp_async16(to + spread(i), from + i);
    gpu::cp_commit();
  }

  const AllGatherLayout layout_;
  Weights<Tile> weights_;
  gpu::Vec16* buffer_;    // [buffers][depth of a segment][kColumns]; of a cluster: [slot][depth][kColumns]
  float* sums_;           // [k_warps][kColumns][stride]
  gpu::Vec16* own_;       // [batch_tiles][own][kColumns]
  gpu::Vec16* operands_;  // [2][batch_tiles][depth][2^column_bits]
};

}  // namespace fastseq::recurrent
