// The CPU ops of attention; tensors as in fastseq/ops/attention.py, but relative_bias, relative_k, slopes and sinks contiguous.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fastseq::cpu {

using torch::stable::Tensor;

// `Spec` of fastseq/ops/types.py, its fields in their order.
struct AttentionSpec {
  std::optional<Tensor> mask, bias, relative_bias, relative_q, relative_k, slopes, sinks, q_lengths, k_lengths, cu_q, cu_k, blocks, seed;
  double scale, softcap = 0, dropout = 0;
  int64_t left = -1, right = -1;
  bool bottom_right = false;
  int64_t offset = 0, relative_bias_zero = 0, relative_k_zero = 0, block_size = 0, max_q = 0, max_k = 0;
};

// The same as parameters of an op, and as what an op was given.
#define FASTSEQ_ATTENTION_SPEC                                                                                                        \
  std::optional<Tensor> mask, std::optional<Tensor> bias, std::optional<Tensor> relative_bias, std::optional<Tensor> relative_q,      \
      std::optional<Tensor> relative_k, std::optional<Tensor> slopes, std::optional<Tensor> sinks, std::optional<Tensor> q_lengths,   \
      std::optional<Tensor> k_lengths, std::optional<Tensor> cu_q, std::optional<Tensor> cu_k, std::optional<Tensor> blocks,          \
      std::optional<Tensor> seed, double scale, double softcap, double dropout, int64_t left, int64_t right, bool bottom_right,       \
      int64_t offset, int64_t relative_bias_zero, int64_t relative_k_zero, int64_t block_size, int64_t max_q, int64_t max_k
#define FASTSEQ_ATTENTION_GIVEN                                                                                                       \
  {                                                                                                                                   \
    mask, bias, relative_bias, relative_q, relative_k, slopes, sinks, q_lengths, k_lengths, cu_q, cu_k, blocks, seed, scale, softcap, \
        dropout, left, right, bottom_right, offset, relative_bias_zero, relative_k_zero, block_size, max_q, max_k                     \
  }

// saves: for a backward pass.
std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, FASTSEQ_ATTENTION_SPEC, bool saves);

// From the gradients of out (with which v and out go), of lse and of the weights after dropout or, if `average`, of their average, each of
// which may be missing: those of GRADIENTS and delta, (0,) where not wanted.
std::vector<Tensor> attention_backward(std::optional<Tensor> dout, std::optional<Tensor> dlse, std::optional<Tensor> dweights, bool average,
                                       Tensor q, Tensor k, std::optional<Tensor> v, std::optional<Tensor> out, Tensor lse,
                                       FASTSEQ_ATTENTION_SPEC, std::vector<bool> wanted);

std::tuple<Tensor, Tensor, Tensor> attention_with_weights(Tensor q, Tensor k, Tensor v, FASTSEQ_ATTENTION_SPEC, bool average);
Tensor attention_weights(Tensor q, Tensor k, Tensor lse, FASTSEQ_ATTENTION_SPEC, bool average);

// A lse for the gradients of the functions below: [B, H, Tq], or [2, B, H, Tq], of which the second is what rounding took from the first.
Tensor lse_for_gradients(int64_t B, int64_t H, int64_t Tq, int64_t Tk, torch::headeronly::ScalarType type);

// For other host parts: the results go into tensors that are given, of any strides (lse and weights contiguous), the lse, for a backward
// pass, and the weights where there is one for them, gradients where there is one for each. Without q_lengths and sinks; nothing has size 0.
void attention_into(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec, const Tensor& out,
                    const std::optional<Tensor>& lse, const std::optional<Tensor>& weights, bool average);
// The same of tensors [B, H, T, E], or [B, T, H, E] with time_first, with no feature but these.
void plain_attention_into(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal, bool bottom_right, bool time_first,
                          const Tensor& out);
void attention_backward_into(const Tensor& dout, const std::optional<Tensor>& dweights, bool average, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& out, const Tensor& lse, const AttentionSpec& spec,
                             const std::optional<Tensor>& dq, const std::optional<Tensor>& dk, const std::optional<Tensor>& dv,
                             const std::optional<Tensor>& dbias);

}  // namespace fastseq::cpu
