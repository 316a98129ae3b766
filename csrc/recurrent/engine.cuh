// What the forward and the backward kernel share: recurrent weights that stay in registers and shared memory for a whole launch, and
// the exchange of each step's results between the CTAs of a team.
//
// In every step a CTA multiplies its rows of the weights with the whole operand of the step (the states, or the gate gradients, of all
// CTAs of its team), works on its own units, and sends its part of the next operand to the others. Two operands alternate: a CTA writes
// the next but one only after all others have sent the next, for which they had to be done with this one.
#pragma once

#include "../common/prims.cuh"
#include "layout.h"
#include "tiles.cuh"

namespace fastseq::recurrent {

// The place of this CTA.
struct Place {
  int team, rank, lane, part;

  FASTSEQ_DEVICE explicit Place(const Split& s)
      : team(s.first_team + gpu::bid() / s.ctas), rank(gpu::bid() % s.ctas), lane(team / s.parts), part(team % s.parts) {}
};

// kTiles: column tiles of a chunk. kRowGates: rows of the product per unit. kSentGates: numbers that a unit sends.
template <class Tile, int kTiles, int kRowGates, int kSentGates>
class Engine {
 public:
  using Number = typename Tile::Number;
  static constexpr int kColumns = kTiles * kTileColumns;

  FASTSEQ_DEVICE Engine(const Split& split, const Meeting& meeting, const Place& place, gpu::Smem& smem)
      : split_(split), layout_(split, {Tile::kDepth, Tile::kVector, Tile::kResident, kColumns}, kRowGates, kSentGates),
        rank_(place.rank) {
    shared_weights_ = smem.take<gpu::Vec16>(layout_.shared_tiles * kThreads);
    buffer_ = smem.take<gpu::Vec16>(layout_.buffers * buffer_vectors());
    sums_ = smem.take<float>(split.k_warps * kColumns * layout_.stride);
    own_ = smem.take<gpu::Vec16>(split.chunks * layout_.own * kColumns);
    flags_ = meeting.flags + place.team * split.ctas;
    operands_ = static_cast<gpu::Vec16*>(meeting.operands) + int64_t{2} * place.team * operand_vectors();
  }

  // Takes the weights: at(row, depth) for the rows of this CTA, zero outside the matrix.
  template <class At>
  FASTSEQ_DEVICE void load(const At& at) {
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kResident; block += kLoaded) {
      FASTSEQ_ROLLED
      for (int i = 0; i < kLoaded && block + i < tiles(); ++i) {
        uint32_t a[4];
        load_tile(a, at, block + i);
        FASTSEQ_UNROLL
        for (int r = 0; r < 4 * kLoaded; ++r) weights_[block + r / 4][r % 4] = r / 4 == i ? a[r % 4] : weights_[block + r / 4][r % 4];
      }
    }
    FASTSEQ_ROLLED
    for (int i = Tile::kResident; i < tiles(); ++i) {
      uint32_t a[4];
      load_tile(a, at, i);
      shared_weights_[(i - Tile::kResident) * kThreads + gpu::tid()] = {{a[0], a[1], a[2], a[3]}};
    }
  }

  // Before the first step. Depth that no CTA owns, up to a whole tile, is zero for good.
  FASTSEQ_DEVICE void begin(gpu::Mbarrier* arrived) {
    arrived_ = arrived;
    const int used = split_.ctas * layout_.own;
    if (split_.cluster) {
      for (int slot = 0; slot < 2; ++slot) clear(buffer_ + slot * buffer_vectors(), used);
      gpu::mbarrier_init(arrived_, 2, used * kColumns * sizeof(gpu::Vec16));
      gpu::cluster_sync();
    } else if (rank_ == split_.ctas - 1) {
      for (int block = 0; block < 2 * split_.chunks; ++block) clear(operands_ + int64_t{block} * chunk_vectors(), used);
    }
  }

  // After the last step: nobody leaves while others may still send to it.
  FASTSEQ_DEVICE void end() {
    if (split_.cluster) gpu::cluster_sync();
  }

