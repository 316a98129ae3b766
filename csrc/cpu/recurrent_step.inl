// The kernels of recurrent_step.h for one instruction set. Included by recurrent_step_<level>.cpp, which defines FASTSEQ_LEVEL,
// FASTSEQ_VECTOR_BYTES and FASTSEQ_VECTOR_REGISTERS.

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../recurrent/cells/gru.h"
#include "../recurrent/cells/lstm.h"
#include "../recurrent/cells/rnn.h"
#include "recurrent_step.h"

namespace fastseq::cpu::FASTSEQ_LEVEL {
namespace {

#include "vector.inl"
#include "transpose.inl"

template <class T>
const T* at(const void* base, int64_t offset) {
  return base ? static_cast<const T*>(base) + offset : nullptr;
}

// Sequences in vectors, and vectors in groups, one of which is multiplied at a time: operands lie as [groups][I + H][vectors][W].
template <class A>
struct Groups {
  static constexpr int64_t W = Math<A>::kWidth;
  static constexpr int64_t kMost = FASTSEQ_VECTOR_REGISTERS == 32 ? 4 : 3;  // vectors
  int64_t vectors, count;

  explicit Groups(int64_t batch) : vectors(blocks_of(batch, W)), count(blocks_of(vectors, kMost)) {}
  int64_t first(int64_t group) const { return vectors * group / count; }
};

// Squares of W sequences and W columns, of rows [batch, columns]; they begin `place` columns into the operands, `depth` in all.
template <class A>
void transpose_rows(const A* rows, int64_t batch, int64_t columns, int64_t place, int64_t depth, int64_t begin, int64_t end, A* operands) {
  using V = typename Math<A>::V;
  constexpr int64_t W = Math<A>::kWidth;
  const Groups<A> groups(batch);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t first = groups.first(group), vectors = groups.first(group + 1) - first;
    A* to = operands + (first * depth + place * vectors) * W;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t b0 = (first + v) * W, there = rows ? batch - b0 : 0;
      for (int64_t j = begin * W; j < min(end * W, columns); j += W) {
        V square[W];
#pragma GCC unroll 16
        for (int64_t b = 0; b < W; ++b)
          square[b] = b < there ? Memory<A, A>::load(rows + (b0 + b) * columns + j, columns - j) : V{};
        transpose<W / 2, W>(square);
        for (int64_t k = 0; k < min(W, columns - j); ++k) *(V*)(to + ((j + k) * vectors + v) * W) = square[k];
      }
    }
  }
}

template <class A, template <class> class Cell_>
class StepKernel {
  using M = Math<A>;
  using V = typename M::V;
  using C = Cell_<M>;
  static constexpr int64_t W = M::kWidth, kMost = Groups<A>::kMost;
  static constexpr int G = C::kGates, K = C::kStates, kOwn = C::kOwnRecurrent;
  static constexpr int kSums = G + kOwn;  // of the gates, the last ones' of x; then of these R h

 public:
  explicit StepKernel(const Step& s)
      : s(s), B(s.batch), I(s.input), H(s.hidden), w_ih(static_cast<const A*>(s.w_ih)), w_hh(static_cast<const A*>(s.w_hh)),
        bias(static_cast<const A*>(s.bias)), vectors(static_cast<const A*>(s.vectors)) {}

  void run(int64_t begin, int64_t end) const {
    const Groups<A> groups(B);
    for (int64_t tile = begin; tile < end; ++tile)
      for (int64_t group = 0; group < groups.count; ++group) {
        const int64_t first = groups.first(group);
        switch (groups.first(group + 1) - first) {
          case 1: units<1>(tile * W, first); break;
          case 2: units<2>(tile * W, first); break;
          case 3: units<3>(tile * W, first); break;
          default: units<kMost>(tile * W, first);
        }
      }
  }

 private:
  // Products are summed in runs of this many, and the runs then added up: a sum of n terms loses about sqrt(n) roundings.
  static constexpr int64_t kRun = 128;
  static constexpr int64_t kLine = 64 / sizeof(A);

  // Rows of weights that are multiplied at a time: their sums, the vectors of a column and a weight fill the registers.
  static constexpr int rows_of_block(int64_t vectors) {
    return min(8, (FASTSEQ_VECTOR_REGISTERS == 32 ? 24 : 12) / vectors);
  }

