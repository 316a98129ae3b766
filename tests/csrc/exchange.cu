// Two small kernels whose CTAs hand a state round, step after step, the way recurrent kernels do: through global memory and
// flags, and through the shared memory of a cluster. Faults are planted in copies of this file, so each line that matters stands
// for itself.
//
// state'[n, m] = (sum over k of weights[m, k] state[n, k]) mod 16 - 8: whole numbers, exact in bfloat16 and in any order of
// summation.

#include "harness.h"

using namespace fastseq::gpu;
using harness::Array;
using harness::rounded;
using harness::value;

namespace {

constexpr int kCtas = 4;
constexpr int kRows = 16;  // of the state, in a CTA
constexpr int kDepth = kCtas * kRows;
constexpr int kBatch = 8;
constexpr int kStride = kDepth + 8;  // of a row of the state in shared memory: no bank conflicts
constexpr int kThreads = 64;
constexpr int kStateBytes = piece_bytes<Bfloat16>(kBatch * kStride);
constexpr int kPartialBytes = piece_bytes<float>(2 * kRows * kBatch);

struct Params {
  const Bfloat16* weights;  // [kDepth, kDepth]
  Bfloat16* states;         // [2, kBatch, kDepth]; the first is the initial one
  uint32_t* flags;          // [kCtas]
  Bfloat16* out;            // [kBatch, kDepth]
  int steps;
};

FASTSEQ_DEVICE float wrap(float sum) { return static_cast<float>((static_cast<int>(sum) & 15) - 8); }

// Each warp multiplies every other slice of 16 along k.
FASTSEQ_DEVICE void multiply(const Bfloat16* weights, const Bfloat16* state, float* partial) {
  const int g = lane() / 4, t = lane() % 4;
  float d[4] = {};
  for (int k = 16 * warp(); k < kDepth; k += 32) {
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i)
      a[i] = *reinterpret_cast<const uint32_t*>(weights + (g + i % 2 * 8) * kDepth + k + 2 * t + i / 2 * 8);
    ldmatrix_x2(b, state + lane() % 8 * kStride + k + lane() / 8 % 2 * 8);
    mma_16816(d, a, b, Bfloat16{});
  }
  for (int i = 0; i < 4; ++i) partial[(warp() * kRows + g + i / 2 * 8) * kBatch + 2 * t + i % 2] = d[i];
}

FASTSEQ_DEVICE Bfloat16 sum_of_partials(const float* partial, int n, int m) {
  return from_float<Bfloat16>(wrap(partial[m * kBatch + n] + partial[(kRows + m) * kBatch + n]));
}

FASTSEQ_KERNEL(kThreads) through_flags(FASTSEQ_PARAMETERS Params p) {
  Smem smem;
  auto* state = smem.take<Bfloat16>(kBatch * kStride);
  auto* partial = smem.take<float>(2 * kRows * kBatch);
  const Bfloat16* weights = p.weights + bid() * kRows * kDepth;
  for (uint32_t step = 1; step <= static_cast<uint32_t>(p.steps); ++step) {
    const Bfloat16* before = p.states + (step - 1) % 2 * kBatch * kDepth;
    Bfloat16* after = p.states + step % 2 * kBatch * kDepth;
    if (warp() == 0) flags_wait(p.flags, kCtas, step - 1);
    cta_sync();  // the flags hold for all warps
    cp_async16(state + tid() / 8 * kStride + tid() % 8 * 8, before + tid() / 8 * kDepth + tid() % 8 * 8);
    cp_commit();
    cp_wait<0>();
    cta_sync();  // the state is there
    multiply(weights, state, partial);
    cta_sync();  // the partial sums are there
    for (int i = tid(); i < kRows * kBatch; i += kThreads) {
      const int n = i / kRows, m = i % kRows;
      after[n * kDepth + bid() * kRows + m] = sum_of_partials(partial, n, m);
    }
    cta_sync();  // the new state is written
    if (warp() == 0) flag_publish(p.flags + bid(), step);
  }
}

