// Runs a plan: finds the kernel for it, and launches that once, or as often as the plan has waves.
#pragma once

#include <algorithm>

#include "../common/prims.cuh"
#include "cells.h"
#include "params.h"
#include "plan.h"
#include "tile_sizes.h"

namespace fastseq::recurrent {

template <class Params>
using Kernel = void (*)(Params);

// Defined in kernels_<precision>.cu, which compile side by side.
template <Precision kPrecision, class Params>
Kernel<Params> kernel_of(Cell cell, const Plan& plan);

template <class Params>
Kernel<Params> kernel_of(Precision precision, Cell cell, const Plan& plan) {
  switch (precision) {
    case Precision::kHalf: return kernel_of<Precision::kHalf, Params>(cell, plan);
    case Precision::kBfloat16: return kernel_of<Precision::kBfloat16, Params>(cell, plan);
    case Precision::kTf32: return kernel_of<Precision::kTf32, Params>(cell, plan);
    case Precision::kFloat: return kernel_of<Precision::kFloat, Params>(cell, plan);
  }
  return nullptr;
}

// The params' split becomes the plan's. "" or what the CUDA runtime says against a launch.
template <class Params>
const char* run(const Plan& plan, Cell cell, Precision precision, Params params, void* stream) {
  const Kernel<Params> kernel = kernel_of<Params>(precision, cell, plan);
  if (!kernel) return "there is no CUDA kernel for this cell in this precision";
  params.split = plan.split;
  const int ctas = plan.split.ctas;
  for (int first = 0; first < plan.teams; first += plan.teams_at_once) {
    params.split.first_team = first;
    const int teams = std::min(plan.teams_at_once, plan.teams - first);
    const bool cluster = plan.split.cluster;
    const gpu::Launch how{teams * ctas, kThreads, cluster ? ctas : 1, plan.shared_bytes, !cluster && ctas > 1, stream};
    const char* error = gpu::launch(kernel, how, params);
    if (*error) return error;
  }
  return "";
}

}  // namespace fastseq::recurrent
