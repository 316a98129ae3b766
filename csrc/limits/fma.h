// What one thread can multiply and add at most: chains of multiply-adds that stay in registers, for the benchmark suite `limits`.
#pragma once

#include <cstdint>

namespace fastseq::limits {

// results[i] = start[i], multiplied by `factor` and increased by `addend`, `steps` times over; `count` numbers.
template <class A>
using FmaLoop = void (*)(const A* start, A factor, A addend, int64_t steps, int64_t count, A* results);

// The loops of one instruction set.
struct FmaKernels {
  FmaLoop<float> of_float;
  FmaLoop<double> of_double;
  int64_t bytes;  // in registers at a time: `count` numbers are a multiple of it
};

const FmaKernels& fma_default();
#if defined(__x86_64__)
const FmaKernels& fma_avx2();
const FmaKernels& fma_avx512();
#endif

}  // namespace fastseq::limits
