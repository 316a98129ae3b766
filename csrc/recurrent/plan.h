// How a call's work is cut for a device: a pure function of both, with reasons. No torch, no CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cells.h"
#include "layout.h"
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
  bool wide;              // chunks of several tiles of columns
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

// A plan as plain numbers, for callers to keep, and back; kPlanNumbers of them, without obstacle and prediction.
constexpr int kPlanNumbers = 17;
std::vector<int64_t> numbers_of(const Plan& plan);
Plan plan_of(const std::vector<int64_t>& numbers);

}  // namespace fastseq::recurrent
