// LSTM cell, gates i f g o: i, f, o = sigmoid(x + R h), g = tanh(x + R h), c = f c + i g, h = o tanh(c).
#pragma once

#include "../../common/portable.h"

namespace fastseq {

template <class Math>
struct Lstm {
  using V = typename Math::V;
  static constexpr int kGates = 4;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 4;  // i f g o
  static constexpr int kVectors = 0;
  static constexpr int kOwnRecurrent = 0;

  static FASTSEQ_HOST_DEVICE void forward(
      const V* x, const V* r, const V*, V, const V* c, V* saved, V& h_new, V* c_new) {
    const V i = Math::sigmoid(x[0] + r[0]);
    const V f = Math::sigmoid(x[1] + r[1]);
    const V g = Math::tanh(x[2] + r[2]);
    const V o = Math::sigmoid(x[3] + r[3]);
    c_new[0] = f * c[0] + i * g;
    h_new = o * Math::tanh(c_new[0]);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }

  // the same where no activation is saved
  static FASTSEQ_HOST_DEVICE void forward_alone(const V* x, const V* r, const V* c, V& h_new, V* c_new) {
    c_new[0] = Math::sigmoid(x[1] + r[1]) * c[0] + Math::sigmoid_tanh(x[0] + r[0], x[2] + r[2]);
    h_new = Math::sigmoid_tanh(x[3] + r[3], c_new[0]);
  }

  static FASTSEQ_HOST_DEVICE void backward(
      V dh, const V* dc_new, const V* saved, const V*, V, const V* c, V, const V* c_new, V* dx, V* dr, V& dh_direct, V* dc_prev) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V one = V{} + 1;
    const V tanh_c = Math::tanh(c_new[0]);
    const V dc = dc_new[0] + dh * o * (one - tanh_c * tanh_c);
    dx[0] = dr[0] = dc * g * i * (one - i);
    dx[1] = dr[1] = dc * c[0] * f * (one - f);
    dx[2] = dr[2] = dc * i * (one - g * g);
    dx[3] = dr[3] = dh * tanh_c * o * (one - o);
    dh_direct = V{};
    dc_prev[0] = dc * f;
  }

  // the new c, from what was kept: zoneout hides it
  static FASTSEQ_HOST_DEVICE V candidate(const V* saved, V c) { return saved[1] * c + saved[0] * saved[2]; }
};

}  // namespace fastseq
