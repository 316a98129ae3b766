// Activations of the CUDA kernels, in two precisions: as exact as fp32's own functions, or by the fast exponential (errors of about
// 1e-7), for products that are rounded to 16 bits or TF32 anyway.
#pragma once

#include "../common/prims.cuh"

namespace fastseq::recurrent {

template <bool kExact>
struct Math {
  using V = float;

  static FASTSEQ_DEVICE V sigmoid(V x) {
    return kExact ? gpu::divide_exact(1.0f, 1.0f + gpu::exp_exact(-x)) : gpu::divide_fast(1.0f, 1.0f + gpu::exp_fast(-x));
  }
  // the fast form divides by at most 1 + e^88, which is finite
  static FASTSEQ_DEVICE V tanh(V x) {
    if (kExact) return gpu::tanh_exact(x);
    const V bounded = x > 44.0f ? 44.0f : x < -44.0f ? -44.0f : x;  // a NaN stays one
    return 1.0f - gpu::divide_fast(2.0f, 1.0f + gpu::exp_fast(2.0f * bounded));
  }
  static FASTSEQ_DEVICE V relu(V x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays one, as in torch
  static FASTSEQ_DEVICE V where_positive(V h, V d) { return h <= 0.0f ? 0.0f : d; }
};

}  // namespace fastseq::recurrent
