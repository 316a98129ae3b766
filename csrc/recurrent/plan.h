// How a call's work is cut for a device: a pure function of both, with reasons. No torch, no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cells.h"
#include "params.h"

namespace fastseq::recurrent {

struct Device {
  int32_t multiprocessors;
  int32_t shared_bytes;  // that a CTA may have
  int32_t cluster;       // CTAs that a cluster of these kernels may have; 0: no clusters
  bool cooperative;      // whether a launch can demand that all its CTAs run at the same time
};

struct Problem {
  Cell cell;
  Precision precision;
  bool backward;
  int64_t batch, lanes, hidden;
};

struct Plan {
  std::string obstacle;  // why no kernel can run it; empty: it can
  Split split;
  int32_t n_tiles;        // tiles of columns of a batch tile: 1, or as many as the tile type has when it is wide
  int32_t teams;          // of the whole call
  int32_t teams_at_once;  // of a launch
  int32_t shared_bytes;   // of a CTA
  int64_t operand_bytes;  // of a team, in global memory
  double step_us;         // what the model below predicts for a step of all teams

  bool operator==(const Plan&) const = default;
};

// Every plan that fits the device, the fastest by the model first; or one that has the obstacle alone.
std::vector<Plan> plans(const Problem& problem, const Device& device);

// By the names that the ops use: "rnn_tanh", "rnn_relu", "lstm", "gru"; "fp16", "bf16", "tf32", "ieee". False: there is no such one.
bool find(std::string_view name, Cell& cell);
bool find(std::string_view name, Precision& precision);

// What a caller keeps of a plan and gives to a launch, X(name, field); all but the obstacle and the prediction.
#define FASTSEQ_PLAN_FIELDS(X)              \
  X("units", split.units)                   \
  X("ctas", split.ctas)                     \
  X("parts", split.parts)                   \
  X("rows", split.rows)                     \
  X("batch_tiles", split.batch_tiles)       \
  X("column_bits", split.column_bits)       \
  X("m_bits", split.m_bits)                 \
  X("k_warps", split.k_warps)               \
  X("k_tiles", split.k_tiles)               \
  X("k_segments", split.k_segments)         \
  X("cluster", split.cluster)               \
  X("reduce_scatter", split.reduce_scatter) \
  X("n_tiles", n_tiles)                     \
  X("teams", teams)                         \
  X("teams_at_once", teams_at_once)         \
  X("shared_bytes", shared_bytes)           \
  X("operand_bytes", operand_bytes)

#define FASTSEQ_ONE(name, field) +1
constexpr size_t kPlanFields = 0 FASTSEQ_PLAN_FIELDS(FASTSEQ_ONE);
#undef FASTSEQ_ONE

// The names in order, the numbers of a plan in the same order, and the plan again.
std::vector<std::string> plan_fields();
std::vector<int64_t> numbers_of(const Plan& plan);
Plan plan_of(const std::vector<int64_t>& numbers);

}  // namespace fastseq::recurrent
