// Attention against a cache; tensors as in fastseq/ops/attention_decode.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace fastseq::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, std::optional<Tensor> block_table,
                                            std::optional<Tensor> slopes, std::optional<Tensor> sinks, double scale, double softcap,
                                            int64_t left, int64_t right, int64_t num_splits);

}  // namespace fastseq::cpu
