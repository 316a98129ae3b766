// LSTM cell, gates i f g o: i, f, o = sigmoid(x + R h), g = tanh(x + R h), c = f c + i g, h = o tanh(c).
#pragma once

#include "../../common/portable.h"

namespace fastseq {

template <class Math>
struct Lstm {
  using V = typename Math::V;
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;  // i f g o
  static constexpr bool kHasC = true;
  static constexpr bool kHasRecurrentBias = false;

  static FASTSEQ_HOST_DEVICE void forward(const V* x, const V* r, V, V, V c, V* saved, V& h_new, V& c_new) {
    const V i = Math::sigmoid(x[0] + r[0]);
    const V f = Math::sigmoid(x[1] + r[1]);
    const V g = Math::tanh(x[2] + r[2]);
    const V o = Math::sigmoid(x[3] + r[3]);
    c_new = f * c + i * g;
    h_new = o * Math::tanh(c_new);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  static FASTSEQ_HOST_DEVICE void backward(
      V dh, V dc, const V* saved, V, V c, V, V c_new, V* dx, V* dr, V& dh_direct, V& dc_prev) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one = V{} + 1;
    const V tanh_c = Math::tanh(c_new);
    dc = dc + dh * o * (one - tanh_c * tanh_c);
    dx[0] = dr[0] = dc * g * i * (one - i);
    dx[1] = dr[1] = dc * c * f * (one - f);
    dx[2] = dr[2] = dc * i * (one - g * g);
    dx[3] = dr[3] = dh * tanh_c * o * (one - o);
    dh_direct = V{};
    dc_prev = dc * f;
  }
};

}  // namespace fastseq
