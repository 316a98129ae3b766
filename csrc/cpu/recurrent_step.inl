// The kernels of recurrent_step.h for one instruction set. Included by recurrent_step_<level>.cpp, which defines FASTSEQ_LEVEL,
// FASTSEQ_VECTOR_BYTES and FASTSEQ_VECTOR_REGISTERS.

#include <cstdint>
#include <type_traits>
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
#include "activations.inl"
#include "transpose.inl"

// As in recurrent_kernel.inl.
template <class A>
struct Start {
  const A* rows = nullptr;
  int64_t stride = 0;
  int64_t vectors = 0;
};

#include "product_blocks.inl"
#include "product_fma.inl"

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

// Products of a row of x and of h at once with weights as PyTorch stores them: sums[row][column] = x[row] . w_ih[column] + h[row] .
// w_hh[column]. Lanes run along the depths, and what both leave in them is added up across the lanes together, of W sums at a time.
template <class A>
struct Joint {
  using V = typename Lanes<A>::V;
  static constexpr int64_t W = Math<A>::kWidth;

  // `count` rows, one after the other; no rows: nothing is added
  struct Operand {
    const A *rows, *weights;  // from the first column on
    int64_t depth;
  };

  // W columns, of which those after `last` are this one; give(r, first, count, values): the sums of columns first .. first + count of row r
  template <class Give>
  static void multiply(const Operand& x, const Operand& h, int64_t count, int64_t last, const Give& give) {
    int64_t r = 0;
    if constexpr (W >= 4)
      for (; r + 4 <= count; r += 4) block<4>(x, h, r, last, give);
    for (; r + 2 <= count; r += 2) block<2>(x, h, r, last, give);
    if (r < count) block<1>(x, h, r, last, give);
  }

 private:
  static constexpr int64_t kTogether = 8;  // columns that are read side by side, as in product_in_place.inl

  template <int R, class Give>
  static FASTSEQ_HOST_DEVICE void block(const Operand& x, const Operand& h, int64_t r, int64_t last, const Give& give) {
    constexpr int64_t C = W / R;
    for (int64_t first = 0; first < C * R; first += C) {
      V sums[W];
      products<R>(x, h, r, first, last, sums);
      const V values = added_up<W / 2>(sums);
#pragma GCC unroll 4
      for (int64_t i = 0; i < R; ++i) give(r + i, first, C, reinterpret_cast<const A*>(&values) + i * C);
    }
  }

  // sums[row * C + column], each still W partial ones
  template <int R>
  static __attribute__((noinline)) void products(const Operand& x, const Operand& h, int64_t r, int64_t first, int64_t last, V* sums) {
    constexpr int64_t C = W / R, N = C < kTogether ? C : kTogether;
    for (int64_t j = 0; j < C; j += N) {
      V sum[R][N];
#pragma GCC unroll 16
      for (int64_t i = 0; i < R * N; ++i) sum[i / N][i % N] = V{};
      for (const Operand* operand : {&x, &h}) {
        const int64_t depth = operand->depth;
        if (!operand->rows) continue;
        const A *rows = operand->rows + r * depth, *column[N];
#pragma GCC unroll 8
        for (int64_t c = 0; c < N; ++c) column[c] = operand->weights + min(first + j + c, last) * depth;
        const auto add = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
          V value[R];
#pragma GCC unroll 4
          for (int64_t i = 0; i < R; ++i) value[i] = Memory<A, A>::load(rows + i * depth + k, n);
#pragma GCC unroll 8
          for (int64_t c = 0; c < N; ++c) {
            const V weight = Memory<A, A>::load(column[c] + k, n);
#pragma GCC unroll 4
            for (int64_t i = 0; i < R; ++i) sum[i][c] += value[i] * weight;
          }
        };
        int64_t k = 0;
        for (; k + W <= depth; k += W) add(k, W);
        if (k < depth) add(k, depth - k);
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < R * N; ++i) sums[i / N * C + j + i % N] = sum[i / N][i % N];
    }
  }

  // Lane j of the result is the sum over the lanes of sums[j]. A stage adds lanes S apart, of two vectors in one.
  template <int S>
  static FASTSEQ_HOST_DEVICE V added_up(V* sums) {
    if constexpr (S == 0) {
      return sums[0];
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < S; ++i) {
        const V a = sums[i], b = sums[i + S];
        [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
          sums[i] = __builtin_shufflevector(a, b, (J & S ? W + J : J)...) +
                    __builtin_shufflevector(a, b, (J & S ? W + (J ^ S) : J ^ S)...);
        }(std::make_integer_sequence<int, W>());
      }
      return added_up<S / 2>(sums);
    }
  }
};

