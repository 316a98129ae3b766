// The recurrent kernels on a small LSTM, through global memory and through clusters, against plain loops. Faults are planted in
// copies of their sources; whether every cell and precision is right is asked elsewhere.

#include <algorithm>
#include <cmath>

#include "harness.h"
#include "recurrent/backward_kernel.cuh"
#include "recurrent/cells/lstm.h"
#include "recurrent/forward_kernel.cuh"

using namespace fastseq;
using namespace fastseq::recurrent;
using harness::Array;
using harness::value;

namespace {

constexpr int kHidden = 30, kBatch = 11, kSteps = 4, kGates = 4;
constexpr int kUnits = 16, kCtas = 2;

// The kernels to try, for programs that need not compile all: forward 1, backward 2, backward by partial sums 4.
#if !defined(FASTSEQ_TEST_KERNELS)
#define FASTSEQ_TEST_KERNELS 7
#endif
#if !defined(FASTSEQ_TEST_TILE)
#define FASTSEQ_TEST_TILE Tile16<gpu::Bfloat16>
#define FASTSEQ_TEST_WIDTH 1
#endif
// Few tiles of weights in registers: those of 8 numbers of depth have more, in shared memory.
struct Tile : FASTSEQ_TEST_TILE {
  static constexpr int kResident = 8;
  static constexpr int kBlock = 2;
};
constexpr int kNTiles = FASTSEQ_TEST_WIDTH, kColumns = kNTiles * kTileColumns;
constexpr int kClusterRows = kNTiles > 1 ? 9 : 4;  // fewer than columns
using Number = Tile::Number;
// Of a number in a step: bfloat16 may be rounded the other way, TF32 rounds both factors of a sum below 1, float sums in another order.
constexpr float kUnit = sizeof(Number) == 2 ? 0x1p-8f : Tile::kExact ? 0x1p-20f : 0x1p-10f;

struct Exact {
  using V = float;
  static FASTSEQ_HOST_DEVICE float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
  static FASTSEQ_HOST_DEVICE float tanh(float x) { return std::tanh(x); }
};

float number(int i, int salt) { return static_cast<float>((i * 7919 + salt * 104729) % 2003) / 1001.5f - 1.0f; }

Number rounded(float x) { return harness::rounded<Number>(x); }

void fill(Array<Number>& array, int salt, float scale) {
  for (int i = 0; i < array.count(); ++i) array[i] = rounded(scale * number(i, salt));
}
void fill(Array<float>& array, int salt) {
  for (int i = 0; i < array.count(); ++i) array[i] = number(i, salt);
}

// A call of the forward and the backward pass, by plain loops in the order of the definition, with states rounded as kernels
// round them.
struct Problem {
  Array<Number> x{kSteps * kBatch * kGates * kHidden}, weight{kGates * kHidden * kHidden}, h0{kBatch * kHidden};
  Array<Number> y{kSteps * kBatch * kHidden}, h_n{kBatch * kHidden}, gates{kSteps * kBatch * kGates * kHidden};
  Array<float> c0{kBatch * kHidden}, c{kSteps * kBatch * kHidden}, c_n{kBatch * kHidden};
  Array<Number> dy{kSteps * kBatch * kHidden}, dh_n{kBatch * kHidden}, dgates{kSteps * kBatch * kGates * kHidden},
      dh0{kBatch * kHidden};
  Array<float> dc_n{kBatch * kHidden}, dc0{kBatch * kHidden};
  Array<int64_t> lengths{kBatch};
  Array<uint8_t> resets{kSteps * kBatch};
  Array<Number> reset_h{kBatch * kHidden};
  Array<float> reset_c{kBatch * kHidden}, dreset_h{kBatch * kHidden}, dreset_c{kBatch * kHidden};
  const bool reverse, cuts;

