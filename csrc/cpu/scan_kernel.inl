// The loops of scan_kernel.h for one instruction set. Included by scan_<level>.cpp, which defines FASTSEQ_LEVEL and FASTSEQ_VECTOR_BYTES.
//
// Time is the outer loop, channels the inner: rows of memory are walked as they lie, and with channels on the lanes nothing waits for the
// chain of a state. A part is all steps of some rows and channels.

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/portable.h"
#include "scan_kernel.h"

namespace fastseq::cpu::FASTSEQ_LEVEL {
namespace {

#include "vector.inl"
#include "scan_cells.inl"

constexpr int64_t kRun = 64;  // steps whose contributions to the gradient of a constant a are summed by themselves: long sums err less

// Past the caches, to memory aligned like V: a line that is written whole need not be read first.
template <class V>
FASTSEQ_HOST_DEVICE void stream(void* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  __builtin_memcpy(p, &v, sizeof(V));
#endif
}

// Before what was streamed is given to another thread.
inline void end_of_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Where the inputs of a step stand, or room for their gradients: a of E, b and gate of S, vector of A; null where there is none.
template <class S, class A, class E>
struct Places {
  S* b;
  E* a;
  S* gate;
  A* vector;
};

// Of real states. E: the type of a in memory.
template <class S, class A, class E, ScanCell kCell, bool kEach>
struct Real {
  using Stored = S;
  using Wide = A;
  using Coefficient = E;
  using V = typename Lanes<A>::V;
  using In = Memory<S, A>;
  using Own = Memory<A, A>;
  using Of = Memory<E, A>;
  static constexpr int64_t W = In::kWidth, kState = 1, kCoefficient = 1;
  static constexpr bool kEveryChannel = kEach;

  using Made = Transition<A, kCell>;
  using Inputs = Places<const S, const A, const E>;
  static constexpr ScanCellRow kRow = row_of(kCell);

  // What the cell reads of a step; b where the coefficient alone is wanted of a cell that does not make it of b is not.
  static FASTSEQ_HOST_DEVICE Given<A> load(const Inputs& x, bool with_b, int64_t c, int64_t n) {
    Given<A> given{load_a(x.a, c, n), {}, {}, {}};
    if (with_b || kRow.reads_b) given.b = In::load(x.b + c, n);
    if constexpr (kRow.gate) given.gate = In::load(x.gate + c, n);
    if constexpr (kRow.vector) given.vector = Own::load(x.vector + c, n);
    return given;
  }

  static FASTSEQ_HOST_DEVICE V load_a(const E* a, int64_t c, int64_t n) {
    if constexpr (kEach)
      return Of::load(a + c, n);
    else
      return V{} + a[0];
  }

  // at(place, count) for every vector of n channels.
  template <class F>
  static FASTSEQ_HOST_DEVICE void vectors(int64_t n, F&& at) {
    int64_t c = 0;
#pragma GCC unroll 4
    for (; c + W <= n; c += W) at(c, W);
    if (c < n) at(c, n - c);
  }

  // h = addend + coefficient before; state, if it is no row of h itself, as well
  static void step(const Inputs& x, const A* before, S* h, A* state, int64_t n) {
    const auto finish = [&](int64_t c, int64_t count, V v) __attribute__((always_inline)) {
      In::store(h + c, v, count);
      if constexpr (!__is_same(S, A)) Own::store(state + c, v, count);
    };
    if (!before)
      return vectors(n, [&](int64_t c, int64_t count) {
        if constexpr (kRow.reads_b)
          finish(c, count, Made(load(x, true, c, count), true).addend);
        else
          finish(c, count, In::load(x.b + c, count));  // a may be anything here
      });
    vectors(n, [&](int64_t c, int64_t count) {
      const Made made(load(x, true, c, count), false);
      finish(c, count, made.addend + made.coefficient * Own::load(before + c, count));
    });
  }

