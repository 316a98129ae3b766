// The loops of fma.h for one instruction set. Included by fma_<level>.cpp, which defines FASTSEQ_LEVEL, FASTSEQ_VECTOR_BYTES and
// FASTSEQ_VECTOR_REGISTERS.

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/portable.h"
#include "fma.h"

namespace fastseq::limits::FASTSEQ_LEVEL {
namespace {

#include "../cpu/vector.inl"

// A unit takes 4 or 5 cycles for a multiply-add and there are two: 10 chains keep them busy. The other registers hold the factor
// and the addend.
constexpr int kChains = FASTSEQ_VECTOR_REGISTERS * 3 / 4;

template <class A>
void run(const A* start, A factor, A addend, int64_t steps, int64_t count, A* results) {
  using Numbers = Memory<A, A>;
  using V = typename Lanes<A>::V;
  const V factors = V{} + factor, addends = V{} + addend;
  for (int64_t i = 0; i < count; i += kChains * Numbers::kWidth) {
    V chain[kChains];
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) chain[c] = Numbers::load(start + i + c * Numbers::kWidth, Numbers::kWidth);
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
      for (int c = 0; c < kChains; ++c) chain[c] = chain[c] * factors + addends;
    }
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) Numbers::store(results + i + c * Numbers::kWidth, chain[c], Numbers::kWidth);
  }
}

}  // namespace

constexpr FmaKernels kKernels{run<float>, run<double>, kChains * FASTSEQ_VECTOR_BYTES};

}  // namespace fastseq::limits::FASTSEQ_LEVEL