  // Of what this CTA sends: number `which` of a unit.
  FASTSEQ_DEVICE Number& own(int chunk, int unit, int column, int which = 0) {
    const int depth = (which << split_.unit_bits) + unit;
    auto* numbers = reinterpret_cast<Number*>(own_ + (chunk * layout_.own + depth / Tile::kVector) * kColumns + column);
    return numbers[depth % Tile::kVector];
  }

  // Sends it, as the operand of this epoch: 1, 2, ... The CTA has synchronised since it was written.
  FASTSEQ_DEVICE void publish(uint32_t epoch) {
    const int vectors = layout_.own * kColumns;
    if (split_.cluster) {
      gpu::Vec16* slot = buffer_ + (epoch & 1) * buffer_vectors() + rank_ * vectors;
      for (int i = gpu::tid(); i < split_.ctas * vectors; i += kThreads) {
        const int to = i / vectors, which = i % vectors;
        gpu::st_async(gpu::peer(slot + which, to), Tile::sent(own_[which]), gpu::peer(arrived_ + (epoch & 1), to));
      }
    } else if (gpu::warp() == 0) {
      for (int chunk = 0; chunk < split_.chunks; ++chunk) {
        gpu::Vec16* slot = operand(epoch, chunk) + rank_ * vectors;
        for (int i = gpu::lane(); i < vectors; i += 32) slot[i] = Tile::sent(own_[chunk * vectors + i]);
      }
      gpu::flag_publish(flags_ + rank_, epoch);
    }
  }

  // Until the operand of this epoch is complete.
  FASTSEQ_DEVICE void wait(uint32_t epoch) {
    epoch_ = epoch;
    if (split_.cluster) {
      gpu::Mbarrier* arrived = arrived_ + (epoch & 1);
      gpu::mbarrier_wait(arrived, (epoch - 1) / 2 & 1);
      // What counts for the next phase is sent after this CTA's next publish, hence after all its threads have come here.
      if (gpu::tid() == 0) gpu::mbarrier_expect(arrived, split_.ctas * layout_.own * kColumns * sizeof(gpu::Vec16));
    } else {
      if (gpu::warp() == 0) gpu::flags_wait(flags_, split_.ctas, epoch);
      gpu::cta_sync();
      bring(0);
    }
  }

