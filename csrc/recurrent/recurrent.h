// The ops of the CUDA recurrence; tensors as in fastseq/ops/recurrent.py, results and workspace allocated by the caller.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastseq::recurrent {

using torch::stable::Tensor;

// Names of a plan's fields, in the order of its numbers.
std::vector<std::string> recurrent_plan_fields();

// (why no kernel can run it or "", predicted microseconds of a step, the plan's fields, how many plans there are). precision: fp16,
// bf16, tf32 or ieee. device: multiprocessors, bytes of shared memory for a CTA, CTAs of a cluster (0: none), whether launches can be
// cooperative. rank: 0 for the best plan by the model, 1 for the second.
std::tuple<std::string, double, std::vector<int64_t>, int64_t> recurrent_plan(std::string cell, std::string precision, bool backward,
                                                                              int64_t batch, int64_t lanes, int64_t hidden,
                                                                              std::vector<int64_t> device, int64_t rank);

// starts [T] and lengths [B], int64, resets, uint8, and their states: as in params.h. plan: the fields of recurrent_plan for the tensors'
// device. operands and flags: as much as the plan asks for, flags zero. Tensors that nobody wants or has are empty.
void recurrent_cuda_forward(std::string cell, std::string precision, std::vector<int64_t> plan, Tensor x_gates, Tensor weight,
                            std::optional<Tensor> vectors, std::optional<Tensor> h0, std::optional<Tensor> c0, Tensor y, Tensor h_n,
                            Tensor c_n, Tensor c, Tensor gates, std::optional<Tensor> starts, std::optional<Tensor> lengths,
                            int64_t steps, int64_t batch, int64_t lanes, int64_t hidden, int64_t reverse, Tensor operands,
                            Tensor flags, std::optional<Tensor> resets, std::optional<Tensor> reset_h,
                            std::optional<Tensor> reset_c);

void recurrent_cuda_backward(std::string cell, std::string precision, std::vector<int64_t> plan, std::optional<Tensor> dy,
                             std::optional<Tensor> dh_n, std::optional<Tensor> dc_n, std::optional<Tensor> dc, Tensor weight,
                             std::optional<Tensor> vectors, std::optional<Tensor> h0, std::optional<Tensor> c0, Tensor y, Tensor c,
                             Tensor gates, Tensor dgates, Tensor drecurrent, Tensor dh0, Tensor dc0, std::optional<Tensor> starts,
                             std::optional<Tensor> lengths, int64_t steps, int64_t batch, int64_t lanes, int64_t hidden,
                             int64_t reverse, Tensor operands, Tensor flags, std::optional<Tensor> resets,
                             std::optional<Tensor> reset_h, std::optional<Tensor> reset_c, Tensor dreset_h, Tensor dreset_c);

}  // namespace fastseq::recurrent