// A step of few sequences. By weights as PyTorch stores them lanes run along the depths, and the sums of x and of h are added up across
// them together; by packed ones along the units. The units of some tiles are finished at once, two vectors of them side by side.
template <class A, template <class> class Cell_>
class FewKernel {
  using M = std::conditional_t<sizeof(A) == 4, Activation<A>, Math<A>>;
  using V = typename M::V;
  using C = Cell_<OneRow<A, M>>;
  using Product = MultiplyAdd<A>;
  using Matrix = typename Product::Matrix;
  static constexpr int64_t W = M::kWidth;
  static constexpr int G = C::kGates, K = C::kStates, kOwn = C::kOwnRecurrent;
  static constexpr int kSums = G + kOwn;               // in place: of the gates, the last ones' of x; then of these R h
  static constexpr int64_t UB = G == 1 ? kTileVectors : 1;  // vectors of units of a packed tile
  static constexpr int64_t kRows = kSequencesOfStep;   // sequences, times tiles, whose sums are kept

 public:
  explicit FewKernel(const Step& s)
      : s(s), B(s.batch), I(s.input), H(s.hidden), x(static_cast<const A*>(s.x)), h0(static_cast<const A*>(s.h0)),
        c0(static_cast<const A*>(s.c0)), bias(static_cast<const A*>(s.bias)), vectors(static_cast<const A*>(s.vectors)),
        y(static_cast<A*>(s.y)), h_n(static_cast<A*>(s.h_n)), c_n(static_cast<A*>(s.c_n)),
        x_rows(s.operands, I), h_rows(static_cast<char*>(s.operands) + (s.operands ? Matrix::bytes(B, I) : 0), H) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      if (s.packed_hh)
        multiply_packed(tile, tile + 1 < end ? tile + 1 : begin);
      else
        multiply(tile);
      if (rows + B > kRows) finish();
    }
    finish();
  }

 private:
  // W units of a sequence: the sums of a gate and of the next, `stride` apart; of the last kOwn gates those of x and of R h
  struct Item {
    const A *sums, *of_x, *of_h;
    int64_t stride, sequence, unit, count;
  };

  void add(const A* sums_of, const A* of_x, const A* of_h, int64_t stride, int64_t sequence, int64_t unit) {
    items[count++] = {sums_of, of_x, of_h, stride, sequence, unit, min(W, H - unit)};
  }

  void multiply(int64_t tile) {
    A* to = sums + rows * kSums * W;
    const int64_t u0 = tile * W;
    for (int g = 0; g < kSums; ++g) {
      const int64_t first = (g < G ? g : g - kOwn) * H + u0;
      const A *own_x = g < G ? x : nullptr, *own_h = g < G - kOwn || g >= G ? h0 : nullptr;
      Joint<A>::multiply({own_x, static_cast<const A*>(s.w_ih) + first * I, I}, {own_h, static_cast<const A*>(s.w_hh) + first * H, H}, B,
                         H - 1 - u0, [&](int64_t r, int64_t lane, int64_t n, const A* values) __attribute__((always_inline)) {
                           __builtin_memcpy(to + (r * kSums + g) * W + lane, values, n * sizeof(A));
                         });
    }
    for (int64_t b = 0; b < B; ++b, to += kSums * W) add(to, to, to + kOwn * W, W, b, u0);
    rows += B;
  }

  void multiply_packed(int64_t tile, int64_t next) {
    const int64_t u0 = tile * UB * W, blocks = min(UB, blocks_of(H - u0, W)), n = G * blocks;
    A *of_x = sums + rows * G * UB * W, *of_h = sums_of_h + rows * G * UB * W;
    const auto at = [](const void* packed, int64_t i, int64_t depth) {
      return static_cast<const char*>(packed) + i * Product::tile_bytes(G * UB, depth);
    };
    alignas(64) A start[G * UB * W];
    for (int64_t v = 0; v < n; ++v) {
      const int64_t u = u0 + v % blocks * W;
      *(V*)(start + v * W) = bias ? Memory<A, A>::load(bias + v / blocks * H + u, H - u) : V{};
    }
    const Product product(B, false);
    const void *own = at(s.packed_hh, tile, H), *after = at(s.packed_ih, next, I);
    product.multiply(x_rows, 0, B, at(s.packed_ih, tile, I), n, I, {start, 0, n}, of_x, h0 ? own : after, 0);
    if (h0) product.multiply(h_rows, 0, B, own, n, H, {of_x, n * W, n / G * (G - kOwn)}, of_h, after, 0);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t place = (b * n + i) * W;
        add((h0 ? of_h : of_x) + place, of_x + place, h0 ? of_h + place : nullptr, blocks * W, b, u0 + i * W);
      }
    rows += B;
  }

  void finish() {
    int64_t i = 0;
    if constexpr (FASTSEQ_VECTOR_REGISTERS == 32)
      for (; i + 2 <= count; i += 2) finish<TwoRows<A, M>>(items + i);
    for (; i < count; ++i) finish<OneRow<A, M>>(items + i);
    rows = count = 0;
  }

  template <class Rows>
  FASTSEQ_HOST_DEVICE void finish(const Item* of) const {
    using R = typename Rows::V;
    const auto load = [&](const A* from, int64_t i, int64_t row) __attribute__((always_inline)) {
      return from ? Memory<A, A>::load(from + row * H + of[i].unit, of[i].count) : V{};
    };
    const auto sequences = [&](const A* from) __attribute__((always_inline)) {
      return Rows::gather([&](int64_t i) { return load(from, i, of[i].sequence); });
    };
    const A* added = s.packed_hh ? nullptr : bias;
    R gx[G], gr[G], inner[C::kVectors + 1], saved[C::kSaved + 1], c[K + 1], h_next, c_next[K + 1];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const bool own = g >= G - kOwn;
      gx[g] = Rows::gather([&](int64_t i) { return *(const V*)((own ? of[i].of_x : of[i].sums) + g * of[i].stride) + load(added, i, g); });
      gr[g] = Rows::gather([&](int64_t i) { return !own ? -V{} : of[i].of_h ? *(const V*)(of[i].of_h + g * of[i].stride) : V{}; });
    }