  // The chunk's product, ready for sum(). Chunks come in order after a wait().
  FASTSEQ_DEVICE void product(int chunk) {
    float sums[kChains][kTiles][Tile::kSums] = {};
    for (int segment = 0; segment < split_.segments; ++segment) {
      const gpu::Vec16* operand = buffer_ + (epoch_ & 1) * buffer_vectors();
      if (!split_.cluster) {
        const int piece = chunk * split_.segments + segment;
        operand = buffer_ + (piece & 1) * buffer_vectors();
        gpu::cp_wait<0>();
        gpu::cta_sync();  // it is here, and the other buffer is free
        if (piece + 1 < split_.chunks * split_.segments) bring(piece + 1);
      }
      multiply(sums, operand, segment);
    }
    FASTSEQ_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      FASTSEQ_UNROLL
      for (int chain = 1; chain < kChains; ++chain) {
        FASTSEQ_UNROLL
        for (int i = 0; i < Tile::kSums; ++i) sums[0][tile][i] += sums[chain][tile][i];
      }
      if (k_warp() < split_.k_warps) {
        const int first = (k_warp() * kColumns + tile * kTileColumns) * layout_.stride + m_warp() * kTileRows;
        Tile::store(sums[0][tile], sums_ + first, layout_.stride);
      }
    }
    gpu::cta_sync();
  }

  FASTSEQ_DEVICE float sum(int column, int row) const {
    const float* at = sums_ + column * layout_.stride + row;
    float total = at[0];
    for (int k = 1; k < split_.k_warps; ++k) total += at[k * kColumns * layout_.stride];
    return total;
  }

 private:
  static constexpr int kLoaded = 8;  // tiles that one copy of the loading code serves
  // Products of one tile depend on each other; several sums at a time hide that.
  static constexpr int kChains = Tile::kSums == 4 && kTiles < 4 ? 4 / kTiles : 1;

  FASTSEQ_DEVICE int m_warp() const { return gpu::warp() % split_.m_warps; }
  FASTSEQ_DEVICE int k_warp() const { return gpu::warp() / split_.m_warps; }
  // tiles of this warp: k_warp(), k_warp() + k_warps, ... of the depth
  FASTSEQ_DEVICE int tiles() const {
    return k_warp() < split_.k_warps ? (split_.k_tiles - k_warp() + split_.k_warps - 1) / split_.k_warps : 0;
  }

  FASTSEQ_DEVICE int buffer_vectors() const { return layout_.segment_tiles * kTileVectors * kColumns; }
  FASTSEQ_DEVICE int chunk_vectors() const { return layout_.vectors * kColumns; }
  FASTSEQ_DEVICE int64_t operand_vectors() const { return int64_t{split_.chunks} * chunk_vectors(); }
  FASTSEQ_DEVICE gpu::Vec16* operand(uint32_t epoch, int chunk) const {
    return operands_ + (epoch & 1) * operand_vectors() + int64_t{chunk} * chunk_vectors();
  }

  template <class At>
  FASTSEQ_DEVICE void load_tile(uint32_t (&a)[4], const At& at, int i) const {
    const int row = m_warp() * kTileRows, depth = (k_warp() + i * split_.k_warps) * Tile::kDepth;
    Tile::load(a, [&](int r, int d) { return at(row + r, depth + d); });
  }

  FASTSEQ_DEVICE void clear(gpu::Vec16* chunk, int used) const {
    for (int i = used * kColumns + gpu::tid(); i < chunk_vectors(); i += kThreads) chunk[i] = {};
  }

  // Starts the copy of a piece of the operand to its buffer.
  FASTSEQ_DEVICE void bring(int piece) {
    const int chunk = piece / split_.segments, first = piece % split_.segments * buffer_vectors();
    const int count = chunk_vectors() - first < buffer_vectors() ? chunk_vectors() - first : buffer_vectors();
    const gpu::Vec16* from = operand(epoch_, chunk) + first;
    gpu::Vec16* to = buffer_ + (piece & 1) * buffer_vectors();
    for (int i = gpu::tid(); i < count; i += kThreads) gpu::cp_async16(to + i, from + i);
    gpu::cp_commit();
  }

  FASTSEQ_DEVICE void multiply(float (&sums)[kChains][kTiles][Tile::kSums], const gpu::Vec16* operand, int segment) const {
    const int first = segment * layout_.segment_tiles / split_.k_warps;
    const int all = tiles(), after = first + layout_.segment_tiles / split_.k_warps, last = after < all ? after : all;
    const auto* numbers = reinterpret_cast<const Number*>(operand);
    // of tile i, in the segment
    const auto tile_at = [&](int i) {
      return numbers + (k_warp() + (i - first) * split_.k_warps) * (kTileVectors * kColumns * Tile::kVector);
    };
    FASTSEQ_UNROLL
    for (int i = 0; i < Tile::kResident; ++i) {
      if (i >= first && i < last) {
        FASTSEQ_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          Tile::multiply(sums[i % kChains][tile], weights_[i], tile_at(i), kColumns, tile * kTileColumns);
        }
      }
    }
    for (int i = first > Tile::kResident ? first : Tile::kResident; i < last; ++i) {
      const gpu::Vec16 v = shared_weights_[(i - Tile::kResident) * kThreads + gpu::tid()];
      const uint32_t a[4] = {v.word[0], v.word[1], v.word[2], v.word[3]};
      FASTSEQ_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        Tile::multiply(sums[0][tile], a, tile_at(i), kColumns, tile * kTileColumns);
      }
    }
  }

  static constexpr int kTileVectors = Tile::kDepth / Tile::kVector;

  const Split& split_;
  const Layout layout_;
  const int rank_;
  uint32_t weights_[Tile::kResident][4];
  gpu::Vec16* shared_weights_;  // [tiles beyond the registers][kThreads]
  gpu::Vec16* buffer_;          // [buffers][depth of a segment][kColumns]; of a cluster: [slot][depth][kColumns]
  float* sums_;                 // [k_warps][kColumns][stride]
  gpu::Vec16* own_;             // [chunks][own][kColumns]
  gpu::Vec16* operands_;        // [2][chunks][depth][kColumns]
  uint32_t* flags_;             // [ctas]
  gpu::Mbarrier* arrived_ = nullptr;
  uint32_t epoch_ = 0;
};

}  // namespace fastseq::recurrent