FASTSEQ_KERNEL(kThreads) through_cluster(FASTSEQ_PARAMETERS Params p) {
  constexpr uint32_t kBytes = kBatch * kDepth * sizeof(Bfloat16);
  Smem smem;
  auto* states = smem.take<Bfloat16>(2 * kBatch * kStride);
  auto* partial = smem.take<float>(2 * kRows * kBatch);
  auto* stage = smem.take<Bfloat16>(kBatch * kRows);
  auto* arrived = smem.take<Mbarrier>(2);
  const Bfloat16* weights = p.weights + bid() * kRows * kDepth;
  for (int i = tid(); i < kBatch * kDepth; i += kThreads) states[i / kDepth * kStride + i % kDepth] = p.states[i];
  mbarrier_init(arrived, 2, kBytes);
  cluster_sync();  // the barriers and the initial state are there
  for (int step = 1; step <= p.steps; ++step) {
    const int from = (step - 1) % 2, to = step % 2;
    if (step > 1) {
      mbarrier_wait(arrived + from, (step - 2) / 2 % 2);
      if (tid() == 0 && step + 1 <= p.steps) mbarrier_expect(arrived + from, kBytes);
    }
    multiply(weights, states + from * kBatch * kStride, partial);
    cta_sync();  // the partial sums are ready, the barrier expects the step after next
    for (int i = tid(); i < kRows * kBatch; i += kThreads) stage[i] = sum_of_partials(partial, i / kRows, i % kRows);
    cta_sync();  // the new state is staged
    const int rank = tid() / 16, n = tid() % 16 / 2, half = tid() % 2;
    const Vec16 piece = *reinterpret_cast<const Vec16*>(stage + n * kRows + 8 * half);
    auto* target = reinterpret_cast<Vec16*>(states + to * kBatch * kStride + n * kStride + cta_rank() * kRows + 8 * half);
    st_async(peer(target, rank), piece, peer(arrived + to, rank));
  }
  mbarrier_wait(arrived + p.steps % 2, (p.steps - 1) / 2 % 2);
  const Bfloat16* last = states + p.steps % 2 * kBatch * kStride;
  for (int i = tid(); i < kRows * kBatch; i += kThreads) {
    const int n = i / kRows, m = bid() * kRows + i % kRows;
    p.out[n * kDepth + m] = last[n * kStride + m];
  }
}

struct Problem {
  static constexpr int kSteps = 5;
  Array<Bfloat16> weights{kDepth * kDepth}, states{2 * kBatch * kDepth}, out{kBatch * kDepth};
  Array<uint32_t> flags{kCtas};
  float expected[kBatch][kDepth], before[kBatch][kDepth];

  Problem() {
    for (int i = 0; i < weights.count(); ++i) weights[i] = rounded<Bfloat16>(static_cast<float>(i * 37 % 17 - 8));
    for (int n = 0; n < kBatch; ++n) {
      for (int k = 0; k < kDepth; ++k)
        states[n * kDepth + k] = rounded<Bfloat16>(before[n][k] = static_cast<float>((n * 7 + k * 5) % 16 - 8));
    }
    for (int step = 0; step < kSteps; ++step) {
      for (int n = 0; n < kBatch; ++n) {
        for (int m = 0; m < kDepth; ++m) {
          float sum = 0;
          for (int k = 0; k < kDepth; ++k) sum += value(weights[m * kDepth + k]) * before[n][k];
          expected[n][m] = static_cast<float>((static_cast<int>(sum) & 15) - 8);
        }
      }
      std::memcpy(before, expected, sizeof(before));
    }
  }

  Params params() { return {weights.data(), states.data(), flags.data(), out.data(), kSteps}; }

  void check(Bfloat16* result) {
    for (int n = 0; n < kBatch; ++n) {
      for (int m = 0; m < kDepth; ++m) {
        const float got = value(result[n * kDepth + m]);
        CHECK(got == expected[n][m], "wrong result: %d, %d is %g, not %g", n, m, got, expected[n][m]);
      }
    }
  }
};

void flags() {
  Problem problem;
  harness::must_run(through_flags, {kCtas, kThreads, 1, kStateBytes + kPartialBytes, true, nullptr}, problem.params());
  if (!harness::failures) problem.check(problem.states.data() + Problem::kSteps % 2 * kBatch * kDepth);
}

void cluster() {
  Problem problem;
  const int smem = piece_bytes<Bfloat16>(2 * kBatch * kStride) + kPartialBytes + piece_bytes<Bfloat16>(kBatch * kRows) +
                   piece_bytes<Mbarrier>(2);
  harness::must_run(through_cluster, {kCtas, kThreads, kCtas, smem, false, nullptr}, problem.params());
  if (!harness::failures) problem.check(problem.out.data());
}

const harness::Test tests[] = {{"flags", flags, false}, {"cluster", cluster, true}};

}  // namespace

int main(int argc, char** argv) { return harness::main(tests, argc, argv); }
