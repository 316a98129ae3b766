// One step in float32 or float64 and without gradients (host part: recurrent_step.cpp), by weights as PyTorch stores them: packing those of
// a single step would take as long as a good part of its products. Of many sequences, lanes run along these: rows of x and h are
// transposed, which is little work, and each weight, read once, is multiplied with all of them. Of few, lanes run along the depth, or along
// the units of weights that were packed before.
#pragma once

#include <cstdint>

#include "recurrent_kernel.h"
#include "recurrent_plan.h"

namespace fastseq::cpu {

// A lane of a layer; A: float or double.
struct Step {
  Cell cell;  // an Elman RNN, an LSTM or a GRU
  Type type;
  int64_t batch, input, hidden;  // B, I, H
  const void *x, *h0, *c0;       // A [B, I], [B, H], [B, H]; states that are null are zeros
  const void *w_ih, *w_hh;       // A [G*H, I], [G*H, H]
  const void *bias, *vectors;    // A [G*H], [V*H], or null
  void* y;                       // A [B, H], rows y_stride elements apart
  int64_t y_stride;
  void *h_n, *c_n;               // A [B, H]; of few sequences h_n may be null
  void* operands;                // (I + H) times sequences_of(B) elements; of few sequences what gather_few fills, or null
  // of few sequences: in the place of w_ih and w_hh, or null: [unit tiles], packed by Kernels::pack_units
  const void *packed_ih = nullptr, *packed_hh = nullptr;
};

// The kernels of one instruction set.
struct StepKernels {
  int64_t (*width)(Type);                   // units of a tile, columns of a square, sequences of a vector
  int64_t (*sequences_of)(Type, int64_t batch);  // with those that fill the last vector
  // squares begin .. end of x, and after them those of h -> operands
  void (*transpose)(const Step&, int64_t begin, int64_t end);
  // the units of tiles begin .. end
  void (*run)(const Step&, int64_t begin, int64_t end);
  // the bytes of the operands of few sequences and packed weights; the rows of x and h -> these
  int64_t (*bytes_of_few)(const Step&);
  void (*gather_few)(const Step&);
  // as `run`, of fewer than kSequencesOfStep sequences; with packed weights the tiles are those of these
  void (*run_few)(const Step&, int64_t begin, int64_t end);
};

const StepKernels& step_kernels_default();
#if defined(__x86_64__)
const StepKernels& step_kernels_avx2();
const StepKernels& step_kernels_avx512();
#endif

}  // namespace fastseq::cpu
