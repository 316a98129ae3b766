// The kernels of one precision: for every cell forward and backward, by exchange and by tiles of columns.
#pragma once

#include <type_traits>

#include "backward_kernel.cuh"
#include "cells.h"
#include "forward_kernel.cuh"
#include "run.cuh"

namespace fastseq::recurrent {

template <Precision kPrecision>
struct TileOf;
template <>
struct TileOf<Precision::kHalf> {
  using Tile = Tile16<gpu::Half>;
};
template <>
struct TileOf<Precision::kBfloat16> {
  using Tile = Tile16<gpu::Bfloat16>;
};
template <>
struct TileOf<Precision::kTf32> {
  using Tile = TileTf32;
};
template <>
struct TileOf<Precision::kFloat> {
  using Tile = TileFloat;
};

template <class Params, template <class> class CellOf, class Tile>
Kernel<Params> kernel_of_cell(const Plan& plan) {
  const bool wide = plan.n_tiles > 1;
  if constexpr (std::is_same_v<Params, ForwardParams>) {
    return wide ? forward_kernel<CellOf, Tile, Tile::kNTiles> : forward_kernel<CellOf, Tile, 1>;
  } else {
    if (plan.split.reduce_scatter) return backward_reduce_scatter_kernel<CellOf, Tile>;
    return wide ? backward_kernel<CellOf, Tile, Tile::kNTiles> : backward_kernel<CellOf, Tile, 1>;
  }
}

template <Precision kPrecision, class Params>
Kernel<Params> kernel_of(Cell cell, const Plan& plan) {
  using Tile = typename TileOf<kPrecision>::Tile;
  switch (cell) {
#define FASTSEQ_CELL(type, name) \
  case Cell::k##type: return kernel_of_cell<Params, type, Tile>(plan);
    FASTSEQ_CUDA_CELLS(FASTSEQ_CELL)
#undef FASTSEQ_CELL
  }
  return nullptr;
}

}  // namespace fastseq::recurrent
