// Kernels that do nothing but wait for each other or pass a state on, for the benchmark suite `limits`.
#pragma once

#include <cstdint>
#include <string_view>

#include "../common/machine.h"

namespace fastseq::limits {

constexpr int kExchangeThreads = 256;

struct ExchangeParams {
  uint32_t* flags;    // [ctas] zero at the beginning; unused in clusters
  void* operands;     // [2, ctas, vectors] of 16 bytes; unused by barriers and in clusters
  uint32_t* results;  // [ctas] the number of steps, if all went well
  int32_t steps, ctas;
  int32_t vectors;  // that each CTA passes on in a step
};

// kind: "grid barrier", "cluster barrier", "grid hand-off" or "cluster hand-off"; a cluster kernel runs as one cluster. "" or what
// stands against it.
const char* exchange(std::string_view kind, const ExchangeParams& params, void* stream);

}  // namespace fastseq::limits