  Problem(bool backwards, bool with_cuts) : reverse(backwards), cuts(with_cuts) {
    fill(x, 1, 1), fill(h0, 3, 1), fill(c0, 4), fill(dy, 5, 1), fill(dh_n, 6, 1), fill(dc_n, 7);
    fill(weight, 2, 1.0f / kHidden);  // the sum of a row's magnitudes is below 1: errors do not grow from step to step
    for (int b = 0; b < kBatch; ++b) lengths[b] = b % 4 == 3 ? kSteps - b / 4 : kSteps;
    if (cuts) {
      fill(reset_h, 8, 1), fill(reset_c, 9);
      for (int i = 0; i < resets.count(); ++i) resets[i] = number(i, 10) > 0;
      // before a cut, and after one
      for (const int b : {0, 9}) resets[std::max(row(b, 0), row(b, 1))] = resets[std::max(row(b, 2), row(b, 3))] = 1;
      x[row(0, 0) * kGates * kHidden] = dy[row(9, 3) * kHidden + 1] = rounded(NAN);
    }
    for (int b = 0; b < kBatch; ++b) forward(b);
    for (int b = 0; b < kBatch; ++b) backward(b);
  }

  int time(int b, int s) { return reverse ? static_cast<int>(lengths[b]) - 1 - s : s; }
  int row(int b, int s) { return time(b, s) * kBatch + b; }
  bool cut(int b, int s) {
    const int at = reverse ? time(b, s) + 1 : time(b, s);
    return cuts && at < lengths[b] && resets[at * kBatch + b];
  }
  Resets given() { return {cuts ? resets.data() : nullptr, reset_h.data(), reset_c.data(), nullptr, nullptr}; }

  void forward(int b) {
    float h[kHidden], c_now[kHidden];
    for (int u = 0; u < kHidden; ++u) h[u] = value(h0[b * kHidden + u]), c_now[u] = c0[b * kHidden + u];
    for (int s = 0; s < lengths[b]; ++s) {
      float h_next[kHidden];
      for (int u = 0; u < kHidden && cut(b, s); ++u) h[u] = value(reset_h[b * kHidden + u]), c_now[u] = reset_c[b * kHidden + u];
      for (int u = 0; u < kHidden; ++u) {
        float in[kGates], r[kGates] = {}, saved[kGates], c_next;
        for (int g = 0; g < kGates; ++g) {
          in[g] = value(x[(row(b, s) * kGates + g) * kHidden + u]);
          for (int k = 0; k < kHidden; ++k) r[g] += value(weight[(g * kHidden + u) * kHidden + k]) * h[k];
        }
        Lstm<Exact>::forward(in, r, nullptr, h[u], c_now + u, saved, h_next[u], &c_next);
        y[row(b, s) * kHidden + u] = rounded(h_next[u]);
        c[row(b, s) * kHidden + u] = c_now[u] = c_next;
        for (int g = 0; g < kGates; ++g) gates[(row(b, s) * kGates + g) * kHidden + u] = rounded(saved[g]);
      }
      for (int u = 0; u < kHidden; ++u) h[u] = value(rounded(h_next[u]));
    }
    for (int u = 0; u < kHidden; ++u) h_n[b * kHidden + u] = rounded(h[u]), c_n[b * kHidden + u] = c_now[u];
  }

  void backward(int b) {
    float dh[kHidden], dc[kHidden];
    for (int u = 0; u < kHidden; ++u) dh[u] = value(dh_n[b * kHidden + u]), dc[u] = dc_n[b * kHidden + u];
    for (int s = static_cast<int>(lengths[b]) - 1; s >= 0; --s) {
      float sent[kGates][kHidden], dh_before[kHidden];
      for (int u = 0; u < kHidden; ++u) {
        const int at = row(b, s) * kHidden + u;
        const int own = b * kHidden + u;
        const float c_before = cut(b, s) ? reset_c[own] : s ? c[row(b, s - 1) * kHidden + u] : c0[own];
        const float h_before = value(cut(b, s) ? reset_h[own] : s ? y[row(b, s - 1) * kHidden + u] : h0[own]);
        float saved[kGates], dx[kGates], dr[kGates], dc_before;
        for (int g = 0; g < kGates; ++g) saved[g] = value(gates[(row(b, s) * kGates + g) * kHidden + u]);
        Lstm<Exact>::backward(dh[u] + value(dy[at]), dc + u, saved, nullptr, h_before, &c_before, value(y[at]), &c[at], dx, dr,
                              dh_before[u], &dc_before);
        dc[u] = dc_before;
        for (int g = 0; g < kGates; ++g) {
          sent[g][u] = value(rounded(dr[g]));
          dgates[(row(b, s) * kGates + g) * kHidden + u] = rounded(dx[g]);
        }
      }
      for (int u = 0; u < kHidden; ++u) {
        dh[u] = dh_before[u];
        for (int g = 0; g < kGates; ++g) {
          for (int from = 0; from < kHidden; ++from) dh[u] += value(weight[(g * kHidden + from) * kHidden + u]) * sent[g][from];
        }
        if (cut(b, s)) dreset_h[b * kHidden + u] += dh[u], dreset_c[b * kHidden + u] += dc[u], dh[u] = dc[u] = 0;
      }
    }
    for (int u = 0; u < kHidden; ++u) dh0[b * kHidden + u] = rounded(dh[u]), dc0[b * kHidden + u] = dc[u];
  }