  // W units from u0 on, of NV vectors of sequences
  template <int NV>
  void units(int64_t u0, int64_t first) const {
    const int64_t n = min(W, H - u0), there = B - first * W;
    const A* z = static_cast<const A*>(s.operands) + first * (I + H) * W;
    alignas(64) A sums[kSums * W * NV * W], c[K ? W * NV * W : 1];
    for (int g = 0; g < kSums; ++g)
      for (int64_t u = 0; u < W; ++u) {
        const V start = V{} + (bias && g < G && u < n ? bias[g * H + u0 + u] : A(0));
        for (int64_t v = 0; v < NV; ++v) *(V*)(sums + ((g * W + u) * NV + v) * W) = start;
      }
    multiply<NV>(z, I, w_ih + u0 * I, n, 0, w_hh + u0 * H, sums);
    multiply<NV>(z + I * NV * W, H, w_hh + u0 * H, n, kOwn, w_ih + min(u0 + W, H - 1) * I, sums);
    if constexpr (K > 0) transpose_in(at<A>(s.c0, first * W * H + u0), there, n, NV, c);
    for (int64_t u = 0; u < n; ++u) finish<NV>(u0 + u, z + (I + u0 + u) * NV * W, sums + u * NV * W, c + u * NV * W);
    transpose_out<NV>(sums, there, n, static_cast<A*>(s.y) + first * W * s.y_stride + u0, s.y_stride);
    transpose_out<NV>(sums, there, n, static_cast<A*>(s.h_n) + first * W * H + u0, H);
    if constexpr (K > 0) transpose_out<NV>(c, there, n, static_cast<A*>(s.c_n) + first * W * H + u0, H);
  }

  // sums[gate][unit][NV][W] += weights[gate * H + unit] . z; the sums of the last kOwn gates lie `apart` gates further. What comes next
  // is fetched ahead.
  template <int NV>
  void multiply(const A* z, int64_t depth, const A* weights, int64_t n, int64_t apart, const A* next, A* sums) const {
    constexpr int64_t R = rows_of_block(NV);
    const int64_t blocks = blocks_of(n, R);
    const auto row_of = [&](int64_t i) { return i / blocks * H + n * (i % blocks) / blocks; };  // of a block, among the weights
    for (int64_t k = 0; k < depth; k += kRun) {
      const int64_t run = min(kRun, depth - k);
      for (int64_t i = 0; i < G * blocks; ++i) {
        const int64_t g = i / blocks, u = n * (i % blocks) / blocks, count = n * (i % blocks + 1) / blocks - u;
        const A* ahead = i + 1 < G * blocks ? weights + row_of(i + 1) * depth + k : k + run < depth ? weights + k + run : next;
        const int64_t slot = g + (g >= G - kOwn ? apart : 0);
        kernel_of<NV>(count)({weights + row_of(i) * depth + k, depth, ahead, z + k * NV * W, run, sums + (slot * W + u) * NV * W});
      }
    }
  }

  struct Block {
    const A* rows;  // of weights
    int64_t stride;
    const A *ahead, *z;
    int64_t run;
    A* sums;
  };
  using Kernel = void (*)(const Block&);
  template <int N>
  struct Kernels {
    Kernel of_rows[N];
  };

  // Subtracting zero is nothing, so that one load remains; adding it, which turns -0 into 0, would take two of the ports that multiply.
  static FASTSEQ_HOST_DEVICE V broadcast(A a) { return a - V{}; }

