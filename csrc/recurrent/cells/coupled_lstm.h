// LSTM cell with coupled input and forget gates, gates i g o:
// i, o = sigmoid(x + R h), g = tanh(x + R h), c = c + i (g - c), h = o tanh(c).
#pragma once

#include "../../common/portable.h"

namespace fastseq {

template <class Math>
struct CoupledLstm {
  using V = typename Math::V;
  static constexpr int kGates = 3;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 3;  // i g o
  static constexpr int kVectors = 0;
  static constexpr int kOwnRecurrent = 0;

  static FASTSEQ_HOST_DEVICE void forward(
      const V* x, const V* r, const V*, V, const V* c, V* saved, V& h_new, V* c_new) {
    const V i = Math::sigmoid(x[0] + r[0]);
    const V g = Math::tanh(x[1] + r[1]);
    const V o = Math::sigmoid(x[2] + r[2]);
    c_new[0] = c[0] + i * (g - c[0]);
    h_new = o * Math::tanh(c_new[0]);
    saved[0] = i, saved[1] = g, saved[2] = o;
  }

  static FASTSEQ_HOST_DEVICE void backward(
      V dh, const V* dc_new, const V* saved, const V*, V, const V* c, V, const V* c_new, V* dx, V* dr, V& dh_direct, V* dc_prev) {
    const V i = saved[0], g = saved[1], o = saved[2];
    const V one = V{} + 1;
    const V tanh_c = Math::tanh(c_new[0]);
    const V dc = dc_new[0] + dh * o * (one - tanh_c * tanh_c);
    dx[0] = dr[0] = dc * (g - c[0]) * i * (one - i);
    dx[1] = dr[1] = dc * i * (one - g * g);
    dx[2] = dr[2] = dh * tanh_c * o * (one - o);
    dh_direct = V{};
    dc_prev[0] = dc * (one - i);
  }

  static FASTSEQ_HOST_DEVICE V candidate(const V* saved, V c) { return c + saved[0] * (saved[1] - c); }
};

}  // namespace fastseq
