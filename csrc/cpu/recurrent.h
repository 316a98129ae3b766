// The CPU ops of the recurrence; tensors as in fastseq/ops/recurrent.py, outputs allocated by the caller.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fastseq::cpu {

using torch::stable::Tensor;

// two_parts, here and below: float32 that AMX multiplies in parts of bfloat16 has two of them instead of three.
// Either the input x with w_ih and b_ih, or x_gates (rows x G*H), the input as projected outside.
void recurrent_forward(std::optional<Tensor> x, std::optional<Tensor> w_ih, std::optional<Tensor> b_ih,
                       std::optional<Tensor> x_gates, Tensor weight, std::optional<Tensor> vectors, std::optional<Tensor> projection,
                       std::optional<Tensor> h0, std::optional<Tensor> c0, std::optional<Tensor> lengths,
                       std::optional<Tensor> batch_sizes, std::optional<Tensor> hold_h, std::optional<Tensor> hold_c,
                       std::optional<Tensor> resets, std::optional<Tensor> reset_h, std::optional<Tensor> reset_c,
                       std::string cell, int64_t reverse, double zoneout_h, double zoneout_c, bool two_parts, Tensor y, Tensor h_n,
                       Tensor c_n, Tensor c, Tensor gates);

// A whole stack without gradients: the parameters as torch.nn.RNNBase lists them, of every layer and direction w_ih, w_hh, with biases
// b_ih, b_hh, w_hr if projected, and what the cell has beside. input [T, B, I], [B, T, I] with batch_first, [N, I] with batch_sizes, or of
// one step [B, I], whose states are [B, n]; resets [T, B] or [N]. Returns output, h_n (not of a step, where it is the output) and c_n if the
// cell has one; nothing where a call is not of the plain kind, be it wrong or merely rare.
std::vector<Tensor> recurrent_layers(Tensor input, std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                     std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::optional<Tensor> resets,
                                     std::string cell, int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first,
                                     double zoneout_h, double zoneout_c, std::optional<std::vector<Tensor>> kept, bool two_parts);

// The same of input [T, B, I] (batch_first: [B, T, I]) where `kept` is given, which also tells what stack it is.
std::vector<Tensor> recurrent_packed(Tensor input, std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                     std::vector<Tensor> kept, bool batch_first, bool two_parts);

// The same of one layer in one direction with no parameters beside weights and biases, input [T, B, I] (batch_first: [B, T, I]); kept: its
// packed weights. A short call pays for each argument, for a list of tensors more than for these, and for what TORCH_BOX makes of them:
// this is what that would make of
// (Tensor input, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, int how, Tensor? h0=None, Tensor? c0=None, Tensor? kept=None)
// -> (Tensor, Tensor, Tensor): output, h_n and c_n, undefined where there is none, all of them where it declines.
// how: the number of the cell, and these; without biases b_ih and b_hh are any tensors.
constexpr int64_t kBatchFirst = 1 << 8, kTwoParts = 1 << 9, kNoBiases = 1 << 10;
void recurrent_one_layer(StableIValue* stack, uint64_t arguments, uint64_t results);

// The same of one step, input [B, I] and states [B, n]: the states alone.
void recurrent_step(StableIValue* stack, uint64_t arguments, uint64_t results);

// One layer of the same kind, x [T, B, I], or [N, I] with batch_sizes, with what its gradients need: y [T, B, D, P] or [N, D, P], h_n, and
// in the dtype of c, fp32 or wider, c_n and c of every step, then the gates unless they are to be computed anew; (0,) for what there is
// not. hold_h, hold_c: masks of zoneout in training. Nothing where recurrent_layers would decline.
std::vector<Tensor> recurrent_layer(Tensor x, std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                    std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::optional<Tensor> hold_h,
                                    std::optional<Tensor> hold_c, std::optional<Tensor> resets, std::string cell, bool has_biases,
                                    bool bidirectional, double zoneout_h, double zoneout_c, bool save_gates, bool two_parts);

// recurrent_step, of the cell's name, with what its gradients need: h, the gates, and of a cell with a c this in fp32 or wider, and in the
// dtype of h if that is another.
std::vector<Tensor> recurrent_step_trained(Tensor input, Tensor h0, std::optional<Tensor> c0, Tensor w_ih, Tensor w_hh,
                                           std::optional<Tensor> b_ih, std::optional<Tensor> b_hh, std::string cell);

