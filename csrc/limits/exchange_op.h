// The op on the exchange kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

namespace fastseq::limits {

using torch::stable::Tensor;

// exchange.h; flags [ctas], results [ctas] int32, operands uint8 of 32 ctas vectors bytes.
void exchange_cuda(std::string kind, int64_t steps, int64_t ctas, int64_t vectors, Tensor flags, Tensor operands, Tensor results);

}  // namespace fastseq::limits
