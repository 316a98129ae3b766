// sLSTM cell, gates i f z o, states c n m: z = tanh(x + R h), o = sigmoid(x + R h), m' = max(log sigmoid(f) + m, i),
// i' = exp(i - m'), f' = exp(log sigmoid(f) + m - m'), c' = f' c + i' z, n' = f' n + i', h = o c' / n'.
#pragma once

#include "../../common/portable.h"

namespace fastseq {

template <class Math>
struct Slstm {
  using V = typename Math::V;
  static constexpr int kGates = 4;
  static constexpr int kStates = 3;
  static constexpr int kSaved = 5;  // i' f' z o sigmoid(f)
  static constexpr int kVectors = 0;
  static constexpr int kOwnRecurrent = 0;

  static FASTSEQ_HOST_DEVICE void forward(
      const V* x, const V* r, const V*, V, const V* c, V* saved, V& h_new, V* c_new) {
    const V entering = x[0] + r[0], forget = x[1] + r[1];
    const V decayed = Math::log_sigmoid(forget) + c[2];
    const V m = Math::maximum(decayed, entering);
    const V i = Math::exp(entering - m);
    const V f = Math::exp(decayed - m);
    const V z = Math::tanh(x[2] + r[2]);
    const V o = Math::sigmoid(x[3] + r[3]);
    c_new[0] = f * c[0] + i * z;
    c_new[1] = f * c[1] + i;
    c_new[2] = m;
    h_new = o * c_new[0] / c_new[1];
    saved[0] = i, saved[1] = f, saved[2] = z, saved[3] = o, saved[4] = Math::sigmoid(forget);
  }

  static FASTSEQ_HOST_DEVICE void backward(
      V dh, const V* dc_new, const V* saved, const V*, V, const V* c, V, const V* c_new, V* dx, V* dr, V& dh_direct, V* dc_prev) {
    const V i = saved[0], f = saved[1], z = saved[2], o = saved[3], s = saved[4];
    const V one = V{} + 1;
    const V ratio = c_new[0] / c_new[1];
    const V dratio = dh * o / c_new[1];
    const V dc = dc_new[0] + dratio, dn = dc_new[1] - dratio * ratio;
    // times i and f: gradients of their exponents, of which m' is the larger's first part and is subtracted from both
    const V di = (dc * z + dn) * i, df = (dc * c[0] + dn * c[1]) * f;
    const V dm = dc_new[2] - di - df;
    const V ddecayed = df + Math::where_less(f, i, V{}, dm);
    dx[0] = dr[0] = di + Math::where_less(f, i, dm, V{});
    dx[1] = dr[1] = ddecayed * (one - s);
    dx[2] = dr[2] = dc * i * (one - z * z);
    dx[3] = dr[3] = dh * ratio * o * (one - o);
    dh_direct = V{};
    dc_prev[0] = dc * f, dc_prev[1] = dn * f, dc_prev[2] = ddecayed;
  }
};

}  // namespace fastseq
