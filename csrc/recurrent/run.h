// Runs a plan: in one launch, or in as many as the plan has waves.
#pragma once

#include <algorithm>

#include "launch.h"
#include "plan.h"

namespace fastseq::recurrent {

// The params' split becomes the plan's. "" or what the CUDA runtime says against a launch.
template <class Params>
const char* run(const Plan& plan, Cell cell, Precision precision, Params params, void* stream) {
  params.split = plan.split;
  const int ctas = plan.split.ctas;
  for (int first = 0; first < plan.teams; first += plan.teams_at_once) {
    params.split.first_team = first;
    const int teams = std::min(plan.teams_at_once, plan.teams - first);
    const bool cluster = plan.split.cluster;
    const gpu::Launch how{teams * ctas, kThreads, cluster ? ctas : 1, plan.shared_bytes, !cluster && ctas > 1, stream};
    const char* error = launch(precision, cell, plan.wide, how, params);
    if (*error) return error;
  }
  return "";
}

}  // namespace fastseq::recurrent
