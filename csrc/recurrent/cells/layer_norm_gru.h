// GRU cell with layer norm, gates r z n, reset after the matrix product, N a norm over the units of all gates of a row:
// r, z = sigmoid(x + w N(R h)), q = w_n N(R h)_n + b_n, n = tanh(x_n + r q), h = n + z (h - n).
// Whoever runs it takes the norm: the products come normalized.
#pragma once

#include "../../common/portable.h"

namespace fastseq {

template <class Math>
struct LayerNormGru {
  using V = typename Math::V;
  static constexpr int kGates = 3;
  static constexpr int kStates = 0;
  static constexpr int kSaved = 6;    // r z n, and R h of each
  static constexpr int kVectors = 4;  // w_r w_z w_n b_n
  static constexpr int kOwnRecurrent = 3;
  static constexpr bool kNormalizesC = false;

  // r_h = N(R h)
  static FASTSEQ_HOST_DEVICE void forward(
      const V* x, const V* r_h, const V* vectors, V h, const V*, V* saved, V& h_new, V*) {
    const V r = Math::sigmoid(x[0] + vectors[0] * r_h[0]);
    const V z = Math::sigmoid(x[1] + vectors[1] * r_h[1]);
    const V n = Math::tanh(x[2] + r * (vectors[2] * r_h[2] + vectors[3]));
    h_new = n + z * (h - n);
    saved[0] = r, saved[1] = z, saved[2] = n;
  }

  // dx of the gates, dr of N(R h)
  static FASTSEQ_HOST_DEVICE void backward(
      V dh, const V*, const V* saved, const V* vectors, V h, const V*, const V* r_h, V* dx, V* dr, V& dh_direct, V*) {
    const V r = saved[0], z = saved[1], n = saved[2];
    const V one = V{} + 1;
    const V q = vectors[2] * r_h[2] + vectors[3];
    dx[2] = dh * (one - z) * (one - n * n);
    dx[1] = dh * (h - n) * z * (one - z);
    dx[0] = dx[2] * q * r * (one - r);
    dr[0] = dx[0] * vectors[0], dr[1] = dx[1] * vectors[1], dr[2] = dx[2] * r * vectors[2];
    dh_direct = dh * z;
  }
};

}  // namespace fastseq
