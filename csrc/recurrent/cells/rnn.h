// Elman cell: h = f(x + R h), f tanh or relu. The same lines serve the CPU kernels (V a vector) and CUDA (V a scalar).
#pragma once

#include "../../common/portable.h"

namespace fastseq {

template <class Math, bool kRelu>
struct Rnn {
  using V = typename Math::V;
  static constexpr int kGates = 1;         // gates of x and of R h
  static constexpr int kStates = 0;        // states beside h
  static constexpr int kSaved = 0;         // activations kept for backward
  static constexpr int kVectors = 0;       // parameters of a unit that act inside a step
  static constexpr int kOwnRecurrent = 0;  // gates, the last ones, whose R h has another gradient than their x

  // x and r = R h of every gate, the vectors, h and the states c before the step -> saved, h and c after it
  static FASTSEQ_HOST_DEVICE void forward(const V* x, const V* r, const V*, V, const V*, V*, V& h_new, V*) {
    h_new = kRelu ? Math::relu(x[0] + r[0]) : Math::tanh(x[0] + r[0]);
  }

  // dh, dc whole gradients of h and c, h_new and c_new the step's results -> dx, dr gradients of x and R h, dh_direct what reaches
  // the old h other than through R h, dc_prev what reaches the old c
  static FASTSEQ_HOST_DEVICE void backward(
      V dh, const V*, const V*, const V*, V, const V*, V h_new, const V*, V* dx, V* dr, V& dh_direct, V*) {
    dx[0] = dr[0] = kRelu ? Math::where_positive(h_new, dh) : dh * (V{} + 1 - h_new * h_new);
    dh_direct = V{};
  }
};

template <class Math>
using RnnTanh = Rnn<Math, false>;
template <class Math>
using RnnRelu = Rnn<Math, true>;

}  // namespace fastseq
