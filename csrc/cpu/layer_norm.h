// What lies between the products of a transformer's layer, row by row; the host part is attention_layers.cpp.
#pragma once

#include <cstdint>

#include "recurrent_kernel.h"  // Type

namespace fastseq::cpu {

// Of rows [count, features], contiguous: x + y, or x alone; and (s - mean) / sqrt(variance + eps) weight + bias of that sum s, in fp32 (fp64).
struct AddNorm {
  Type type;
  int64_t features;
  const void *x, *y;            // y may be null
  const void *weight, *bias;    // [features]
  double eps;
  void *sum, *normalized;       // each may be null; sum may be x or y
};

// The loops of one instruction set.
struct LayerNormKernels {
  // `row` holds `features` numbers, of 8 bytes if the type is double, else of 4
  void (*add_norm)(const AddNorm&, int64_t begin, int64_t end, void* row);
  // rows += bias, and then what is negative becomes 0 if `relu`
  void (*add_bias)(Type, void* rows, const void* bias, int64_t features, int64_t begin, int64_t end, bool relu);
};

const LayerNormKernels& layer_norm_default();
#if defined(__x86_64__)
const LayerNormKernels& layer_norm_avx2();
const LayerNormKernels& layer_norm_avx512();
#endif

}  // namespace fastseq::cpu
