// Sizes of the tiles that a warp multiplies, and of a CTA: for kernels, planner and hosts alike.
#pragma once

#include "../common/portable.h"
#include "params.h"

namespace fastseq::recurrent {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

constexpr int kTileRows = 16;
constexpr int kTileColumns = 8;

// Of every product by mma.sync.
struct MmaSizes {
  static constexpr int kResident = 32;  // tiles of weights that a warp keeps in registers
  static constexpr int kNTiles = 4;     // tiles of columns in a wide batch tile; with more of either, spills begin
  // Tiles of depth that are multiplied together, so that operands are on their way from shared memory while others are multiplied; in
  // a wide batch tile fewer.
  static constexpr int kBlock = 4, kWideBlock = 2;
};

// fp16 and bf16
struct Sizes16 : MmaSizes {
  static constexpr int kDepth = 16;  // of a tile
  static constexpr int kVector = 8;  // numbers in 16 bytes
};

struct SizesTf32 : MmaSizes {
  static constexpr int kDepth = 8;
  static constexpr int kVector = 4;
};

// fp32 by FMAs, whose sums take more registers
struct SizesFloat {
  static constexpr int kDepth = 8;
  static constexpr int kVector = 4;
  static constexpr int kResident = 24;
  static constexpr int kNTiles = 2;
  static constexpr int kBlock = 2, kWideBlock = 2;
};

// The same as values; columns are those of a batch tile.
struct TileFacts {
  int depth, vector, resident, columns, block;
};

template <class Sizes>
constexpr FASTSEQ_HOST_DEVICE TileFacts facts_of_tile(int n_tiles) {
  return {Sizes::kDepth, Sizes::kVector, Sizes::kResident, n_tiles * kTileColumns, n_tiles > 1 ? Sizes::kWideBlock : Sizes::kBlock};
}

constexpr TileFacts facts_of_tile(Precision precision, bool wide) {
  switch (precision) {
    case Precision::kHalf:
    case Precision::kBfloat16: return facts_of_tile<Sizes16>(wide ? Sizes16::kNTiles : 1);
    case Precision::kTf32: return facts_of_tile<SizesTf32>(wide ? SizesTf32::kNTiles : 1);
    case Precision::kFloat: break;
  }
  return facts_of_tile<SizesFloat>(wide ? SizesFloat::kNTiles : 1);
}

// Units of a CTA at most: what leaves a thread registers for its weights.
constexpr int most_units(int gates, bool gathers_gates, bool wide) { return gates == 1 ? 64 : gathers_gates || wide ? 32 : 40; }

}  // namespace fastseq::recurrent
