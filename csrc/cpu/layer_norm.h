// What lies between the products of a transformer's layer, row by row (host part: attention_layers.cpp), and gradients of what a cell with
// layer norm has inside a step (host part: recurrent_gradients.cpp).
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

// Of the steps of a layer-normalized LSTM or GRU, a lane of them: rows `stride` elements apart. A: fp32, or fp64 if the type is.
struct NormVectors {
  struct Rows {
    const void* data;
    int64_t stride;
  };
  Type type;
  bool lstm;  // else a GRU
  int64_t hidden;
  Rows dgates, gates;  // S [G*H]; S [2*G*H]: the activations, then R h
  Rows dm, c;          // A [H], of the LSTM: gradient of the step's output o tanh(..), and c
  const void* vectors; // A [6*H], of the LSTM: scales of the gates, scale and shift of c
};
constexpr int64_t kNormVectors[] = {4, 6};  // of a GRU: scales of the gates, recurrent bias of n; of an LSTM

// The loops of one instruction set.
struct LayerNormKernels {
  // `row` holds `features` numbers, of 8 bytes if the type is double, else of 4
  void (*add_norm)(const AddNorm&, int64_t begin, int64_t end, void* row);
  // rows += bias, and then what is negative becomes 0 if `relu`
  void (*add_bias)(Type, void* rows, const void* bias, int64_t features, int64_t begin, int64_t end, bool relu);
  // adds the gradients of rows begin .. end to sums, A [V*H]; `run` holds as much
  void (*add_vectors)(const NormVectors&, int64_t begin, int64_t end, void* sums, void* run);
};

const LayerNormKernels& layer_norm_default();
#if defined(__x86_64__)
const LayerNormKernels& layer_norm_avx2();
const LayerNormKernels& layer_norm_avx512();
#endif
const LayerNormKernels& layer_norm_kernels();  // those of the level at hand

}  // namespace fastseq::cpu
