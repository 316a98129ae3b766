// Sizes that follow from a split: of shared memory, of what CTAs exchange. For kernels, planner and hosts alike.
#pragma once

#include "../common/machine.h"
#include "../common/portable.h"
#include "params.h"

namespace fastseq::recurrent {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Units of a CTA: at most a tile of the product's rows for every warp, and no more than leaves a thread registers.
constexpr int most_units(int gates) { return gates == 1 ? 64 : 32; }

// Facts about a tile type that the host needs too.
struct TileFacts {
  int depth;     // of a tile
  int vector;    // numbers in 16 bytes
  int resident;  // tiles of a warp's weights in registers
  int columns;   // of a chunk
};

// The same facts as in tiles.cuh, for hosts; wide: whether a chunk has more than one tile of columns.
constexpr TileFacts tile_facts(Precision precision, bool wide) {
  switch (precision) {
    case Precision::kHalf:
    case Precision::kBfloat16: return {16, 8, 32, wide ? 32 : 8};
    case Precision::kTf32: return {8, 4, 32, wide ? 32 : 8};
    case Precision::kFloat: break;
  }
  return {8, 4, 24, wide ? 16 : 8};
}

struct Layout {
  int own;            // 16-byte vectors of depth that a CTA sends, per column
  int vectors;        // of a chunk's depth, per column
  int segment_tiles;  // depth of a segment, in tiles
  int shared_tiles;   // of a warp's weights, in shared memory
  int buffers;        // of shared memory for segments
  int rows;           // of a CTA's part of the product, whole tiles
  int stride;         // between columns of partial sums

  // gates: 1 in the backward pass for rows, G for what is sent; the other way round in the forward pass
  constexpr FASTSEQ_HOST_DEVICE Layout(const Split& s, const TileFacts& tile, int row_gates, int sent_gates)
      : own(s.units() * sent_gates / tile.vector),
        vectors(s.k_tiles * (tile.depth / tile.vector)),
        segment_tiles((((s.k_tiles + s.segments - 1) / s.segments) + s.k_warps - 1) / s.k_warps * s.k_warps),
        shared_tiles(beyond((s.k_tiles + s.k_warps - 1) / s.k_warps, tile.resident)),
        buffers(s.cluster || s.chunks * s.segments > 1 ? 2 : 1),
        rows((s.units() * row_gates + 15) / 16 * 16),
        stride(rows + 4) {}  // 4 beyond a multiple of 16: no two lanes of a fragment meet in a bank

  static constexpr FASTSEQ_HOST_DEVICE int beyond(int tiles, int resident) { return tiles > resident ? tiles - resident : 0; }
};

// Bytes of shared memory, in the order in which the kernels take it.
inline int shared_bytes(const Split& s, const TileFacts& tile, int row_gates, int sent_gates, int states, int vectors) {
  const Layout l(s, tile, row_gates, sent_gates);
  const int items = s.chunks * tile.columns * s.units();
  return gpu::piece_bytes<gpu::Vec16>(l.shared_tiles * kThreads) +
         gpu::piece_bytes<gpu::Vec16>(l.buffers * l.segment_tiles * (tile.depth / tile.vector) * tile.columns) +
         gpu::piece_bytes<float>(s.k_warps * tile.columns * l.stride) +
         gpu::piece_bytes<gpu::Vec16>(s.chunks * l.own * tile.columns) + gpu::piece_bytes<float>(states * items) +
         gpu::piece_bytes<float>(vectors * s.units()) + gpu::piece_bytes<int32_t>(s.chunks * tile.columns) +
         gpu::piece_bytes<gpu::Mbarrier>(2);
}

// Bytes that a team's CTAs exchange through, in global memory.
inline int64_t operand_bytes(const Split& s, const TileFacts& tile, int row_gates, int sent_gates) {
  if (s.cluster) return 0;
  const Layout l(s, tile, row_gates, sent_gates);
  return 2 * static_cast<int64_t>(s.chunks) * l.vectors * tile.columns * static_cast<int64_t>(sizeof(gpu::Vec16));
}

}  // namespace fastseq::recurrent