  // lambda = dh + carry goes to the addend, lambda before to the coefficient; carry = coefficient lambda, or 0 without a state before.
  // What is summed over the steps is added to of.vector: the gradient of a cell's vector, else that of a.
  template <class H>
  static void step_backward(const S* dh, const Inputs& x, const H* before, A* carry, const Places<S, A, E>& of, int64_t n, bool streams) {
    if (dh && before && of.b && of.a && !of.gate == !kRow.gate && !of.vector == !kRow.vector) {  // without a question in its loop
      Given<A> gradient{};
      const auto usual = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        const V lambda = In::load(dh + c, count) + Own::load(carry + c, count);
        const Made made(load(x, false, c, count), false);
        made.backward(lambda * Memory<H, A>::load(before + c, count), lambda, gradient);
        Own::store(carry + c, made.coefficient * lambda, count);
        if constexpr (kRow.vector) Own::store(of.vector + c, Own::load(of.vector + c, count) + gradient.vector, count);
      };
      if constexpr (__is_same(S, A) && __is_same(E, A)) {
        if (streams && n % W == 0 && ((uintptr_t)of.b | (uintptr_t)of.a | (uintptr_t)of.gate) % sizeof(V) == 0) {
          for (int64_t c = 0; c < n; c += W) {
            usual(c, W);
            stream(of.b + c, gradient.b), stream(of.a + c, gradient.a);
            if constexpr (kRow.gate) stream(of.gate + c, gradient.gate);
          }
          return;
        }
      }
      return vectors(n, [&](int64_t c, int64_t count) {
        __builtin_prefetch(of.b + c, 1), __builtin_prefetch(of.a + c, 1);  // both lines come while the rest is computed
        usual(c, count);
        In::store(of.b + c, gradient.b, count), Of::store(of.a + c, gradient.a, count);
        if constexpr (kRow.gate) In::store(of.gate + c, gradient.gate, count);
      });
    }
    vectors(n, [&](int64_t c, int64_t count) {
      V lambda = Own::load(carry + c, count), through{}, of_coefficient{};
      if (dh) lambda += In::load(dh + c, count);
      if (before) of_coefficient = lambda * Memory<H, A>::load(before + c, count);
      Given<A> gradient{{}, lambda, {}, {}};
      if (before || kRow.reads_b) {
        const Made made(load(x, false, c, count), !before);
        made.backward(of_coefficient, lambda, gradient);
        if (before) through = made.coefficient * lambda;
      }
      if (of.b) In::store(of.b + c, gradient.b, count);
      if (of.a) Of::store(of.a + c, gradient.a, count);
      if (of.gate) In::store(of.gate + c, gradient.gate, count);
      if (of.vector) Own::store(of.vector + c, Own::load(of.vector + c, count) + (kRow.vector ? gradient.vector : gradient.a), count);
      Own::store(carry + c, through, count);
    });
  }
};

// Of complex states and of blocks, in the words of one number: the compiler finds the vectors.
template <class A, bool kBlock, bool kEach>
struct Pairs {
  using Stored = A;
  using Wide = A;
  using Coefficient = A;
  static constexpr int64_t kState = 2, kCoefficient = kBlock ? 4 : 2;
  static constexpr bool kEveryChannel = kEach;
  using Inputs = Places<const A, const A, const A>;

  static FASTSEQ_HOST_DEVICE const A* coefficient(const A* a, int64_t c) { return kEach ? a + c * kCoefficient : a; }

  static void step(const Inputs& x, const A* __restrict before, A* __restrict h, A*, int64_t n) {
    const A* __restrict a = x.a;
    const A* __restrict b = x.b;
    if (!before) {
      for (int64_t i = 0; i < 2 * n; ++i) h[i] = b[i];
      return;
    }
    for (int64_t c = 0; c < n; ++c) {
      const A* k = coefficient(a, c);
      const A x = before[2 * c], y = before[2 * c + 1];
      if constexpr (kBlock) {
        h[2 * c] = b[2 * c] + (k[0] * x + k[1] * y);
        h[2 * c + 1] = b[2 * c + 1] + (k[2] * x + k[3] * y);
      } else {
        h[2 * c] = b[2 * c] + (k[0] * x - k[1] * y);
        h[2 * c + 1] = b[2 * c + 1] + (k[0] * y + k[1] * x);
      }
    }
  }