#pragma GCC unroll 4
    for (int v = 0; v < C::kVectors; ++v) inner[v] = Rows::gather([&](int64_t i) { return load(vectors, i, v); });
    if constexpr (K > 0) c[0] = sequences(c0);
    if constexpr (requires { Cell_<Rows>::forward_alone(gx, gr, c, h_next, c_next); })
      Cell_<Rows>::forward_alone(gx, gr, c, h_next, c_next);
    else
      Cell_<Rows>::forward(gx, gr, inner, sequences(h0), c, saved, h_next, c_next);
    Rows::scatter(h_next, [&](int64_t i, V v) {
      Memory<A, A>::store(y + of[i].sequence * s.y_stride + of[i].unit, v, of[i].count);
      if (h_n) Memory<A, A>::store(h_n + of[i].sequence * H + of[i].unit, v, of[i].count);
    });
    if constexpr (K > 0)
      Rows::scatter(c_next[0], [&](int64_t i, V v) { Memory<A, A>::store(c_n + of[i].sequence * H + of[i].unit, v, of[i].count); });
  }

  const Step& s;
  const int64_t B, I, H;
  const A *x, *h0, *c0, *bias, *vectors;
  A *y, *h_n, *c_n;
  const Matrix x_rows, h_rows;  // of packed weights
  int64_t rows = 0, count = 0;
  Item items[kRows * UB];
  alignas(64) A sums[kRows * max(kSums, G * UB) * W];
  alignas(64) A sums_of_h[kRows * G * UB * W];
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

// Calls body.template operator()<A, Cell>() for the type and the cell of a step.
template <class F>
void with_step(const Step& s, F&& body) {
  with_type(s.type, [&]<class A>() {
    switch (s.cell) {
      case Cell::kRnnTanh: return body.template operator()<A, RnnTanh>();
      case Cell::kRnnRelu: return body.template operator()<A, RnnRelu>();
      case Cell::kLstm: return body.template operator()<A, Lstm>();
      default: return body.template operator()<A, Gru>();
    }
  });
}

void run(const Step& s, int64_t begin, int64_t end) {
  with_step(s, [&]<class A, template <class> class Cell>() { StepKernel<A, Cell>(s).run(begin, end); });
}

int64_t bytes_of_few(const Step& s) {
  return with_type(s.type, [&]<class A>() -> int64_t {
    using Matrix = typename MultiplyAdd<A>::Matrix;
    return Matrix::bytes(s.batch, s.input) + Matrix::bytes(s.batch, s.hidden);
  });
}

void gather_few(const Step& s) {
  with_type(s.type, [&]<class A>() {
    using Matrix = typename MultiplyAdd<A>::Matrix;
    const Matrix x(s.operands, s.input), h(static_cast<char*>(s.operands) + Matrix::bytes(s.batch, s.input), s.hidden);
    for (int64_t b = 0; b < s.batch; ++b) {
      x.put(b, static_cast<const A*>(s.x) + b * s.input, s.input);
      if (s.h0) h.put(b, static_cast<const A*>(s.h0) + b * s.hidden, s.hidden);
    }
  });
}

void run_few(const Step& s, int64_t begin, int64_t end) {
  with_step(s, [&]<class A, template <class> class Cell>() { FewKernel<A, Cell>(s).run(begin, end); });
}

}  // namespace

constexpr StepKernels kStepKernels{width, sequences_of, transpose, run, bytes_of_few, gather_few, run_few};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
