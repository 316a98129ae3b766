// Every op of the library, and nothing else. fastseq/ops/ gives them gradients, fake kernels and names in Python.
#include <torch/csrc/stable/library.h>

#include "common/build.h"
#include "common/device.h"
#include "cpu/attention.h"
#include "cpu/attention_decode.h"
#include "cpu/attention_layers.h"
#include "cpu/level.h"
#include "cpu/recurrent.h"
#include "cpu/scan.h"
#include "limits/exchange_op.h"
#include "limits/fma_op.h"
#include "recurrent/recurrent.h"

#define FASTSEQ_SPEC                                                                                                                  \
  "Tensor? mask, Tensor? bias, Tensor? relative_bias, Tensor? relative_q, Tensor? relative_k, Tensor? slopes, Tensor? sinks, "      \
  "Tensor? q_lengths, Tensor? k_lengths, Tensor? cu_q, Tensor? cu_k, Tensor? blocks, Tensor? seed, float scale, float softcap, "    \
  "float dropout, int left, int right, bool bottom_right, int offset, int relative_bias_zero, int relative_k_zero, int block_size, " \
  "int max_q, int max_k"

STABLE_TORCH_LIBRARY(fastseq_native, m) {
  m.def("version() -> str");
  m.def("architectures() -> str[]");
  m.def("cuda_versions() -> int[]");
  m.def("cuda_obstacle(int device) -> str");
  m.def("cuda_image(int device) -> int[]");
  m.def("cuda_stream_lent() -> bool");
  m.def("cpu_level() -> str");
  m.def("cpu_amx_obstacle() -> str");
  m.def("forget_environment() -> ()");
  m.def("cuda_limits(int device) -> int[]");
  m.def("recurrent_plan_fields() -> str[]");
  m.def("recurrent_plan(str cell, str precision, bool backward, int batch, int lanes, int hidden, int[] device, "
        "int rank=0) -> (str, float, int[], int)");
  m.def(
      "recurrent_forward(Tensor? x, Tensor? w_ih, Tensor? b_ih, Tensor? x_gates, Tensor weight, Tensor? vectors, "
      "Tensor? projection, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, "
      "Tensor? resets, Tensor? reset_h, Tensor? reset_c, str cell, int reverse, float zoneout_h, float zoneout_c, bool two_parts, "
      "Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) c, Tensor(e!) gates) -> ()");
  m.def(
      "recurrent_layers(Tensor input, Tensor? h0, Tensor? c0, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, "
      "Tensor? resets, str cell, int num_layers, bool has_biases, bool bidirectional, bool batch_first, float zoneout_h, "
      "float zoneout_c, Tensor[]? kept, bool two_parts) -> Tensor[]");
  m.def(
      "recurrent_packed(Tensor input, Tensor? h0, Tensor? c0, Tensor[] params, Tensor[] kept, bool batch_first, bool two_parts) -> "
      "Tensor[]");
  m.def(
      "recurrent_one_layer(Tensor input, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, int how, Tensor? h0=None, Tensor? c0=None, "
      "Tensor? kept=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "recurrent_step(Tensor input, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, int how, Tensor? h0=None, Tensor? c0=None, "
      "Tensor? kept=None) -> (Tensor, Tensor)");
  m.def(
      "recurrent_step_trained(Tensor input, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, str cell) "
      "-> Tensor[]");
  m.def(
      "recurrent_step_backward(Tensor? dh, Tensor? dc, Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_hh, "
      "Tensor? y, Tensor? c, Tensor gates, str cell, bool[] wanted) -> Tensor[]");
  m.def("recurrent_steps_gradients(Tensor dgates, Tensor drecurrent, Tensor x, Tensor h, bool[] wanted) -> Tensor[]");
  m.def(
      "recurrent_layer(Tensor x, Tensor? h0, Tensor? c0, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, "
      "Tensor? hold_c, Tensor? resets, str cell, bool has_biases, bool bidirectional, float zoneout_h, float zoneout_c, bool save_gates, "
      "bool two_parts) -> Tensor[]");
  m.def(
      "recurrent_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor[] params, "
      "Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, Tensor? resets, Tensor y, Tensor c, Tensor gates, str cell, "
      "float zoneout_h, float zoneout_c, bool[] wanted, bool two_parts) -> Tensor[]");
  m.def("recurrent_norm_gradients(Tensor dgates, Tensor gates, Tensor? dm, Tensor? c, Tensor vectors, str cell) -> Tensor");
  m.def(
      "recurrent_pack(Tensor[] params, str cell, int num_layers, bool has_biases, bool bidirectional, str weights) -> Tensor[]");
  m.def(
      "recurrent_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor weight, Tensor? vectors, Tensor? projection, "
      "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, Tensor? resets, Tensor? reset_h, "
      "Tensor? reset_c, Tensor y, Tensor c, Tensor gates, str cell, int reverse, float zoneout_h, float zoneout_c, "
      "bool through_weights, bool two_parts, Tensor(a!) dgates, Tensor(b!) drecurrent, Tensor(c!) doutput, Tensor(d!) dh0, "
      "Tensor(e!) dc0, Tensor(f!) dreset_h, Tensor(g!) dreset_c) -> ()");
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, Tensor? slopes, Tensor? sinks, "
      "float scale, float softcap, int left, int right, int num_splits) -> (Tensor, Tensor)");
  m.def(
      "attention_with_kv_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k_new, Tensor? v_new, "
      "Tensor? block_table, Tensor? slopes, Tensor? sinks, bool time_first, float? scale, float softcap, int left, int right, "
      "int num_splits) -> Tensor[]");
  m.def(
      "recurrent_gradients(Tensor x, Tensor dgates, Tensor drecurrent, Tensor y, Tensor? h0, Tensor? lengths, Tensor? batch_sizes, "
      "Tensor? resets, Tensor? reset_h, Tensor[] w_ih, int reverse, int[] wanted, bool two_parts) -> Tensor[]");
  m.def(
      "recurrent_cuda_forward(str cell, str precision, int[] plan, Tensor x_gates, Tensor weight, Tensor? vectors, Tensor? h0, "
      "Tensor? c0, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) c, Tensor(e!) gates, Tensor? starts, Tensor? lengths, "
      "int steps, int batch, int lanes, int hidden, int reverse, Tensor(f!) operands, Tensor(g!) flags, Tensor? resets, "
      "Tensor? reset_h, Tensor? reset_c) -> ()");
  m.def(
      "recurrent_cuda_backward(str cell, str precision, int[] plan, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, "
      "Tensor weight, Tensor? vectors, Tensor? h0, Tensor? c0, Tensor y, Tensor c, Tensor gates, Tensor(a!) dgates, "
      "Tensor(b!) drecurrent, Tensor(c!) dh0, Tensor(d!) dc0, Tensor? starts, Tensor? lengths, int steps, int batch, int lanes, "
      "int hidden, int reverse, Tensor(e!) operands, Tensor(f!) flags, Tensor? resets, Tensor? reset_h, Tensor? reset_c, "
      "Tensor(g!) dreset_h, Tensor(h!) dreset_c) -> ()");
  m.def(
      "scan_forward(Tensor b, Tensor a, Tensor? gate, Tensor? vector, Tensor? initial, Tensor? resets, Tensor? lengths, "
      "Tensor? cu_seqlens, str kind, str cell, bool reverse, Tensor(a!) h, Tensor(b!) final) -> ()");
  m.def("scan_layers(Tensor x, Tensor? initial, Tensor[] params, str cell, int gates, bool has_biases, bool batch_first) -> Tensor[]");
  m.def(
      "scan_backward(Tensor? dh, Tensor? dfinal, Tensor? b, Tensor a, Tensor? gate, Tensor? vector, Tensor h, Tensor? initial, "
      "Tensor? resets, Tensor? lengths, Tensor? cu_seqlens, str kind, str cell, bool reverse, Tensor(a!)? db, Tensor(b!)? da, "
      "Tensor(c!)? dgate, Tensor(d!)? dvector, Tensor(e!) dinitial) -> ()");
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, " FASTSEQ_SPEC ", bool saves=True) -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor? dout, Tensor? dlse, Tensor? dweights, bool average, Tensor q, Tensor k, Tensor? v, Tensor? out, "
        "Tensor lse, " FASTSEQ_SPEC ", bool[] wanted) -> Tensor[]");
  m.def("attention_with_weights(Tensor q, Tensor k, Tensor v, " FASTSEQ_SPEC ", bool average) -> (Tensor, Tensor, Tensor)");
  m.def("attention_weights(Tensor q, Tensor k, Tensor lse, " FASTSEQ_SPEC ", bool average) -> Tensor");
  m.def("scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, bool is_causal=False, "
        "float? scale=None, bool enable_gqa=False, bool wants_lse=False, float dropout=0.0, Tensor? seed=None, bool bottom_right=False, "
        "bool time_first=False) -> Tensor[]");
  m.def("plain_attention(Tensor query, Tensor key, Tensor value, float scale, int how) -> Tensor?");
  m.def("scaled_dot_product_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
        "Tensor? attn_mask, bool is_causal, float? scale, float dropout, Tensor? seed, bool bottom_right, bool time_first, "
        "bool[] wanted) -> Tensor[]");
  m.def("multihead_attention(Tensor query, Tensor key, Tensor value, int num_heads, Tensor in_proj_weight, Tensor? in_proj_bias, "
        "Tensor out_proj_weight, Tensor? out_proj_bias, Tensor? key_padding_mask, Tensor? attn_mask, bool batch_first, bool is_causal, "
        "bool need_weights, bool average_attn_weights) -> Tensor[]");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor[]");
  m.def("linear_backward(Tensor dout, Tensor input, Tensor weight, bool[] wanted) -> Tensor[]");
  m.def("projected_attention(Tensor[] projected, int num_heads, Tensor? key_padding_mask, Tensor? attn_mask, bool batch_first, "
        "bool is_causal, float dropout, Tensor? seed, bool need_weights, bool average_attn_weights) -> Tensor[]");
  m.def("projected_attention_backward(Tensor dout, Tensor? dweights, Tensor[] projected, Tensor out, Tensor lse, int num_heads, "
        "Tensor? key_padding_mask, Tensor? attn_mask, bool batch_first, bool is_causal, float dropout, Tensor? seed, "
        "bool average_attn_weights) -> Tensor[]");
  m.def("transformer_encoder_layer(Tensor src, Tensor[] parameters, int num_heads, bool gelu, bool norm_first, float eps, "
        "Tensor? src_mask, Tensor? src_key_padding_mask, bool batch_first, bool is_causal, float[] dropouts, Tensor? seed, bool saves) "
        "-> Tensor[]");
  m.def("transformer_encoder_layer_backward(Tensor dout, Tensor[] saved, Tensor src, Tensor[] parameters, int num_heads, bool gelu, "
        "bool norm_first, float eps, Tensor? src_mask, Tensor? src_key_padding_mask, bool batch_first, bool is_causal, float[] dropouts, "
        "Tensor? seed, bool[] wanted) -> Tensor[]");
  // The benchmark suite `limits` measures the machine with these; no module and no function of fastseq calls them.
  m.def("fma(Tensor start, float factor, float addend, int steps, Tensor(a!) results) -> ()");
  m.def("exchange(str kind, int steps, int ctas, int vectors, Tensor(a!) flags, Tensor(b!) operands, Tensor(c!) results) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("fma", TORCH_BOX(&fastseq::limits::fma_cpu));
  m.impl("recurrent_forward", TORCH_BOX(&fastseq::cpu::recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&fastseq::cpu::recurrent_backward));
  m.impl("recurrent_norm_gradients", TORCH_BOX(&fastseq::cpu::recurrent_norm_gradients));
  m.impl("recurrent_layer_backward", TORCH_BOX(&fastseq::cpu::recurrent_layer_backward));
  m.impl("attention_forward", TORCH_BOX(&fastseq::cpu::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastseq::cpu::attention_backward));
  m.impl("attention_with_weights", TORCH_BOX(&fastseq::cpu::attention_with_weights));
  m.impl("attention_weights", TORCH_BOX(&fastseq::cpu::attention_weights));
  m.impl("linear_backward", TORCH_BOX(&fastseq::cpu::linear_backward));
  m.impl("projected_attention_backward", TORCH_BOX(&fastseq::cpu::projected_attention_backward));
  m.impl("transformer_encoder_layer_backward", TORCH_BOX(&fastseq::cpu::transformer_encoder_layer_backward));
  m.impl("attention_decode", TORCH_BOX(&fastseq::cpu::attention_decode));
  m.impl("recurrent_gradients", TORCH_BOX(&fastseq::cpu::recurrent_gradients));
  m.impl("scan_forward", TORCH_BOX(&fastseq::cpu::scan_forward));
  m.impl("scan_backward", TORCH_BOX(&fastseq::cpu::scan_backward));
}