  // through the transposed block, or the conjugate; da is the outer product, or the product with the conjugate
  static void step_backward(const A* dh, const Inputs& inputs, const A* before, A* carry, const Places<A, A, A>& of, int64_t n, bool) {
    const A* a = inputs.a;
    A *const db = of.b, *const da = of.a, *const sums = of.vector;
    for (int64_t c = 0; c < n; ++c) {
      A u = carry[2 * c], v = carry[2 * c + 1];
      if (dh) u += dh[2 * c], v += dh[2 * c + 1];
      if (db) db[2 * c] = u, db[2 * c + 1] = v;
      A gradient[4] = {}, through[2] = {};
      if (before) {
        const A* k = coefficient(a, c);
        const A x = before[2 * c], y = before[2 * c + 1];
        if constexpr (kBlock) {
          through[0] = k[0] * u + k[2] * v, through[1] = k[1] * u + k[3] * v;
          gradient[0] = u * x, gradient[1] = u * y, gradient[2] = v * x, gradient[3] = v * y;
        } else {
          through[0] = k[0] * u + k[1] * v, through[1] = k[0] * v - k[1] * u;
          gradient[0] = u * x + v * y, gradient[1] = v * x - u * y;
        }
      }
      for (int64_t i = 0; i < kCoefficient; ++i) {
        if (da) da[kCoefficient * c + i] = gradient[i];
        if (sums) sums[kCoefficient * c + i] += gradient[i];
      }
      carry[2 * c] = through[0], carry[2 * c + 1] = through[1];
    }
  }
};

// Where a row lies: its first step in memory, its steps, and where the states of step t of it stand.
struct Row {
  int64_t index, start, length;
  FASTSEQ_HOST_DEVICE Row(const Scan& s, int64_t r) : index(r), start(0), length(s.steps) {
    const auto clamped = [](int64_t value, int64_t most) { return value < 0 ? 0 : value > most ? most : value; };
    if (s.starts) start = clamped(s.starts[r], s.steps), length = clamped(s.starts[r + 1], s.steps) - start;
    if (s.lengths) length = clamped(s.lengths[r], s.steps);
    if (length < 0) length = 0;
  }
};

template <class E>
FASTSEQ_HOST_DEVICE E* place(const Scan& s, const ScanRows& rows, const Row& row, int64_t t, int64_t channel) {
  if (!rows.data) return nullptr;
  return static_cast<E*>(rows.data) + (row.start + t) * rows.step + (s.starts ? 0 : row.index * rows.row) + channel;
}

// Whether step t has no state before it in its row: the first of the walk without an initial state, or what a reset cuts off.
FASTSEQ_HOST_DEVICE bool begins(const Scan& s, const Row& row, int64_t t, bool first) {
  if (first && !s.initial) return true;
  if (!s.resets) return false;
  const int64_t behind = s.reverse ? t + 1 : t;  // a reset cuts between a step of memory and the one before it
  if (behind == row.length) return false;
  return s.resets[(row.start + behind) * s.reset_step + (s.starts ? 0 : row.index * s.reset_row)];
}

template <class T>
void fill(T* to, int64_t n) {
  if (to) __builtin_memset(to, 0, n * sizeof(T));
}

template <class T>
void copy(T* to, const void* from, int64_t n) {
  if (from)
    __builtin_memcpy(to, from, n * sizeof(T));
  else
    fill(to, n);
}

// Rows that lie between the steps of one another are walked together, others one after the other.
template <class Walk>
void walk_rows(const Scan& s, const ScanRows& rows, const ScanPart& part, Walk&& walk) {
  const bool together = !s.starts && rows.row < rows.step;
  for (int64_t first = 0; first < part.rows; first += together ? part.rows : 1) walk(part.row + first, together ? part.rows : 1);
}

template <class Cell>
FASTSEQ_HOST_DEVICE typename Cell::Inputs inputs_of(const Scan& s, const ScanPart& part, const Row& row, int64_t t) {
  using S = typename Cell::Stored;
  using A = typename Cell::Wide;
  const int64_t at = part.channel * Cell::kState, at_a = Cell::kEveryChannel ? part.channel * Cell::kCoefficient : 0;
  const A* vector = s.vector ? static_cast<const A*>(s.vector) + part.channel : nullptr;
  return {place<const S>(s, s.b, row, t, at), place<const typename Cell::Coefficient>(s, s.a, row, t, at_a),
          place<const S>(s, s.gate, row, t, at), vector};
}

// The description is a copy, which no store can change: it stays in registers.
template <class Cell>
void forward_of(const Scan s, const ScanPart& part, typename Cell::Wide* states) {
  using S = typename Cell::Stored;
  using A = typename Cell::Wide;
  constexpr bool kOwn = !__is_same(S, A);  // h is rounded: the state has a place of its own
  const int64_t N = part.channels * Cell::kState, at = part.channel * Cell::kState, width = s.channels * Cell::kState;
  walk_rows(s, s.h, part, [&](int64_t begin, int64_t count) {
    const Row only(s, begin);
    for (int64_t i = 0; i < s.steps; ++i) {
      for (int64_t r = 0; r < count; ++r) {
        const Row row = count == 1 ? only : Row(s, begin + r);
        const int64_t t = s.reverse ? (s.starts ? row.length : s.steps) - 1 - i : i;
        if (t < 0 || t >= row.length) {
          if (!s.starts) fill(place<S>(s, s.h, row, t, at), N);
          continue;
        }
        const bool first = t == (s.reverse ? row.length - 1 : 0);
        A* state = kOwn ? states + r * N : nullptr;
        const A* before = state;
        if (first)
          before = s.initial ? static_cast<const A*>(s.initial) + row.index * width + at : nullptr;
        else if constexpr (!kOwn)
          before = place<A>(s, s.h, row, s.reverse ? t + 1 : t - 1, at);
        if (begins(s, row, t, first)) before = nullptr;
        Cell::step(inputs_of<Cell>(s, part, row, t), before, place<S>(s, s.h, row, t, at), state, part.channels);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const Row row(s, begin + r);
      const int64_t place_of_state = row.index * width + at;
      const void* last = static_cast<const A*>(s.initial);
      if (last) last = static_cast<const A*>(last) + place_of_state;
      if (row.length) {
        last = states + r * N;
        if constexpr (!kOwn) last = place<A>(s, s.h, row, s.reverse ? 0 : row.length - 1, at);
      }
      copy(static_cast<A*>(s.final) + place_of_state, last, N);
    }
  });
}

template <class Cell>
void backward_of(const Scan s, const ScanPart& part, typename Cell::Wide* carries) {
  using S = typename Cell::Stored;
  using A = typename Cell::Wide;
  using E = typename Cell::Coefficient;
  const int64_t N = part.channels * Cell::kState, at = part.channel * Cell::kState, width = s.channels * Cell::kState;
  const int64_t M = part.channels * Cell::kCoefficient, each_a = part.channel * Cell::kCoefficient;
  const bool constant = s.da.data && s.constant, sums_up = constant || s.dvector;
  walk_rows(s, s.h, part, [&](int64_t begin, int64_t count) {
    A* const runs = carries + count * N;  // [count, M] of what is summed over the steps: a constant a's gradient, or a vector's
    // what a run has summed joins the gradient
    const auto total_of = [&](const Row& row) {
      if (constant) return static_cast<A*>(s.da.data) + row.index * s.da.row + each_a;
      return static_cast<A*>(s.dvector) + row.index * width + at;
    };
    const auto join = [&](const Row& row, int64_t r) {
      A* total = total_of(row);
      for (int64_t i = 0; i < M; ++i) total[i] += runs[r * M + i];
      fill(runs + r * M, M);
    };
    for (int64_t r = 0; r < count; ++r) {
      const Row row(s, begin + r);
      const A* given = static_cast<const A*>(s.dfinal);
      copy(carries + r * N, given ? given + row.index * width + at : nullptr, N);
      if (sums_up) {
        fill(runs + r * M, M);
        fill(total_of(row), M);
      }
    }
    const Row only(s, begin);
    for (int64_t i = 0; i < s.steps; ++i) {
      for (int64_t r = 0; r < count; ++r) {
        const Row row = count == 1 ? only : Row(s, begin + r);
        const int64_t t = s.reverse ? i : (s.starts ? row.length : s.steps) - 1 - i;
        if (t < 0 || t >= row.length) {
          if (!s.starts) {
            fill(place<S>(s, s.db, row, t, at), N);
            fill(place<S>(s, s.dgate, row, t, at), N);
            if (!constant) fill(place<E>(s, s.da, row, t, each_a), M);
          }
          continue;
        }
        const bool first = t == (s.reverse ? row.length - 1 : 0);
        const S* dh = place<const S>(s, s.dh, row, t, at);
        const auto inputs = inputs_of<Cell>(s, part, row, t);
        const Places<S, A, E> of{place<S>(s, s.db, row, t, at), constant ? nullptr : place<E>(s, s.da, row, t, each_a),
                                 place<S>(s, s.dgate, row, t, at), sums_up ? runs + r * M : nullptr};
        A* carry = carries + r * N;
        const bool fresh = begins(s, row, t, first);
        if (first && !fresh) {
          const A* before = static_cast<const A*>(s.initial) + row.index * width + at;
          Cell::step_backward(dh, inputs, before, carry, of, part.channels, s.streams);
        } else {
          const S* before = fresh ? nullptr : place<const S>(s, s.h, row, s.reverse ? t + 1 : t - 1, at);
          Cell::step_backward(dh, inputs, before, carry, of, part.channels, s.streams);
        }
        if (sums_up && i % kRun == kRun - 1) join(row, r);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const Row row(s, begin + r);
      if (sums_up) join(row, r);
      copy(static_cast<A*>(s.dinitial) + row.index * width + at, carries + r * N, N);
    }
  });
  if (s.streams) end_of_streams();
}

// Calls body.template operator()<Cell>().
template <class F>
void with_cell(const Scan& s, F&& body) {
  const auto of_type = [&]<class S, class A>() {
    const auto makes = [&]<ScanCell kCell>() {
      if constexpr (kCell == ScanCell::kGiven)
        s.each ? body.template operator()<Real<S, A, A, kCell, true>>() : body.template operator()<Real<S, A, A, kCell, false>>();
      else if constexpr (kCell == ScanCell::kLog)
        s.wide_a ? body.template operator()<Real<S, A, A, kCell, true>>() : body.template operator()<Real<S, A, S, kCell, true>>();
      else
        body.template operator()<Real<S, A, S, kCell, true>>();
    };
    switch (s.cell) {
#define FASTSEQ_SCAN_CASE(Name, ...) \
  case ScanCell::k##Name: return makes.template operator()<ScanCell::k##Name>();
      FASTSEQ_SCAN_CELLS(FASTSEQ_SCAN_CASE)
#undef FASTSEQ_SCAN_CASE
    }
  };
  const auto pairs = [&]<class A, bool kBlock>() {
    s.each ? body.template operator()<Pairs<A, kBlock, true>>() : body.template operator()<Pairs<A, kBlock, false>>();
  };
  const bool wide = s.type == Type::kDouble;
  if (s.kind == ScanKind::kComplex) return wide ? pairs.template operator()<double, false>() : pairs.template operator()<float, false>();
  if (s.kind == ScanKind::kBlocks) return wide ? pairs.template operator()<double, true>() : pairs.template operator()<float, true>();
  switch (s.type) {
    case Type::kFloat: return of_type.template operator()<float, float>();
    case Type::kDouble: return of_type.template operator()<double, double>();
    case Type::kBfloat16: return of_type.template operator()<bfloat16, float>();
    case Type::kHalf: return of_type.template operator()<float16, float>();
  }
}

int64_t scratch(const Scan& s, const ScanPart& part) {
  const int64_t kind = static_cast<int64_t>(s.kind), numbers = kScanState[kind] + kScanCoefficient[kind];
  return part.rows * part.channels * numbers * (s.type == Type::kDouble ? 8 : 4);
}

void forward(const Scan& s, const ScanPart& part, void* scratch) {
  with_cell(s, [&]<class Cell>() { forward_of<Cell>(s, part, static_cast<typename Cell::Wide*>(scratch)); });
}

void backward(const Scan& s, const ScanPart& part, void* scratch) {
  with_cell(s, [&]<class Cell>() { backward_of<Cell>(s, part, static_cast<typename Cell::Wide*>(scratch)); });
}

}  // namespace

constexpr ScanKernels kScanKernels{scratch, forward, backward};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
