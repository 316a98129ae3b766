// Starts the kernel for a cell, a precision and a width of the chunks. "" or what the CUDA runtime says against it.
#pragma once

#include "../common/machine.h"
#include "cells.h"
#include "params.h"

namespace fastseq::recurrent {

// Defined in kernels_<precision>.cu.
template <Precision kPrecision>
const char* launch(Cell cell, bool wide, const gpu::Launch& how, const ForwardParams& params);
template <Precision kPrecision>
const char* launch(Cell cell, bool wide, const gpu::Launch& how, const BackwardParams& params);

template <class Params>
const char* launch(Precision precision, Cell cell, bool wide, const gpu::Launch& how, const Params& params) {
  switch (precision) {
    case Precision::kHalf: return launch<Precision::kHalf>(cell, wide, how, params);
    case Precision::kBfloat16: return launch<Precision::kBfloat16>(cell, wide, how, params);
    case Precision::kTf32: return launch<Precision::kTf32>(cell, wide, how, params);
    case Precision::kFloat: return launch<Precision::kFloat>(cell, wide, how, params);
  }
  return "there are no CUDA kernels of this precision";
}

}  // namespace fastseq::recurrent