  Walk walk() { return {nullptr, lengths.data(), kSteps, kBatch, 1, kHidden, reverse}; }
};

template <class T>
void compare(const char* what, Array<T>& got, Array<T>& expected) {
  float most = 0;
  for (int i = 0; i < expected.count(); ++i) most = std::fmax(most, std::fabs(value(expected[i])));
  for (int i = 0; i < expected.count(); ++i) {
    const float error = std::fabs(value(got[i]) - value(expected[i]));
    const bool unknown = std::isnan(value(expected[i])) && std::isnan(value(got[i]));
    CHECK(unknown || error <= kSteps * kUnit * most, "wrong result: %s[%d] is %g, not %g", what, i, value(got[i]), value(expected[i]));
  }
}

enum class Form { kFlags, kCluster, kFlagsReduceScatter, kClusterReduceScatter };

// A split that uses what there is: several batch tiles, segments, warps along the depth, tiles of rows for each warp.
Split split_of(Form form, int row_gates, int sent_gates) {
  Split s{};
  s.units = kUnits, s.ctas = kCtas;
  s.cluster = form == Form::kCluster || form == Form::kClusterReduceScatter;
  s.reduce_scatter = form == Form::kFlagsReduceScatter || form == Form::kClusterReduceScatter;
  s.batch_tiles = s.cluster ? 1 : 2;
  s.rows = s.cluster ? kClusterRows : kBatch;
  s.parts = (kBatch + s.rows - 1) / s.rows;
  while (1 << s.column_bits < (s.cluster ? s.rows : kColumns)) ++s.column_bits;
  s.m_bits = s.reduce_scatter ? (s.cluster ? 0 : 1) : row_gates > 1 ? (s.cluster ? 1 : 2) : 0;
  s.k_warps = s.reduce_scatter || row_gates > 1 || Tile::kDepth == 8 ? 1 : 2;
  s.k_segments = s.cluster || s.reduce_scatter ? 1 : row_gates > 1 ? 2 : 3;
  const int tiles = (s.reduce_scatter ? 1 : kCtas) * kUnits * sent_gates / Tile::kDepth;
  const int shares = s.k_warps * s.k_segments * Tile::kBlock;
  s.k_tiles = (tiles + shares - 1) / shares * Tile::kBlock;
  return s;
}

struct Run {
  Split split;
  TileFacts tile = facts_of_tile<Tile>(kNTiles);
  gpu::Launch how;
  Array<gpu::Vec16> operands;
  Array<uint32_t> flags;

  Run(Form form, int row_gates, int sent_gates, int states)
      : split(split_of(form, row_gates, sent_gates)),
        how{split.parts * kCtas,
            kThreads,
            split.cluster ? kCtas : 1,
            shared_bytes(split, tile, row_gates, sent_gates, states, 0),
            !split.cluster,
            nullptr},
        operands(static_cast<int>(operand_bytes(split, tile, row_gates, sent_gates) / 16) * split.parts, {{~0u, ~0u, ~0u, ~0u}}),
        flags(split.parts * kCtas) {
#if !defined(__CUDACC__)
    gpu::host::reset_counters();
#endif
  }

