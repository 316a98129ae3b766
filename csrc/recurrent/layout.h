// Sizes that follow from a split: of shared memory, of what CTAs exchange. For kernels, planner and hosts alike.
#pragma once

#include "../common/machine.h"
#include "../common/portable.h"
#include "params.h"
#include "tile_sizes.h"

namespace fastseq::recurrent {

constexpr FASTSEQ_HOST_DEVICE int tiles_over(int rows) { return (rows + 15) / 16; }

// Tiles of 16 rows of a CTA's product: gates of its own units if it gathers states, its own units if it gathers gate gradients, the
// units of the whole team in a reduce-scatter.
constexpr FASTSEQ_HOST_DEVICE int row_tiles(const Split& s, int row_gates) {
  return tiles_over(s.reduce_scatter ? s.ctas * s.units : s.units * row_gates);
}

// Tiles of weights that the busiest warp has.
constexpr FASTSEQ_HOST_DEVICE int most_tiles(const Split& s, int row_tiles) {
  return ((row_tiles + s.m_warps() - 1) >> s.m_bits) * s.k_tiles * s.k_segments;
}
constexpr FASTSEQ_HOST_DEVICE int tiles_beyond(int tiles, int resident) { return tiles > resident ? tiles - resident : 0; }

// Between columns of sums: 4 beyond a multiple of 16, so that no two lanes of a fragment meet in a bank.
constexpr FASTSEQ_HOST_DEVICE int stride_of_sums(int rows) { return tiles_over(rows) * 16 + 4; }

// Of an all-gather: each CTA has the whole operand.
struct AllGatherLayout {
  int own;      // 16-byte vectors of depth that a CTA sends, per column
  int segment;  // vectors of a segment's depth, per column
  int vectors;  // of a batch tile's depth, per column
  int buffers;  // of shared memory for segments
  int stride;   // between columns of partial sums

  // gates: 1 in the backward pass for rows, G for what is sent; the other way round in the forward pass
  constexpr FASTSEQ_HOST_DEVICE AllGatherLayout(const Split& s, const TileFacts& tile, int row_gates, int sent_gates)
      : own(s.units * sent_gates / tile.vector),
        segment(s.k_tiles * s.k_warps * (tile.depth / tile.vector)),
        vectors(s.k_segments * segment),
        buffers(s.cluster || s.batch_tiles * s.k_segments > 1 ? 2 : 1),
        stride(stride_of_sums(s.units * row_gates)) {}
};

// Of a reduce-scatter: each CTA has its own gate gradients, and what all send it: [CTA][unit][column].
struct ReduceScatterLayout {
  int vectors;       // of 16 bytes: depth of the product per column
  int quarter_bits;  // 2^quarter_bits times four columns are sent
  int sent;          // vectors from one CTA to another in a step
  int groups;        // of threads, which add up what every groups-th CTA sent
  int stride;        // between columns of their sums

  constexpr FASTSEQ_HOST_DEVICE ReduceScatterLayout(const Split& s, const TileFacts& tile)
      : vectors(s.k_tiles * s.k_warps * (tile.depth / tile.vector)),
        quarter_bits(s.column_bits > 2 ? 1 : 0),
        sent(s.units << quarter_bits),
        groups(kThreads / sent < s.ctas ? kThreads / sent : s.ctas),
        stride(stride_of_sums(s.units)) {}
};

// Bytes of shared memory, in the order in which the kernels take it.
inline int shared_bytes(const Split& s, const TileFacts& tile, int row_gates, int sent_gates, int states, int vectors) {
  using gpu::piece_bytes, gpu::Vec16;
  int bytes = piece_bytes<Vec16>(tiles_beyond(most_tiles(s, row_tiles(s, row_gates)), tile.resident) * kThreads);
  if (s.reduce_scatter) {
    const ReduceScatterLayout l(s, tile);
    bytes += piece_bytes<Vec16>(s.cluster ? 2 * s.ctas * l.sent : 0) + piece_bytes<float>(l.groups * tile.columns * l.stride) +
             piece_bytes<Vec16>(s.batch_tiles * l.vectors * tile.columns);
  } else {
    const AllGatherLayout l(s, tile, row_gates, sent_gates);
    bytes += piece_bytes<Vec16>(l.buffers * l.segment * tile.columns) +
             piece_bytes<float>(s.k_warps * tile.columns * l.stride) + piece_bytes<Vec16>(s.batch_tiles * l.own * tile.columns);
  }
  return bytes + piece_bytes<float>(states * s.batch_tiles * tile.columns * s.units) + piece_bytes<float>(vectors * s.units) +
         piece_bytes<int32_t>(s.batch_tiles * tile.columns) + piece_bytes<gpu::Mbarrier>(2);
}

// Bytes that a team's CTAs exchange through, in global memory.
inline int64_t operand_bytes(const Split& s, const TileFacts& tile, int row_gates, int sent_gates) {
  if (s.cluster) return 0;
  const int64_t slots = 2 * static_cast<int64_t>(s.batch_tiles) * static_cast<int64_t>(sizeof(gpu::Vec16));
  if (s.reduce_scatter) return slots * s.ctas * s.ctas * ReduceScatterLayout(s, tile).sent;
  return slots * AllGatherLayout(s, tile, row_gates, sent_gates).vectors << s.column_bits;
}

}  // namespace fastseq::recurrent
