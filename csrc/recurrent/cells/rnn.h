// Elman cell: h = f(x + R h), f tanh or relu. The same lines serve the CPU kernels (V a vector) and CUDA (V a scalar).
#pragma once

#include "../../common/portable.h"

namespace fastseq {

template <class Math, bool kRelu>
struct Rnn {
  using V = typename Math::V;
  static constexpr int kGates = 1;  // gates of x and of R h
  static constexpr int kSaved = 0;  // activations kept for backward
  static constexpr bool kHasC = false;
  static constexpr bool kHasRecurrentBias = false;  // whether a gate keeps its recurrent bias inside

  static FASTSEQ_HOST_DEVICE void forward(const V* x, const V* r, V, V, V, V*, V& h_new, V&) {
    h_new = kRelu ? Math::relu(x[0] + r[0]) : Math::tanh(x[0] + r[0]);
  }

  // dh whole gradient of h, h_new the step's output -> dx, dr gradients of x and R h, dh_direct what reaches h other than through R h
  static FASTSEQ_HOST_DEVICE void backward(V dh, V, const V*, V, V, V h_new, V, V* dx, V* dr, V& dh_direct, V&) {
    dx[0] = dr[0] = kRelu ? Math::where_positive(h_new, dh) : dh * (V{} + 1 - h_new * h_new);
    dh_direct = V{};
  }
};

template <class Math>
using RnnTanh = Rnn<Math, false>;
template <class Math>
using RnnRelu = Rnn<Math, true>;

}  // namespace fastseq