  ExchangeBuffers buffers() { return {operands.data(), flags.data()}; }
};

// What a pass sends and waits for is known: every CTA's part of each step's operand, or of the sums, to every CTA of its team, without
// bank conflicts.
void check_counters([[maybe_unused]] const Run& run, [[maybe_unused]] int row_gates, [[maybe_unused]] int sent_gates) {
#if !defined(__CUDACC__)
  const gpu::host::Counters seen = gpu::host::counters();
  const int operand = AllGatherLayout(run.split, run.tile, row_gates, sent_gates).own << run.split.column_bits;
  const int message = run.split.reduce_scatter ? ReduceScatterLayout(run.split, run.tile).sent : operand;
  const uint64_t messages = run.split.parts * kSteps * kCtas * kCtas;
  CHECK(seen.st_async == (run.split.cluster ? messages * message : 0), "%d", static_cast<int>(seen.st_async));
  CHECK(seen.flags_waited == (run.split.cluster ? 0 : messages), "%d", static_cast<int>(seen.flags_waited));
  CHECK((sizeof(Number) > 2 || seen.ldmatrix > 0) && seen.bank_conflicts == 0, "%d", static_cast<int>(seen.bank_conflicts));
#endif
}

template <bool kWithResets = false>
void forward(Form form, bool reverse) {
  Problem p(reverse, kWithResets);
  Run run(form, kGates, 1, 1);
  Array<Number> y(p.y.count()), h_n(p.h_n.count()), gates(p.gates.count());
  Array<float> c(p.c.count()), c_n(p.c_n.count());
  harness::must_run(forward_kernel<Lstm, Tile, kNTiles>, run.how,
                    ForwardParams{p.x.data(), p.weight.data(), nullptr, p.h0.data(), p.c0.data(), y.data(), h_n.data(),
                                  c_n.data(), c.data(), gates.data(), p.walk(), run.split, run.buffers(), p.given()});
  if (harness::failures) return;
  check_counters(run, kGates, 1);
  compare("y", y, p.y), compare("c", c, p.c), compare("gates", gates, p.gates), compare("h_n", h_n, p.h_n),
      compare("c_n", c_n, p.c_n);
}

template <bool kReduceScatter, bool kWithResets = false>
void backward(Form form, bool reverse) {
  Problem p(reverse, kWithResets);
  Run run(form, 1, kGates, 2);
  Array<Number> dgates(p.dgates.count()), dh0(p.dh0.count());
  Array<float> dc0(p.dc0.count()), dreset_h(p.dreset_h.count()), dreset_c(p.dreset_c.count());
  Resets resets = p.given();
  resets.dh = dreset_h.data(), resets.dc = dreset_c.data();
  const BackwardParams params{p.dy.data(), p.dh_n.data(), p.dc_n.data(), nullptr, p.weight.data(), nullptr, p.h0.data(),
                              p.c0.data(), p.y.data(), p.c.data(), p.gates.data(), dgates.data(), nullptr, dh0.data(),
                              dc0.data(), p.walk(), run.split, run.buffers(), resets};
  if constexpr (kReduceScatter) {
    harness::must_run(backward_reduce_scatter_kernel<Lstm, Tile>, run.how, params);
  } else {
    harness::must_run(backward_kernel<Lstm, Tile, kNTiles>, run.how, params);
  }
  if (harness::failures) return;
  check_counters(run, 1, kGates);
  compare("dgates", dgates, p.dgates), compare("dh0", dh0, p.dh0), compare("dc0", dc0, p.dc0);
  compare("dreset_h", dreset_h, p.dreset_h), compare("dreset_c", dreset_c, p.dreset_c);
}

const harness::Test tests[] = {
#if FASTSEQ_TEST_KERNELS & 1
    {"forward_flags", [] { forward(Form::kFlags, false); }, false},
    {"forward_cluster", [] { forward(Form::kCluster, true); }, true},
    {"forward_resets", [] { forward<true>(Form::kFlags, true); }, false},
    {"forward_cluster_resets", [] { forward<true>(Form::kCluster, false); }, true},
#endif
#if FASTSEQ_TEST_KERNELS & 2
    {"backward_flags", [] { backward<false>(Form::kFlags, true); }, false},
    {"backward_cluster", [] { backward<false>(Form::kCluster, false); }, true},
    {"backward_resets", [] { backward<false, true>(Form::kFlags, false); }, false},
    {"backward_cluster_resets", [] { backward<false, true>(Form::kCluster, true); }, true},
#endif
#if FASTSEQ_TEST_KERNELS & 4 && FASTSEQ_TEST_WIDTH == 1
    {"backward_flags_reduce_scatter", [] { backward<true>(Form::kFlagsReduceScatter, false); }, false},
    {"backward_cluster_reduce_scatter", [] { backward<true>(Form::kClusterReduceScatter, true); }, true},
    {"backward_resets_reduce_scatter", [] { backward<true, true>(Form::kFlagsReduceScatter, true); }, false},
#endif
};

}  // namespace

int main(int argc, char** argv) { return harness::main(tests, argc, argv); }
