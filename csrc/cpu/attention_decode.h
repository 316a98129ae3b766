// Attention against a cache; tensors as in fastseq/ops/attention_decode.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fastseq::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, std::optional<Tensor> block_table,
                                            std::optional<Tensor> slopes, std::optional<Tensor> sinks, double scale, double softcap,
                                            int64_t left, int64_t right, int64_t num_splits);

// fastseq.functional.attention_with_kv_cache, its arguments in their order but for what says the same; without a scale 1 / sqrt(E). Returns out
// and lse, or nothing, and nothing is written then, where a call is not of the plain kind, be it wrong or merely rare.
std::vector<Tensor> attention_with_kv_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, std::optional<Tensor> k_new,
                                            std::optional<Tensor> v_new, std::optional<Tensor> block_table,
                                            std::optional<Tensor> slopes, std::optional<Tensor> sinks, bool time_first,
                                            std::optional<double> scale, double softcap, int64_t left, int64_t right,
                                            int64_t num_splits);

}  // namespace fastseq::cpu