#if defined(FASTSEQ_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CUDA, m) {
  m.impl("exchange", TORCH_BOX(&fastseq::limits::exchange_cuda));
  m.impl("recurrent_cuda_forward", TORCH_BOX(&fastseq::recurrent::recurrent_cuda_forward));
  m.impl("recurrent_cuda_backward", TORCH_BOX(&fastseq::recurrent::recurrent_cuda_backward));
}
#endif

// These run without gradients alone, and are short: what torch does at this key for an op that has no gradients is a part of their time.
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, AutogradCPU, m) {
  m.impl("recurrent_one_layer", &fastseq::cpu::recurrent_one_layer);
  m.impl("recurrent_step", &fastseq::cpu::recurrent_step);
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&fastseq::version));
  m.impl("architectures", TORCH_BOX(&fastseq::architectures));
  m.impl("cuda_versions", TORCH_BOX(&fastseq::cuda_versions));
  m.impl("cuda_obstacle", TORCH_BOX(&fastseq::cuda_obstacle));
  m.impl("cuda_image", TORCH_BOX(&fastseq::cuda_image));
  m.impl("cuda_stream_lent", TORCH_BOX(&fastseq::cuda_stream_lent));
  m.impl("cpu_level", TORCH_BOX(&fastseq::cpu::cpu_level));
  m.impl("cpu_amx_obstacle", TORCH_BOX(&fastseq::cpu::cpu_amx_obstacle));
  m.impl("forget_environment", TORCH_BOX(&fastseq::cpu::forget_environment));
  m.impl("scaled_dot_product_attention", TORCH_BOX(&fastseq::cpu::scaled_dot_product_attention));  // these decline what is not on the CPU
  m.impl("plain_attention", TORCH_BOX(&fastseq::cpu::plain_attention));
  m.impl("scaled_dot_product_attention_backward", TORCH_BOX(&fastseq::cpu::scaled_dot_product_attention_backward));
  m.impl("multihead_attention", TORCH_BOX(&fastseq::cpu::multihead_attention));
  m.impl("linear", TORCH_BOX(&fastseq::cpu::linear_forward));
  m.impl("projected_attention", TORCH_BOX(&fastseq::cpu::projected_attention));
  m.impl("transformer_encoder_layer", TORCH_BOX(&fastseq::cpu::transformer_encoder_layer));
  m.impl("attention_with_kv_cache", TORCH_BOX(&fastseq::cpu::attention_with_kv_cache));
  m.impl("scan_layers", TORCH_BOX(&fastseq::cpu::scan_layers));
  m.impl("recurrent_layers", TORCH_BOX(&fastseq::cpu::recurrent_layers));
  m.impl("recurrent_packed", TORCH_BOX(&fastseq::cpu::recurrent_packed));
  m.impl("recurrent_one_layer", &fastseq::cpu::recurrent_one_layer);
  m.impl("recurrent_step", &fastseq::cpu::recurrent_step);
  m.impl("recurrent_step_trained", TORCH_BOX(&fastseq::cpu::recurrent_step_trained));
  m.impl("recurrent_step_backward", TORCH_BOX(&fastseq::cpu::recurrent_step_backward));
  m.impl("recurrent_steps_gradients", TORCH_BOX(&fastseq::cpu::recurrent_steps_gradients));
  m.impl("recurrent_layer", TORCH_BOX(&fastseq::cpu::recurrent_layer));
  m.impl("recurrent_pack", TORCH_BOX(&fastseq::cpu::recurrent_pack));
  m.impl("cuda_limits", TORCH_BOX(&fastseq::cuda_limits));
  m.impl("recurrent_plan_fields", TORCH_BOX(&fastseq::recurrent::recurrent_plan_fields));
  m.impl("recurrent_plan", TORCH_BOX(&fastseq::recurrent::recurrent_plan));
}