// The weights of a stack packed for recurrent_layers (`kept`), a tensor of bytes for each layer: "" as a call would pack them, or fp32 ones
// rounded to "bfloat16" or "int8". Nothing where recurrent_layers would decline. A call declines what was made of other weights, or of these
// before they were written, as far as a few of their values show it.
std::vector<Tensor> recurrent_pack(std::vector<Tensor> params, std::string cell, int64_t num_layers, bool has_biases,
                                   bool bidirectional, std::string weights);

// through_weights: whether the gradient goes through the recurrent weights here; else dh0 lacks that part (a single step).
void recurrent_backward(std::optional<Tensor> dy, std::optional<Tensor> dh_n, std::optional<Tensor> dc_n, std::optional<Tensor> dc,
                        Tensor weight, std::optional<Tensor> vectors, std::optional<Tensor> projection, std::optional<Tensor> h0,
                        std::optional<Tensor> c0, std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes,
                        std::optional<Tensor> hold_h, std::optional<Tensor> hold_c, std::optional<Tensor> resets,
                        std::optional<Tensor> reset_h, std::optional<Tensor> reset_c, Tensor y, Tensor c, Tensor gates,
                        std::string cell, int64_t reverse, double zoneout_h, double zoneout_c, bool through_weights, bool two_parts,
                        Tensor dgates, Tensor drecurrent, Tensor doutput, Tensor dh0, Tensor dc0, Tensor dreset_h, Tensor dreset_c);

// All gradients of what recurrent_layer left, of a cell without parameters beside weights and biases, but for a projection without zoneout:
// those that are `wanted`, of x, h0, c0, and of the parameters kind by kind (w_ih of each direction, w_hh, then b_ih, b_hh if there are
// any, and w_hr). What x holds beyond a sequence's length is not looked at. For few rows or without AMX the products are torch's, and the
// states are copied.
std::vector<Tensor> recurrent_layer_backward(std::optional<Tensor> dy, std::optional<Tensor> dh_n, std::optional<Tensor> dc_n, Tensor x,
                                             std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                             std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes,
                                             std::optional<Tensor> hold_h, std::optional<Tensor> hold_c, std::optional<Tensor> resets,
                                             Tensor y, Tensor c, Tensor gates, std::string cell, double zoneout_h, double zoneout_c,
                                             std::vector<bool> wanted, bool two_parts);

// Gradients of what recurrent_step_trained left: those that are `wanted` of x, h0, c0, w_ih, w_hh, b_ih and b_hh. If it wants none of the
// parameters', then also [B, G*H] those of the gates, from which they are made, and of a cell whose recurrent product has others at its last
// gate, these as well. y: h after the step, of an Elman RNN; c0 and c, after it, in fp32 or wider.
std::vector<Tensor> recurrent_step_backward(std::optional<Tensor> dh, std::optional<Tensor> dc, Tensor x, Tensor h0,
                                            std::optional<Tensor> c0, Tensor w_ih, Tensor w_hh, std::optional<Tensor> b_hh,
                                            std::optional<Tensor> y, std::optional<Tensor> c, Tensor gates, std::string cell,
                                            std::vector<bool> wanted);

// Gradients of w_ih, w_hh, b_ih and b_hh, those that are wanted, of steps together: of each a row of dgates and drecurrent [N, G*H], the
// gradients of W x and of R h, x [N, I] and the state before it, h [N, H].
std::vector<Tensor> recurrent_steps_gradients(Tensor dgates, Tensor drecurrent, Tensor x, Tensor h, std::vector<bool> wanted);

// Gradients of a layer's input and weights from what recurrent_backward gave. wanted: of each lane bits 0 to 3 for w_ih, w_hh, b_ih, b_hh,
// and bit 4 of the first for x. Returned in this order: x, then lane by lane. Nothing where torch's own products serve: without AMX, in
// other types than bfloat16 and float32, and for float32 whose parts would leave their range.
std::vector<Tensor> recurrent_gradients(Tensor x, Tensor dgates, Tensor drecurrent, Tensor y, std::optional<Tensor> h0,
                                        std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::optional<Tensor> resets,
                                        std::optional<Tensor> reset_h, std::vector<Tensor> w_ih, int64_t reverse,
                                        std::vector<int64_t> wanted, bool two_parts);

// Gradients of what a layer_norm_lstm or layer_norm_gru has inside a step, of a lane: [V*H] as wide as `vectors`, which are as wide as c.
// dgates [rows, G*H]; gates [rows, 2*G*H], as saved; of the LSTM also dm [rows, H], the gradient of a step's output before its projection,
// and c [rows, H] as the step proposed it, both as wide.
Tensor recurrent_norm_gradients(Tensor dgates, Tensor gates, std::optional<Tensor> dm, std::optional<Tensor> c, Tensor vectors,
                                std::string cell);

}  // namespace fastseq::cpu
