// LSTM cell with layer norm, gates i f g o, N a norm over the units of a row (of R h: over those of all its gates):
// i, f, o = sigmoid(x + w N(R h)), g = tanh(x + w N(R h)), c = f c + i g, h = o tanh(w_c N(c) + b_c).
// Whoever runs it takes the norms: the products r come normalized, and h follows c when all units of c are there.
#pragma once

#include "lstm.h"

namespace fastseq {

template <class Math>
struct LayerNormLstm {
  using V = typename Math::V;
  static constexpr int kGates = 4;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 8;    // i f g o, and R h of each
  static constexpr int kVectors = 6;  // w_i w_f w_g w_o w_c b_c
  static constexpr int kOwnRecurrent = 4;
  static constexpr bool kNormalizesC = true;

  // r = N(R h)
  static FASTSEQ_HOST_DEVICE void forward(
      const V* x, const V* r, const V* vectors, V, const V* c, V* saved, V&, V* c_new) {
    saved[0] = Math::sigmoid(x[0] + vectors[0] * r[0]);
    saved[1] = Math::sigmoid(x[1] + vectors[1] * r[1]);
    saved[2] = Math::tanh(x[2] + vectors[2] * r[2]);
    saved[3] = Math::sigmoid(x[3] + vectors[3] * r[3]);
    c_new[0] = candidate(saved, c[0]);
  }

  // h, from o and N(c)
  static FASTSEQ_HOST_DEVICE V output(V o, const V* vectors, V c) { return o * Math::tanh(vectors[4] * c + vectors[5]); }

  // the gradient of N(c); dgate of o's gate
  static FASTSEQ_HOST_DEVICE V output_backward(V dh, V o, const V* vectors, V c, V& dgate) {
    const V one = V{} + 1;
    const V s = Math::tanh(vectors[4] * c + vectors[5]);
    dgate = dh * s * o * (one - o);
    return dh * o * (one - s * s) * vectors[4];
  }

  // dc the whole gradient of the new c, dx[3] as output_backward gave it -> dx of the gates, dr of N(R h)
  static FASTSEQ_HOST_DEVICE void backward(
      V, const V* dc, const V* saved, const V* vectors, V, const V* c, const V*, V* dx, V* dr, V& dh_direct, V* dc_prev) {
    const V i = saved[0], f = saved[1], g = saved[2];
    const V one = V{} + 1;
    dx[0] = dc[0] * g * i * (one - i);
    dx[1] = dc[0] * c[0] * f * (one - f);
    dx[2] = dc[0] * i * (one - g * g);
    for (int k = 0; k < kGates; ++k) dr[k] = dx[k] * vectors[k];
    dh_direct = V{};
    dc_prev[0] = dc[0] * f;
  }

  static FASTSEQ_HOST_DEVICE V candidate(const V* saved, V c) { return Lstm<Math>::candidate(saved, c); }
};

}  // namespace fastseq
