// The kernels of one precision, for every cell and width.
#pragma once

#include "backward_kernel.cuh"
#include "cells.h"
#include "forward_kernel.cuh"
#include "launch.h"

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

template <template <class> class CellOf, class Tile>
const char* launch_cell(bool wide, const gpu::Launch& how, const ForwardParams& params) {
  return gpu::launch(wide ? forward_kernel<CellOf, Tile, Tile::kWide> : forward_kernel<CellOf, Tile, 1>, how, params);
}
template <template <class> class CellOf, class Tile>
const char* launch_cell(bool wide, const gpu::Launch& how, const BackwardParams& params) {
  if (params.split.scatter) return gpu::launch(backward_scatter_kernel<CellOf, Tile>, how, params);
  return gpu::launch(wide ? backward_kernel<CellOf, Tile, Tile::kWide> : backward_kernel<CellOf, Tile, 1>, how, params);
}

template <class Tile, class Params>
const char* launch_tile(Cell cell, bool wide, const gpu::Launch& how, const Params& params) {
  switch (cell) {
#define FASTSEQ_CELL(type, name) \
  case Cell::k##type: return launch_cell<type, Tile>(wide, how, params);
    FASTSEQ_CUDA_CELLS(FASTSEQ_CELL)
#undef FASTSEQ_CELL
  }
  return "there are no CUDA kernels for this cell";
}

template <Precision kPrecision>
const char* launch(Cell cell, bool wide, const gpu::Launch& how, const ForwardParams& params) {
  return launch_tile<typename TileOf<kPrecision>::Tile>(cell, wide, how, params);
}
template <Precision kPrecision>
const char* launch(Cell cell, bool wide, const gpu::Launch& how, const BackwardParams& params) {
  return launch_tile<typename TileOf<kPrecision>::Tile>(cell, wide, how, params);
}

}  // namespace fastseq::recurrent
