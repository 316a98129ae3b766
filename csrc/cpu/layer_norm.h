// What lies between the products of a transformer's layer, row by row (host part: attention_layers.cpp), and gradients of what a cell with
// layer norm has inside a step (host part: recurrent_gradients.cpp).
#pragma once

#include <cstdint>

#include "recurrent_kernel.h"  // Type

namespace fastseq::cpu {

// What a dropout leaves of rows that lie behind one another: number e of row r stays, times 1 / (1 - probability), if the random number
// e / 16 % 4 of Philox (seed; e / 64 * 16 + e % 16, r, which) is not below probability 2^32.
struct Dropout {
  double probability;  // below 1; 0: everything
  uint64_t seed;
  uint32_t which;  // of several with one seed
};

// Numbers of a thread's scratch that a row takes: whole groups of those that Dropout tells of.
constexpr int64_t scratch_row(int64_t features) { return (features + 63) / 64 * 64; }

// Of rows [count, features], contiguous: x + y, y after a dropout, or one of them alone; and (s - mean) / sqrt(variance + eps) weight + bias of that sum s,
// in fp32 (fp64).
struct AddNorm {
  Type type;
  int64_t features;
  const void *x, *y;            // either may be null
  const void *weight, *bias;    // [features]
  double eps;
  void *sum, *normalized;       // each may be null; sum may be x or y
  void *mean = nullptr, *scale = nullptr;  // A [count]: that of each row, and 1 / sqrt(variance + eps); both may be null
  Dropout dropout = {};
};

// Gradients of the above, of rows alike.
struct NormGradient {
  Type type;
  int64_t features;
  const void *dout, *more;    // of `normalized`, a sum of both; more may be null
  const void *sum;            // what was normalized
  const void *mean, *scale;   // A [count]
  const void* weight;
  const void* beside;         // added to the gradient of the sum, which others have used, too; may be null
  void *dsum, *dy;            // dsum is that of x as well; dy, with a dropout, of y, may be null
  Dropout dropout;
};

// Of rows [count, features], contiguous: relu or gelu, and then a dropout. A number that this drops becomes -0, which no other
// is whose derivative is more than a rounding.
struct Activation {
  Type type;
  int64_t features;
  bool gelu;
  const void* before;  // forward `after` itself, or not read by the gradient of a relu
  void* after;
  Dropout dropout;
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
  // `row` holds `features` numbers, with a dropout two rows of scratch; A
  void (*add_norm)(const AddNorm&, int64_t begin, int64_t end, void* row);
  // adds the gradients of weight and bias to sums, A [2][features]; `row` holds two rows of scratch
  void (*norm_gradient)(const NormGradient&, int64_t begin, int64_t end, void* sums, void* row);
  // `row` holds a row of scratch
  void (*activate)(const Activation&, int64_t begin, int64_t end, void* row);
  // gradients of `after` become those of `before`
  void (*activation_gradient)(const Activation&, void* gradients, int64_t begin, int64_t end);
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
