// The op on the multiply-add loops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fastseq::limits {

using torch::stable::Tensor;

// fma.h; start and results [parts, count] float32 or float64, each part by one thread of torch's. A part's bytes are a multiple of
// what the instruction set holds in registers: 1536 is one for all.
void fma_cpu(Tensor start, double factor, double addend, int64_t steps, Tensor results);

}  // namespace fastseq::limits
