// GRU cell, gates r z n, reset after the matrix product:
// r, z = sigmoid(x + R h), q = R_n h + b_n, n = tanh(x_n + r q), h = n + z (h - n).
#pragma once

#include "../../common/portable.h"

namespace fastseq {

template <class Math>
struct Gru {
  using V = typename Math::V;
  static constexpr int kGates = 3;
  static constexpr int kStates = 0;
  static constexpr int kSaved = 4;    // r z n q
  static constexpr int kVectors = 1;  // b_n
  static constexpr int kOwnRecurrent = 1;

  static FASTSEQ_HOST_DEVICE void forward(
      const V* x, const V* r_h, const V* vectors, V h, const V*, V* saved, V& h_new, V*) {
    const V r = Math::sigmoid(x[0] + r_h[0]);
    const V z = Math::sigmoid(x[1] + r_h[1]);
    const V q = r_h[2] + vectors[0];
    const V n = Math::tanh(x[2] + r * q);
    h_new = n + z * (h - n);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = q;
  }

  // dx gradients of x (r z n), dr of R h (r z q): they differ in the last
  static FASTSEQ_HOST_DEVICE void backward(
      V dh, const V*, const V* saved, const V*, V h, const V*, V, const V*, V* dx, V* dr, V& dh_direct, V*) {
    const V r = saved[0], z = saved[1], n = saved[2], q = saved[3];
    const V one = V{} + 1;
    const V dn = dh * (one - z) * (one - n * n);
    dx[0] = dr[0] = dn * q * r * (one - r);
    dx[1] = dr[1] = dh * (h - n) * z * (one - z);
    dx[2] = dn;
    dr[2] = dn * r;
    dh_direct = dh * z;
  }
};

}  // namespace fastseq
