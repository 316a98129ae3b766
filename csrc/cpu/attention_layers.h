// Attention as torch's functions and modules take it, in one call each. They give back nothing where a call is not of
// the plain kind, be it wrong or merely rare: the long way says what is wrong with it, or deals with it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fastseq::cpu {

using torch::stable::Tensor;

// torch.nn.functional.scaled_dot_product_attention; with wants_lse also `lse_for_gradients`. A dropout needs a seed. bottom_right: is_causal
// has the last query at the last key. time_first: tensors are [B, L, H, E].
std::vector<Tensor> scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, bool is_causal,
                                                 std::optional<double> scale, bool enable_gqa, bool wants_lse, double dropout,
                                                 std::optional<Tensor> seed, bool bottom_right, bool time_first);

// The same without mask, dropout and lse, of which a short call is to feel nothing. `how` is a sum of bits; the scale counts with
// kPlainScaled alone.
enum Plain : int64_t {
  kPlainCausal = 1,
  kPlainBottomRight = 2,
  kPlainGrouped = 4,
  kPlainTimeFirst = 8,
  kPlainScaled = 16,
  // As fastseq.functional.attention takes it: of four dimensions, with a finite scale, a number of heads that leaves no doubt about the
  // layout unless it is kPlainLaidOut, and places that kPlainBottomRight tells where numbers of queries and keys differ.
  kPlainUnambiguous = 32,
  kPlainLaidOut = 64,
  kPlainKeys = 128,  // times the number of keys from which the call is another's; 0: from none
};
std::optional<Tensor> plain_attention(Tensor query, Tensor key, Tensor value, double scale, int64_t how);

// Of four dimensions, after the above with its lse: those gradients that are wanted of query, key, value and an attn_mask that is added.
std::vector<Tensor> scaled_dot_product_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
                                                          std::optional<Tensor> attn_mask, bool is_causal, std::optional<double> scale,
                                                          double dropout, std::optional<Tensor> seed, bool bottom_right, bool time_first,
                                                          std::vector<bool> wanted);

// The forward of torch.nn.MultiheadAttention with one in_proj_weight; the weights, if needed, behind the output. is_causal: the causal mask
// is meant by attn_mask, which is not read.
std::vector<Tensor> multihead_attention(Tensor query, Tensor key, Tensor value, int64_t num_heads, Tensor in_proj_weight,
                                        std::optional<Tensor> in_proj_bias, Tensor out_proj_weight, std::optional<Tensor> out_proj_bias,
                                        std::optional<Tensor> key_padding_mask, std::optional<Tensor> attn_mask, bool batch_first,
                                        bool is_causal, bool need_weights, bool average_attn_weights);

// torch.nn.functional.linear by the own kernels for matrices; nothing where they are not the ones for it.
std::vector<Tensor> linear_forward(Tensor input, Tensor weight, std::optional<Tensor> bias);
// The gradients of input, weight and bias, of size 0 where not wanted; by torch's products where the own ones do not take the numbers.
std::vector<Tensor> linear_backward(Tensor dout, Tensor input, Tensor weight, std::vector<bool> wanted);

// Attention between its projections, for a layer with gradients: q, k and v of all heads, E features each, one after another in one to
// three tensors `projected`, [N, L, ..] (batch_first) or [L, N, ..], of q or [.., S, ..] of k and v alone; masks and options as above.
// Returns the heads' results, shaped as the input of the layer, `lse_for_gradients`, the weights if needed. A dropout needs a seed.
std::vector<Tensor> projected_attention(std::vector<Tensor> projected, int64_t num_heads, std::optional<Tensor> key_padding_mask,
                                        std::optional<Tensor> attn_mask, bool batch_first, bool is_causal, double dropout,
                                        std::optional<Tensor> seed, bool need_weights, bool average_attn_weights);
// The gradients of `projected`, contiguous; dweights: that of the weights, if they have one.
std::vector<Tensor> projected_attention_backward(Tensor dout, std::optional<Tensor> dweights, std::vector<Tensor> projected, Tensor out,
                                                 Tensor lse, int64_t num_heads, std::optional<Tensor> key_padding_mask,
                                                 std::optional<Tensor> attn_mask, bool batch_first, bool is_causal, double dropout,
                                                 std::optional<Tensor> seed, bool average_attn_weights);

// torch.nn.TransformerEncoderLayer with biases. Parameters: in_proj, out_proj, norm1, norm2, linear1, linear2, of each weight and bias. gelu:
// the activation, else a relu. dropouts: of the attention's weights, dropout1, dropout, dropout2, each below 1, with a seed int64 [2]; none
// without. saves: behind the output comes what the gradients need; src is contiguous then, and with a seed.
std::vector<Tensor> transformer_encoder_layer(Tensor src, std::vector<Tensor> parameters, int64_t num_heads, bool gelu, bool norm_first,
                                              double eps, std::optional<Tensor> src_mask, std::optional<Tensor> src_key_padding_mask,
                                              bool batch_first, bool is_causal, std::vector<double> dropouts, std::optional<Tensor> seed,
                                              bool saves);
// The gradients of src and of the parameters; of size 0, or not to be used, where they are not wanted.
std::vector<Tensor> transformer_encoder_layer_backward(Tensor dout, std::vector<Tensor> saved, Tensor src, std::vector<Tensor> parameters,
                                                       int64_t num_heads, bool gelu, bool norm_first, double eps,
                                                       std::optional<Tensor> src_mask, std::optional<Tensor> src_key_padding_mask,
                                                       bool batch_first, bool is_causal, std::vector<double> dropouts,
                                                       std::optional<Tensor> seed, std::vector<bool> wanted);

}  // namespace fastseq::cpu
