// LSTM cell with peephole connections, gates i f g o: i, f = sigmoid(x + R h + p c), g = tanh(x + R h), c = f c + i g,
// o = sigmoid(x + R h + p_o c), h = o tanh(c): the output gate sees the new c.
#pragma once

#include "lstm.h"

namespace fastseq {

template <class Math>
struct PeepholeLstm {
  using V = typename Math::V;
  static constexpr int kGates = 4;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 4;    // i f g o
  static constexpr int kVectors = 3;  // p_i p_f p_o
  static constexpr int kOwnRecurrent = 0;

  static FASTSEQ_HOST_DEVICE void forward(
      const V* x, const V* r, const V* vectors, V, const V* c, V* saved, V& h_new, V* c_new) {
    const V i = Math::sigmoid(x[0] + r[0] + vectors[0] * c[0]);
    const V f = Math::sigmoid(x[1] + r[1] + vectors[1] * c[0]);
    const V g = Math::tanh(x[2] + r[2]);
    c_new[0] = f * c[0] + i * g;
    const V o = Math::sigmoid(x[3] + r[3] + vectors[2] * c_new[0]);
    h_new = o * Math::tanh(c_new[0]);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  static FASTSEQ_HOST_DEVICE void backward(
      V dh, const V* dc_new, const V* saved, const V* vectors, V, const V* c, V, const V* c_new, V* dx, V* dr, V& dh_direct,
      V* dc_prev) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one = V{} + 1;
    const V tanh_c = Math::tanh(c_new[0]);
    dx[3] = dr[3] = dh * tanh_c * o * (one - o);
    const V dc = dc_new[0] + dh * o * (one - tanh_c * tanh_c) + dx[3] * vectors[2];
    dx[0] = dr[0] = dc * g * i * (one - i);
    dx[1] = dr[1] = dc * c[0] * f * (one - f);
    dx[2] = dr[2] = dc * i * (one - g * g);
    dh_direct = V{};
    dc_prev[0] = dc * f + dx[0] * vectors[0] + dx[1] * vectors[1];
  }

  static FASTSEQ_HOST_DEVICE V candidate(const V* saved, V c) { return Lstm<Math>::candidate(saved, c); }
};

}  // namespace fastseq
