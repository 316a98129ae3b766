// Sizes that follow from a split: of shared memory, of what CTAs exchange. For kernels, planner and hosts alike.
#pragma once

#include "../common/machine.h"
#include "../common/portable.h"
#include "params.h"

namespace fastseq::recurrent {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Units of a CTA at most: what leaves a thread registers for its weights. Wide: chunks of several tiles of columns.
constexpr int most_units(int gates, bool gathers_gates, bool wide) { return gates == 1 ? 64 : gathers_gates || wide ? 32 : 40; }

// Facts about a tile type that the host needs too.
struct TileFacts {
  int depth;     // of a tile
  int vector;    // numbers in 16 bytes
  int resident;  // tiles of a warp's weights in registers
  int columns;   // of a chunk
  int block;     // tiles of depth that are multiplied together
};

// The same facts as in tiles.cuh, for hosts; wide: whether a chunk has more than one tile of columns.
constexpr TileFacts tile_facts(Precision precision, bool wide) {
  switch (precision) {
    case Precision::kHalf:
    case Precision::kBfloat16: return {16, 8, 32, wide ? 32 : 8, wide ? 2 : 4};
    case Precision::kTf32: return {8, 4, 32, wide ? 32 : 8, wide ? 2 : 4};
    case Precision::kFloat: break;
  }
  return {8, 4, 24, wide ? 16 : 8, 2};
}

constexpr FASTSEQ_HOST_DEVICE int tiles_over(int rows) { return (rows + 15) / 16; }

// Tiles of 16 rows of a CTA's product: gates of its own units if it gathers states, its own units if it gathers gate gradients, the
// units of the whole team if it scatters.
constexpr FASTSEQ_HOST_DEVICE int row_tiles(const Split& s, int row_gates) {
  return tiles_over(s.scatter ? s.ctas * s.units : s.units * row_gates);
}

// Tiles of weights that the busiest warp has.
constexpr FASTSEQ_HOST_DEVICE int most_tiles(const Split& s, int row_tiles) {
  return ((row_tiles + s.m_warps() - 1) >> s.m_bits) * s.depths * s.segments;
}
constexpr FASTSEQ_HOST_DEVICE int tiles_beyond(int tiles, int resident) { return tiles > resident ? tiles - resident : 0; }

// Between columns of sums: 4 beyond a multiple of 16, so that no two lanes of a fragment meet in a bank.
constexpr FASTSEQ_HOST_DEVICE int stride_of_sums(int rows) { return tiles_over(rows) * 16 + 4; }

// Of CTAs that gather: each has the whole operand.
struct GatherLayout {
  int own;      // 16-byte vectors of depth that a CTA sends, per column
  int segment;  // vectors of a segment's depth, per column
  int vectors;  // of a chunk's depth, per column
  int buffers;  // of shared memory for segments
  int stride;   // between columns of partial sums

  // gates: 1 in the backward pass for rows, G for what is sent; the other way round in the forward pass
  constexpr FASTSEQ_HOST_DEVICE GatherLayout(const Split& s, const TileFacts& tile, int row_gates, int sent_gates)
      : own(s.units * sent_gates / tile.vector),
        segment(s.depths * s.k_warps * (tile.depth / tile.vector)),
        vectors(s.segments * segment),
        buffers(s.cluster || s.chunks * s.segments > 1 ? 2 : 1),
        stride(stride_of_sums(s.units * row_gates)) {}
};

// Of CTAs that scatter: each has its own gate gradients, and what all send it: [CTA][unit][column].
struct ScatterLayout {
  int vectors;       // of 16 bytes: depth of the product per column
  int quarter_bits;  // 2^quarter_bits times four columns are sent
  int sent;          // vectors from one CTA to another in a step
  int groups;        // of threads, which add up what every groups-th CTA sent
  int stride;        // between columns of their sums

  constexpr FASTSEQ_HOST_DEVICE ScatterLayout(const Split& s, const TileFacts& tile)
      : vectors(s.depths * s.k_warps * (tile.depth / tile.vector)),
        quarter_bits(s.column_bits > 2 ? 1 : 0),
        sent(s.units << quarter_bits),
        groups(kThreads / sent < s.ctas ? kThreads / sent : s.ctas),
        stride(stride_of_sums(s.units)) {}
};

// Bytes of shared memory, in the order in which the kernels take it.
inline int shared_bytes(const Split& s, const TileFacts& tile, int row_gates, int sent_gates, int states, int vectors) {
  using gpu::piece_bytes, gpu::Vec16;
  int bytes = piece_bytes<Vec16>(tiles_beyond(most_tiles(s, row_tiles(s, row_gates)), tile.resident) * kThreads);
  if (s.scatter) {
    const ScatterLayout l(s, tile);
    bytes += piece_bytes<Vec16>(s.cluster ? 2 * s.ctas * l.sent : 0) + piece_bytes<float>(l.groups * tile.columns * l.stride) +
             piece_bytes<Vec16>(s.chunks * l.vectors * tile.columns);
  } else {
    const GatherLayout l(s, tile, row_gates, sent_gates);
    bytes += piece_bytes<Vec16>(l.buffers * l.segment * tile.columns) +
             piece_bytes<float>(s.k_warps * tile.columns * l.stride) + piece_bytes<Vec16>(s.chunks * l.own * tile.columns);
  }
  return bytes + piece_bytes<float>(states * s.chunks * tile.columns * s.units) + piece_bytes<float>(vectors * s.units) +
         piece_bytes<int32_t>(s.chunks * tile.columns) + piece_bytes<gpu::Mbarrier>(2);
}

// Bytes that a team's CTAs exchange through, in global memory.
inline int64_t operand_bytes(const Split& s, const TileFacts& tile, int row_gates, int sent_gates) {
  if (s.cluster) return 0;
  const int64_t slots = 2 * static_cast<int64_t>(s.chunks) * static_cast<int64_t>(sizeof(gpu::Vec16));
  if (s.scatter) return slots * s.ctas * s.ctas * ScatterLayout(s, tile).sent;
  return slots * GatherLayout(s, tile, row_gates, sent_gates).vectors << s.column_bits;
}

// Quotients without a division: of numbers below kMostDepth by units up to 64, below 4096 by others up to 128.
constexpr int kMostDepth = 16384;
class Quotient {
 public:
  constexpr FASTSEQ_HOST_DEVICE explicit Quotient(int by) : inverse_(((1u << 20) + by - 1) / by) {}
  constexpr FASTSEQ_HOST_DEVICE int of(int number) const { return static_cast<int>(number * inverse_ >> 20); }

 private:
  uint32_t inverse_;
};

}  // namespace fastseq::recurrent