  template <int R, int NV>
  static void kernel(const Block& block) {
    const auto [rows, stride, ahead, z, run, sums] = block;
    V sum[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = V{};
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
      V value[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) value[v] = *(const V*)(z + (k * NV + v) * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V weight = broadcast(rows[r * stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] += weight * value[v];
      }
    };
    int64_t k = 0;
    for (; k + kLine <= run; k += kLine) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + r * stride + k, 0, 3);
#pragma GCC unroll 2
      for (int64_t i = 0; i < kLine; ++i) add(k + i);
    }
    for (; k < run; ++k) add(k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) *(V*)(sums + (r * NV + v) * W) += sum[r][v];
  }

  template <int NV>
  static Kernel kernel_of(int64_t rows) {
    static constexpr auto kernels = []<int... R>(std::integer_sequence<int, R...>) {
      return Kernels<sizeof...(R)>{{kernel<R + 1, NV>...}};
    }(std::make_integer_sequence<int, rows_of_block(NV)>());
    return kernels.of_rows[rows - 1];
  }

  // a unit: its new h takes the place of the first gate's sum, its new c that of the old
  template <int NV>
  void finish(int64_t unit, const A* h, A* sums, A* c) const {
    V inner[C::kVectors + 1];
    for (int i = 0; i < C::kVectors; ++i) inner[i] = V{} + (vectors ? vectors[i * H + unit] : A(0));
    for (int64_t v = 0; v < NV; ++v) {
      V gx[G], gr[G], saved[C::kSaved + 1], old[K + 1], h_next, c_next[K + 1];
      for (int g = 0; g < G; ++g) {
        gx[g] = *(const V*)(sums + (g * W * NV + v) * W);
        gr[g] = g < G - kOwn ? V{} : *(const V*)(sums + ((g + kOwn) * W * NV + v) * W);
      }
      if constexpr (K > 0) old[0] = *(const V*)(c + v * W);
      if constexpr (requires { C::forward_alone(gx, gr, old, h_next, c_next); })
        C::forward_alone(gx, gr, old, h_next, c_next);
      else
        C::forward(gx, gr, inner, *(const V*)(h + v * W), old, saved, h_next, c_next);
      *(V*)(sums + v * W) = h_next;
      if constexpr (K > 0) *(V*)(c + v * W) = c_next[0];
    }
  }

  // rows of `there` sequences [.., H], n of their columns -> [W][vectors][W]
  void transpose_in(const A* rows, int64_t there, int64_t n, int64_t vectors, A* to) const {
    for (int64_t v = 0; v < vectors; ++v) {
      V square[W];
#pragma GCC unroll 16
      for (int64_t b = 0; b < W; ++b) square[b] = rows && v * W + b < there ? Memory<A, A>::load(rows + (v * W + b) * H, n) : V{};
      transpose<W / 2, W>(square);
#pragma GCC unroll 16
      for (int64_t u = 0; u < W; ++u) *(V*)(to + (u * vectors + v) * W) = square[u];
    }
  }

  template <int NV>
  static void transpose_out(const A* from, int64_t there, int64_t n, A* rows, int64_t stride) {
    for (int64_t v = 0; v < NV; ++v) {
      V square[W];
#pragma GCC unroll 16
      for (int64_t u = 0; u < W; ++u) square[u] = *(const V*)(from + (u * NV + v) * W);
      transpose<W / 2, W>(square);
      for (int64_t b = 0; b < min(W, there - v * W); ++b) Memory<A, A>::store(rows + (v * W + b) * stride, square[b], n);
    }
  }

  const Step& s;
  const int64_t B, I, H;
  const A *w_ih, *w_hh, *bias, *vectors;
};

template <class F>
auto with_type(Type type, F&& body) {
  return type == Type::kDouble ? body.template operator()<double>() : body.template operator()<float>();
}

int64_t width(Type type) {
  return with_type(type, []<class A>() -> int64_t { return Math<A>::kWidth; });
}

int64_t sequences_of(Type type, int64_t batch) { return blocks_of(batch, width(type)) * width(type); }

void transpose(const Step& s, int64_t begin, int64_t end) {
  with_type(s.type, [&]<class A>() {
    const int64_t inputs = blocks_of(s.input, Math<A>::kWidth), depth = s.input + s.hidden;
    const auto rows = [&](const void* from, int64_t columns, int64_t place, int64_t first, int64_t last) {
      transpose_rows(static_cast<const A*>(from), s.batch, columns, place, depth, first, last, static_cast<A*>(s.operands));
    };
    rows(s.x, s.input, 0, begin, min(end, inputs));
    rows(s.h0, s.hidden, s.input, max(begin - inputs, 0), end - inputs);
  });
}

void run(const Step& s, int64_t begin, int64_t end) {
  with_type(s.type, [&]<class A>() {
    switch (s.cell) {
      case Cell::kRnnTanh: return StepKernel<A, RnnTanh>(s).run(begin, end);
      case Cell::kRnnRelu: return StepKernel<A, RnnRelu>(s).run(begin, end);
      case Cell::kLstm: return StepKernel<A, Lstm>(s).run(begin, end);
      default: return StepKernel<A, Gru>(s).run(begin, end);
    }
  });
}

}  // namespace

constexpr StepKernels kStepKernels{width, sequences_of, transpose, run};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
