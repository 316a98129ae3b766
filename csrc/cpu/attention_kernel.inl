// Attention for one instruction set: forward, weights, backward. Included by attention_<level>.cpp, which defines FASTSEQ_LEVEL,
// FASTSEQ_VECTOR_BYTES and FASTSEQ_VECTOR_REGISTERS; contracts stand in attention_kernel.h.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/portable.h"
#include "attention_kernel.h"

namespace fastseq::cpu::FASTSEQ_LEVEL {
namespace {

#include "vector.inl"
#include "activations.inl"
#include "transpose.inl"
#include "philox.inl"
#include "attention_scores.inl"

// Rows of keys or values as products read them: where they lie, or copied. Rows of other types are widened, and those far apart are
// brought together, a line more than they need between them: a product that goes down their columns would find them in few cache sets.
template <class A>
struct Operand {
  const A* data;
  int64_t row;
};

template <class A>
constexpr int64_t kLineOf = 64 / sizeof(A);

template <class A>
int64_t copied_row(int64_t features) {
  return blocks_of(features, kLineOf<A>) * kLineOf<A> + kLineOf<A>;
}

template <class S, class A = Wide<S>>
void copy_rows(const S* from, int64_t row, int64_t rows, int64_t features, A* to) {
  constexpr int64_t W = Math<A>::kWidth;
  const int64_t whole = features / W * W;
  for (int64_t j = 0; j < rows; ++j, from += row, to += copied_row<A>(features)) {
    for (int64_t e = 0; e < whole; e += W) store_vector(to + e, Memory<S, A>::load(from + e, W));
    if (whole < features) store_vector(to + whole, Memory<S, A>::load(from + whole, features - whole));
  }
}

template <class A>
constexpr int64_t kNear = 512 / sizeof(A);  // rows that are not far apart

enum class Read { kRows, kColumns, kVectors };  // along each; a few down their columns; whole vectors, down the rows

template <Read kRead, class S, class A = Wide<S>>
Operand<A> operand(const S* from, int64_t row, int64_t rows, int64_t features, A* copy) {
  if constexpr (std::is_same_v<S, A>) {
    if (kRead == Read::kRows || (kRead == Read::kColumns ? row < kNear<A> : features % Math<A>::kWidth == 0)) return {from, row};
  }
  copy_rows(from, row, rows, features, copy);
  return {copy, copied_row<A>(features)};
}

// Keys or values of a head, copied once for all the blocks of queries that a thread works on, a line of them when it is first asked for: where
// heads lie beside one another, rows far apart would be found in few sets of the second-level cache, too.
template <class S, class A = Wide<S>>
class Kept {
 public:
  Kept(Arena& arena, bool keeps, int64_t rows, int64_t features)
      : features_(features),
        data_(keeps ? arena.take<A>(rows * copied_row<A>(features)) : nullptr),
        done_(keeps ? arena.take<bool>(blocks_of(rows, kLine)) : nullptr),
        keeps_(keeps) {}

  bool keeps() const { return keeps_; }
  // rows of keys 0 .. count
  void start(const S* from, int64_t row, int64_t count) {
    if (!keeps_ || (from == from_ && row == row_ && count == count_)) return;
    from_ = from, row_ = row, count_ = count;
    __builtin_memset(done_, 0, blocks_of(count, kLine));
  }
  // keys begin .. begin + n; begin is a multiple of kLine
  Operand<A> rows(int64_t begin, int64_t n) {
    const int64_t to = copied_row<A>(features_);
    for (int64_t line = begin / kLine; line * kLine < begin + n; ++line) {
      if (done_[line]) continue;
      const int64_t first = line * kLine;
      copy_rows(from_ + first * row_, row_, min(kLine, count_ - first), features_, data_ + first * to);
      done_[line] = true;
    }
    return {data_ + begin * to, to};
  }

 private:
  int64_t features_;
  A* data_;
  bool* done_;
  bool keeps_;
  const S* from_ = nullptr;
  int64_t row_ = 0, count_ = 0;
};

// log x of a normal number: x = 2^n m with m about 1, log m = 2 atanh((m - 1) / (m + 1))
template <class A>
typename Math<A>::V log_of(typename Math<A>::V x) {
  using L = Lanes<A>;
  using V = typename L::V;
  using I = typename L::I;
  constexpr A kHalf = A(0.70710678118654752440);
  const I shifted = ((I)x - (I)(V{} + kHalf)) >> L::kMantissa;
  const V m = (V)((I)x - (shifted << L::kMantissa)), n = __builtin_convertvector(shifted, V);
  const V t = (m - A(1)) / (m + A(1)), square = t * t;
  constexpr int last = sizeof(L::kAtanh) / sizeof(A) - 1;
  V q = V{} + L::kAtanh[last];
#pragma GCC unroll 16
  for (int i = last - 1; i >= 0; --i) q = q * square + L::kAtanh[i];
  return n * A(0.69314718055994530942) + (A(2) * t + t * square * q);
}

// Sums of what of(place, vector) gives for n rows [key][lane], run by run: rounding grows with the length of a sum, and what it takes from a
// sum of weights is wrong in all of them alike.
template <int NV, class A, class Of>
FASTSEQ_HOST_DEVICE void sum_in_runs(int64_t n, typename Math<A>::V (&sums)[NV], const Of& of) {
  constexpr int64_t kRows = 8, W = Math<A>::kWidth;
  for (int v = 0; v < NV; ++v) sums[v] = typename Math<A>::V{};
  for (int64_t row = 0; row < n;) {
    typename Math<A>::V of_run[NV];
    for (int v = 0; v < NV; ++v) of_run[v] = typename Math<A>::V{};
    for (const int64_t end = min(row + kRows, n); row < end; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) of_run[v] += of((row * NV + v) * W, v);
    for (int v = 0; v < NV; ++v) sums[v] += of_run[v];
  }
}

// A block of queries and the softmax of its lanes.
template <class S>
class Softmax {
 public:
  using A = Wide<S>;
  using V = typename Math<A>::V;
  static constexpr int64_t W = Math<A>::kWidth;

  Softmax(const Attention& given, Arena& arena)
      : a(given),
        block(given, arena),
        highest_(arena.take<A>(kMostLanes<A>)),
        total_(arena.take<A>(kMostLanes<A>)),
        factor_(arena.take<A>(kMostLanes<A>)) {}

  static int64_t padded(int64_t features) { return blocks_of(features, W) * W; }

  const Attention& a;
  Block<S> block;

  const S* row_of(const ConstRows& rows, int64_t j) const {
    return static_cast<const S*>(rows.data) + rows.offset(a.cu_q ? 0 : block.b, a.key_head(block.h), block.s.first_k + j);
  }

  bool plain() const { return !block.shaped() && !block.hides(); }

  // Products of keys begin .. begin + n, that some query sees, become scores; and the largest of every lane.
  template <int NV>
  void shape(int64_t begin, int64_t n, A* scores, V (&largest)[NV], A* capped = nullptr) {
    if (!plain()) return block.template shape<NV>(scores, begin, n, largest, capped);
    V most[NV];
    for (int v = 0; v < NV; ++v) most[v] = V{} - A(INFINITY);
    for (int64_t x = 0; x < n * NV * W; x += NV * W)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V score = load_vector(scores + x + v * W);
        most[v] = score > most[v] ? score : most[v];
      }
    for (int v = 0; v < NV; ++v) largest[v] = most[v];
  }

  // what to subtract from scores of which `highest` is the largest
  static FASTSEQ_HOST_DEVICE V base_of(V highest) { return highest == V{} - A(INFINITY) ? V{} : highest; }

  // Ends the softmax of lanes with this highest score and this sum of weights, 0 where no key was seen: factor[lane] makes weights of
  // them, and lse is stored, if wanted. `rounded`: the sum of the weights as they were multiplied, by which they add up to one.
  template <int NV>
  void finish(const V (&highest)[NV], const V (&total)[NV]) {
    finish<NV>(highest, total, total);
  }
  template <int NV>
  void finish(const V (&highest)[NV], const V (&total)[NV], const V (&rounded)[NV]) {
    const A factor = block.factor();
    A* lse = a.lse ? static_cast<A*>(a.lse) + (a.cu_q ? 0 : block.b * a.lse_b) + block.h * a.lse_h + block.s.first_q + block.first : nullptr;
    for (int64_t v = 0; v < NV; ++v) {
      const V dead = (V)(total[v] == V{});
      store_vector(factor_ + v * W, rounded[v] == V{} ? V{} : A(1) / rounded[v]);
      if (a.sinks) {
        store_vector(highest_ + v * W, highest[v] * factor), store_vector(total_ + v * W, total[v]);
        for (int64_t lane = v * W; lane < min(block.count, (v + 1) * W); ++lane) join_sink(lane, lse);
      } else if (lse) {
        const V live = total[v] == total[v] ? highest[v] * factor + log_of<A>(total[v]) : total[v];  // a NaN stays one
        const V sum = (typename Lanes<A>::I)dead ? V{} - A(INFINITY) : live;
        if (v * W < block.count) Memory<A, A>::store(lse + v * W, sum, block.count - v * W);
        if constexpr (std::is_same_v<A, float>)
          if (a.lse_rest && v * W < block.count)
            Memory<A, A>::store(static_cast<A*>(a.lse_rest) + (lse - static_cast<A*>(a.lse)) + v * W, rest_of(sum, highest[v], total[v]),
                                block.count - v * W);
      }
    }
  }
  const A* factors() const { return factor_; }

 private:
  // What rounding took from a lse, 0 of one that is no number.
  V rest_of(V lse, V highest, V total) const {
    using D = typename Math<double>::V;
    return in_double<A>([&](D rounded, D most, D sum) {
      const D left = most * double(block.factor()) + log_of<double>(sum) - rounded;
      return left - left == 0 ? left : D{};
    }, lse, highest, total);
  }

  void join_sink(int64_t lane, A* lse) {
    A sink = 0;
    with_element(a.sinks_type, [&]<class T>() { sink = A(value_of(static_cast<const T*>(a.sinks) + block.h)); });
    const bool dead = total_[lane] == 0;
    const A highest = dead ? sink : highest_[lane] > sink ? highest_[lane] : sink;
    const bool nothing = highest == -A(INFINITY);
    const A own = dead || nothing ? A(0) : std::exp(highest_[lane] - highest);
    const A sum = total_[lane] * own + (nothing ? A(0) : std::exp(sink - highest));
    factor_[lane] = dead || nothing ? A(0) : own / sum;
    if (lse) lse[lane] = nothing ? -A(INFINITY) : highest + std::log(sum);
  }

  A *highest_, *total_, *factor_;
};

// The products of a block of queries, by multiply-adds.
template <class S>
class MultiplyAdd : public Softmax<S> {
 public:
  using Softmax<S>::a, Softmax<S>::block, Softmax<S>::padded, Softmax<S>::row_of, Softmax<S>::W;
  using typename Softmax<S>::A, typename Softmax<S>::V;
  static constexpr int64_t kKeys = kChunk;

  MultiplyAdd(const Attention& given, Arena& arena)
      : Softmax<S>(given, arena),
        queries_(arena.take<A>(padded(a.features) * kMostLanes<A>)),
        keys_(arena.take<A>(kChunk * copied_row<A>(a.features))),
        values_(arena.take<A>(kChunk * copied_row<A>(a.value_features))),
        kept_keys_(arena, keeps(a.k, a.features), a.keys, a.features),
        kept_values_(arena, keeps(a.v, a.value_features), a.keys, a.value_features),
        alpha_(arena.take<A>(kMostLanes<A>)) {}

  void load() {
    block.transposed(a.q, queries_);
    kept_keys_.start(row_of(a.k, 0), a.k.t, block.s.keys);
    if (a.v.given()) kept_values_.start(row_of(a.v, 0), a.v.t, block.s.keys);
  }

  template <Read kRead>
  Operand<A> keys(int64_t begin, int64_t n) {
    if (kept_keys_.keeps()) return kept_keys_.rows(begin, n);
    return operand<kRead, S>(row_of(a.k, begin), a.k.t, n, a.features, keys_);
  }
  template <Read kRead>
  Operand<A> values(int64_t begin, int64_t n) {
    if (kept_values_.keeps()) return kept_values_.rows(begin, n);
    return operand<kRead, S>(row_of(a.v, begin), a.v.t, n, a.value_features, values_);
  }

  // the scores of keys begin .. begin + n, that some query sees; and the largest of every lane
  template <int NV>
  void scores(int64_t begin, int64_t n, A* to, V (&largest)[NV], A* capped = nullptr) {
    constexpr int64_t lanes = NV * W;
    const Operand<A> k = keys<Read::kRows>(begin, n);
    V most[NV];
    for (int v = 0; v < NV; ++v) most[v] = V{} - A(INFINITY);
    multiply_rows<false, NV>(k.data, k.row, n, queries_, lanes, a.features, [&](int64_t j, int v, V sum) __attribute__((always_inline)) {
      store_vector(to + j * lanes + v * W, sum);
      most[v] = sum > most[v] ? sum : most[v];
    });
    for (int v = 0; v < NV; ++v) largest[v] = most[v];
    if (!this->plain()) block.template shape<NV>(to, begin, n, largest, capped);
  }

  // What the keys begin .. begin + n have of these weights, [key][lane], joins sums[lane][feature], padded to whole vectors, of which
  // alpha[lane] remains. The first has none to join; the last gives the results, if they are whole vectors, by factors of the lanes.
  template <int NV, bool kFirst, bool kLast = false>
  void weigh(int64_t begin, int64_t n, const A* weights, const V (&alpha)[NV], A* sums) {
    const Operand<A> rows = values<Read::kVectors>(begin, n);
    constexpr int64_t kAtOnce = FASTSEQ_VECTOR_BYTES == 32 ? 2 : kMostVectors;  // rows at once are then a power of two, as the lanes are
    const int64_t vectors = blocks_of(a.value_features, W);
    for (int v = 0; v < NV; ++v) store_vector(alpha_ + v * W, alpha[v]);
    const A* const factors = this->factors();
    S* const to = block.template row_of<S>(a.out);
    for (int64_t f = 0; f < vectors; f += kAtOnce)
      with_vectors(min(vectors - f, kAtOnce), [&]<int FV>() {
        const auto put = [&](int64_t lane, int v, V sum) __attribute__((always_inline)) {
          A* at = sums + (lane * vectors + f + v) * W;
          if constexpr (!kFirst) sum = load_vector(at) * alpha_[lane] + sum;
          if constexpr (kLast)
            Memory<S, A>::store(to + lane * a.out.t + (f + v) * W, sum * factors[lane], W);
          else
            store_vector(at, sum);
        };
        multiply_rows<true, FV>(weights, NV * W, block.count, rows.data + f * W, rows.row, n, put);
      });
  }
  // such sums as results
  void put_out(const A* sums, const A* factors) const {
    const int64_t vectors = blocks_of(a.value_features, W);
    S* to = block.template row_of<S>(a.out);
    for (int64_t lane = 0; lane < block.count; ++lane, to += a.out.t, sums += vectors * W)
      for (int64_t v = 0; v < vectors; ++v)
        Memory<S, A>::store(to + v * W, load_vector(sums + v * W) * factors[lane], a.value_features - v * W);
  }

 private:
  // rows far apart, or that have to be widened, for several blocks of queries
  bool keeps(const ConstRows& rows, int64_t features) const {
    constexpr int64_t kBlocks = 4;
    const bool far = rows.t >= kNear<A> && rows.t > features;
    return rows.given() && a.queries >= kBlocks * kMostLanes<A> && (far || !std::is_same_v<S, A>);
  }

  A *queries_, *keys_, *values_;
  Kept<S> kept_keys_, kept_values_;
  A* alpha_;
};

// out and lse. A task is a block of queries of a head.
template <class S>
class ForwardKernel {
 public:
  using A = Wide<S>;
  using V = typename Math<A>::V;
  using M = Exponential<S>;
  static constexpr int64_t W = Math<A>::kWidth;

  ForwardKernel(const Attention& given, Arena arena)
      : a(given),
        rows_(given, arena),
        scores_(arena.take<A>(kChunk * kMostLanes<A>)),
        sums_(arena.take<A>(rows_.padded(a.value_features) * kMostLanes<A>)),
        used(arena.used()) {}

  bool run(int64_t b, int64_t h, int64_t first, int64_t count) {
    rows_.block.place(b, h, a.sequence(b), first, count);
    with_vectors(rows_.block.vectors, [&]<int NV>() { run<NV>(); });
    return true;
  }

 private:
  template <int NV>
  void run() {
    constexpr int64_t lanes = NV * W;
    Block<S>& block = rows_.block;
    rows_.load();
    V highest[NV], total[NV];
    for (int v = 0; v < NV; ++v) highest[v] = V{} - A(INFINITY), total[v] = V{};
    const Unit<A> unit(block.factor());
    bool started = false;
    int64_t begin, end;
    block.keys(begin, end);
    for (int64_t j = begin; j < end; j += kChunk) {
      const int64_t n = min(kChunk, end - j);
      if (block.look(j, n) == Seen::kNone) continue;
      V largest[NV], alpha[NV], base[NV], sums[NV];
      rows_.template scores<NV>(j, n, scores_, largest);
      for (int v = 0; v < NV; ++v) {
        const V next = largest[v] > highest[v] ? largest[v] : highest[v];
        base[v] = rows_.base_of(next);
        alpha[v] = power_of<M, A>(highest[v] - base[v], unit), highest[v] = next;
      }
      sum_in_runs<NV, A>(n, sums, [&](int64_t at, int v) __attribute__((always_inline)) {
        const V weight = power_of<M, A>(load_vector(scores_ + at) - base[v], unit);
        store_vector(scores_ + at, weight);
        return weight;
      });
      for (int v = 0; v < NV; ++v) total[v] = total[v] * alpha[v] + sums[v];
      if (a.dropout > 0)
        block.template drop<NV>(j, n, [&](int64_t at, V keep) { store_vector(scores_ + at, load_vector(scores_ + at) * keep); });
      if (j + kChunk >= end && a.value_features % W == 0) {
        rows_.template finish<NV>(highest, total);
        if (started)
          return rows_.template weigh<NV, false, true>(j, n, scores_, alpha, sums_);
        else
          return rows_.template weigh<NV, true, true>(j, n, scores_, alpha, sums_);
      }
      if (started)
        rows_.template weigh<NV, false>(j, n, scores_, alpha, sums_);
      else
        rows_.template weigh<NV, true>(j, n, scores_, alpha, sums_);
      started = true;
    }
    if (!started) __builtin_memset(sums_, 0, rows_.padded(a.value_features) * lanes * sizeof(A));
    rows_.template finish<NV>(highest, total);
    rows_.put_out(sums_, rows_.factors());
  }

  const Attention& a;
  MultiplyAdd<S> rows_;
  A *scores_, *sums_;

 public:
  const int64_t used;
};

// out, lse and weights. A task is a block of queries of a head, or, for the average of the heads, of all heads.
template <class S, template <class> class Product>
class WeightsKernel {
 public:
  using A = Wide<S>;
  using V = typename Math<A>::V;
  using M = Exponential<S>;
  static constexpr int64_t W = Math<A>::kWidth, kKeys = Product<S>::kKeys;

  WeightsKernel(const AttentionWeights& given, Arena arena)
      : w(given),
        a(given.attention),
        rows_(a, arena),
        scores_(arena.take<A>(blocks_of(a.keys, kMostKeys) * kMostKeys * kMostLanes<A>)),
        mean_(w.average ? arena.take<A>(blocks_of(a.keys, W) * W * kMostLanes<A>) : nullptr),
        sums_(arena.take<A>(rows_.padded(a.value_features) * kMostLanes<A>)),
        used(arena.used()) {}

  // h is not read if averaged
  void run(int64_t b, int64_t h, int64_t first, int64_t count) {
    const Attention::Sequence s = a.sequence(b);
    with_vectors(blocks_of(count, W), [&]<int NV>() {
      constexpr int64_t lanes = NV * W;
      if (!w.average) {
        rows_.block.place(b, h, s, first, count);
        run<NV>();
        return store<NV>(scores_, A(1));
      }
      __builtin_memset(mean_, 0, a.keys * lanes * sizeof(A));
      for (int64_t head = 0; head < a.heads; ++head) {
        rows_.block.place(b, head, s, first, count);
        run<NV>();
        for (int64_t x = 0; x < a.keys * lanes; x += W) store_vector(mean_ + x, load_vector(mean_ + x) + load_vector(scores_ + x));
      }
      store<NV>(mean_, A(1) / A(a.heads));
    });
  }

 private:
  // the weights of all keys, after dropout, in scores_
  template <int NV>
  void run() {
    constexpr int64_t lanes = NV * W;
    Block<S>& block = rows_.block;
    rows_.load();
    V highest[NV], total[NV], base[NV];
    for (int v = 0; v < NV; ++v) highest[v] = V{} - A(INFINITY), total[v] = V{};
    const Unit<A> unit(block.factor());
    int64_t begin, end;
    block.keys(begin, end);
    __builtin_memset(scores_, 0, begin * lanes * sizeof(A));
    if (end < a.keys) __builtin_memset(scores_ + end * lanes, 0, (a.keys - max(end, 0)) * lanes * sizeof(A));
    for (int64_t j = begin; j < end; j += kKeys) {
      const int64_t n = min(kKeys, end - j);
      V largest[NV];
      if (block.look(j, n) == Seen::kNone) {
        for (int64_t x = 0; x < n * lanes; x += W) store_vector(scores_ + j * lanes + x, V{} - A(INFINITY));
        continue;
      }
      rows_.template scores<NV>(j, n, scores_ + j * lanes, largest);
      for (int v = 0; v < NV; ++v) highest[v] = largest[v] > highest[v] ? largest[v] : highest[v];
    }
    for (int v = 0; v < NV; ++v) base[v] = rows_.base_of(highest[v]);
    for (int64_t j = begin; j < end; j += kChunk) {
      V sums[NV];
      sum_in_runs<NV, A>(min(kChunk, end - j), sums, [&](int64_t at, int v) __attribute__((always_inline)) {
        const V weight = power_of<M, A>(load_vector(scores_ + j * lanes + at) - base[v], unit);
        store_vector(scores_ + j * lanes + at, weight);
        return weight;
      });
      for (int v = 0; v < NV; ++v) total[v] += sums[v];
    }
    rows_.template finish<NV>(highest, total);
    V scale[NV];
    for (int v = 0; v < NV; ++v) scale[v] = load_vector(rows_.factors() + v * W);
    for (int64_t j = begin; j < end; ++j)
      for (int v = 0; v < NV; ++v) store_vector(scores_ + j * lanes + v * W, load_vector(scores_ + j * lanes + v * W) * scale[v]);
    if (a.dropout > 0 && begin < end)
      block.template drop<NV>(begin, end - begin, [&](int64_t at, V keep) {
        A* weight = scores_ + begin * lanes + at;
        store_vector(weight, load_vector(weight) * keep);
      });
    if (a.out.given()) weigh<NV>(begin, end);
  }

  template <int NV>
  void weigh(int64_t begin, int64_t end) {
    constexpr int64_t lanes = NV * W;
    __builtin_memset(sums_, 0, rows_.padded(a.value_features) * lanes * sizeof(A));
    V one[NV];
    for (int v = 0; v < NV; ++v) one[v] = V{} + A(1);
    for (int64_t j = begin; j < end; j += kKeys)
      rows_.template weigh<NV, false>(j, min(kKeys, end - j), scores_ + j * lanes, one, sums_);
    for (int64_t lane = 0; lane < lanes; ++lane) ones_[lane] = 1;
    rows_.put_out(sums_, ones_);
  }

  // rows [key][lane] to the weights of the queries
  template <int NV>
  void store(const A* from, A factor) {
    constexpr int64_t lanes = NV * W;
    const Block<S>& block = rows_.block;
    S* to = static_cast<S*>(w.weights) + (w.average ? block.b : block.b * a.heads + block.h) * a.queries * a.keys + block.first * a.keys;
    for (int64_t v = 0; v < NV; ++v)
      for (int64_t j = 0; j < a.keys; j += W) {
        const A* at = from + j * lanes + v * W;
        S* row = to + v * W * a.keys + j;
        if ((v + 1) * W <= block.count && j + W <= a.keys) {
          through_square<V>([&](int r) __attribute__((always_inline)) { return load_vector(at + r * lanes) * factor; },
                            [&](int r, V x) __attribute__((always_inline)) { Memory<S, A>::store(row + r * a.keys, x, W); });
        } else {
          through_square<V>([&](int r) { return j + r < a.keys ? load_vector(at + r * lanes) * factor : V{}; },
                            [&](int r, V x) {
                              if (v * W + r < block.count) Memory<S, A>::store(row + r * a.keys, x, a.keys - j);
                            });
        }
      }
  }

  const AttentionWeights& w;
  const Attention& a;
  Product<S> rows_;
  A *scores_, *mean_, *sums_;
  alignas(64) A ones_[kMostLanes<A>];

 public:
  const int64_t used;
};

// What the backward pass of a block of queries has however it multiplies. Gradients of keys and values are summed over the blocks of a key
// head in `sums`, [Tk][E + Ev], each padded to whole vectors.
template <class S, template <class> class Product>
class BackwardRows {
 public:
  using A = Wide<S>;
  using V = typename Math<A>::V;
  using M = Exponential<S>;
  static constexpr int64_t W = Math<A>::kWidth;

  static int64_t sums_width(const Attention& a) { return Softmax<S>::padded(a.features) + Softmax<S>::padded(a.value_features); }

 protected:
  BackwardRows(const AttentionBackward& given, Arena& arena)
      : g(given),
        a(given.attention),
        E(a.features),
        Ev(a.value_features),
        padded_(Softmax<S>::padded(E)),
        padded_values_(Softmax<S>::padded(Ev)),
        rows_(a, arena),
        weights_(arena.take<A>(kChunk * kMostLanes<A>)),
        gradients_(arena.take<A>(kChunk * kMostLanes<A>)),
        kept_(a.dropout > 0 ? arena.take<A>(kChunk * kMostLanes<A>) : nullptr),
        capped_(a.softcap != 0 ? arena.take<A>(kChunk * kMostLanes<A>) : nullptr),
        dout_(arena.take<A>(padded_values_ * kMostLanes<A>)),
        out_(arena.take<A>(padded_values_ * kMostLanes<A>)),
        dq_(arena.take<A>(padded_ * kMostLanes<A>)),
        drelative_q_(g.drelative_q.given() ? arena.take<A>(padded_ * kMostLanes<A>) : nullptr),
        lse_(arena.take<A>(kMostLanes<A>)),
        delta_(arena.take<A>(kMostLanes<A>)) {}

  // of the queries of a block
  template <int NV>
  struct Lse {
    V values[NV], rests[NV];  // and what rounding took from them
    Weigher<M, A, NV> weights;
    bool far = false;  // whether one is too large for these
  };

  // whether a score's gradient is its weight times that of the weight, less delta
  bool direct() const { return !alone_ && !kept_ && !g.dweights.given() && g.dout.given(); }
  // and nothing but the products wants it
  bool plain() const {
    return direct() && !capped_ && !g.dbias[0] && !g.drelative_bias[0] && !g.drelative_q.given() && !g.drelative_k[0];
  }

  const S* of_queries(const ConstRows& rows) const {
    const Block<S>& block = rows_.block;
    return static_cast<const S*>(rows.data) + rows.offset(a.cu_q ? 0 : block.b, block.h, block.s.first_q + block.first);
  }

  // dout with its features first; lse and delta, such that lanes beyond the queries, and queries without keys, have weights of zero. delta
  // is summed as the products are: a query that sees one key alone has no gradient, exactly.
  template <int NV>
  void prepare(Lse<NV>& lse, V (&delta)[NV]) {
    constexpr int64_t lanes = NV * W;
    prepare<NV>(lse, delta, [&] {
      const Block<S>& block = rows_.block;
      block.transposed(g.dout, dout_, Ev), block.transposed(g.out, out_, Ev);
      for (int64_t x = 0; x < Ev * lanes; x += lanes)
        for (int v = 0; v < NV; ++v) delta[v] += load_vector(out_ + x + v * W) * load_vector(dout_ + x + v * W);
    });
  }
  // add() adds the products of dout and out to delta
  template <int NV, class Add>
  void prepare(Lse<NV>& lse, V (&delta)[NV], const Add& add) {
    constexpr int64_t lanes = NV * W;
    const Block<S>& block = rows_.block;
    const int64_t place = place_of_lse();
    for (int v = 0; v < NV; ++v) delta[v] = V{};
    if (g.dout.given()) add();
    for (int64_t lane = 0; lane < lanes; ++lane) {
      lse_[lane] = INFINITY, delta_[lane] = 0;
      if (lane >= block.count) continue;
      const A given = static_cast<const A*>(g.lse)[place + lane];
      if (given != -A(INFINITY)) lse_[lane] = given;
      lse.far |= !Weigher<M, A, NV>::takes(lse_[lane]);
      if (g.dlse) delta_[lane] = static_cast<const A*>(g.dlse)[place + lane];
    }
    for (int v = 0; v < NV; ++v) {
      lse.values[v] = load_vector(lse_ + v * W), lse.rests[v] = V{};
      if (g.lse_rest) lse.rests[v] = Memory<A, A>::load(static_cast<const A*>(g.lse_rest) + place + v * W, block.count - v * W);
      lse.weights.put(v, lse.values[v], lse.rests[v]);
      delta[v] -= load_vector(delta_ + v * W);
    }
    put_delta<NV>(delta);
    for (A* sums : {g.dq.given() ? dq_ : nullptr, drelative_q_})
      if (sums) __builtin_memset(sums, 0, padded_ * NV * W * sizeof(A));
  }

  // What the gradients of the weights themselves add to delta, and an lse by which the weights that are formed here add up to one: the one that
  // is given may be that of scores rounded otherwise. For blocks whose keys are several chunks; one alone finds out both by itself.
  template <int NV>
  void look_at_weights(int64_t begin, int64_t end, Lse<NV>& lse, V (&delta)[NV]) {
    constexpr int64_t lanes = NV * W;
    Block<S>& block = rows_.block;
    V all[NV], sum[NV];
    for (int v = 0; v < NV; ++v) all[v] = share_of_sink(lse.values[v]), sum[v] = V{};
    for (int64_t j = begin; j < end; j += kChunk) {
      const int64_t n = min(kChunk, end - j);
      if (block.look(j, n) == Seen::kNone) continue;
      V largest[NV], of_chunk[NV], of_gradients[NV];
      rows_.template scores<NV>(j, n, weights_, largest);
      weigh<NV>(n, lse);
      __builtin_memset(gradients_, 0, n * lanes * sizeof(A));
      add_gradients_of_weights<NV>(j, n);
      if (kept_)
        block.template drop<NV>(j, n, [&](int64_t at, V keep) { store_vector(gradients_ + at, load_vector(gradients_ + at) * keep); });
      for (int v = 0; v < NV; ++v) of_chunk[v] = of_gradients[v] = V{};
      for (int64_t x = 0; x < n * lanes; x += lanes)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const V weight = load_vector(weights_ + x + v * W);
          of_chunk[v] += weight, of_gradients[v] += weight * load_vector(gradients_ + x + v * W);
        }
      for (int v = 0; v < NV; ++v) all[v] += of_chunk[v], sum[v] += of_gradients[v];
    }
    for (int v = 0; v < NV; ++v) {
      const auto some = all[v] > A(0);  // not of queries without keys
      const V total = some ? all[v] : V{} + A(1);
      delta[v] += sum[v] / total, lse.rests[v] += log_of<A>(total), lse.weights.divide(v, total);
    }
    put_delta<NV>(delta);
  }

  template <int NV>
  void add_gradients_of_weights(int64_t begin, int64_t n) {
    V largest[NV];
    rows_.block.template add_pairs<NV>(g.dweights, a.type, A(g.dweights_factor), gradients_, begin, n, largest);
  }

  // of the weights of a query
  V share_of_sink(V lse) const {
    V share{};
    if (!a.sinks) return share;
    A sink = -INFINITY;
    with_element(a.sinks_type, [&]<class T>() { sink = A(value_of(static_cast<const T*>(a.sinks) + rows_.block.h)); });
    for (int64_t i = 0; i < W; ++i) share[i] = std::exp(sink - lse[i]);
    return share;
  }

  template <int NV>
  void put_delta(const V (&delta)[NV]) const {
    if (!g.delta) return;
    const int64_t count = rows_.block.count;
    A* to = static_cast<A*>(g.delta) + place_of_lse();
    for (int64_t v = 0; v * W < count; ++v) Memory<A, A>::store(to + v * W, delta[v], count - v * W);
  }
  int64_t place_of_lse() const {
    const Block<S>& block = rows_.block;
    return (a.cu_q ? 0 : block.b * a.lse_b) + block.h * a.lse_h + block.s.first_q + block.first;
  }

  // use(of): of(score, v) is its weight
  template <int NV, class Use>
  FASTSEQ_HOST_DEVICE void with_weights(const Lse<NV>& lse, const Use& use) const {
    const A factor = rows_.block.factor();
    const Unit<A> one(1);
    if (lse.far) [[unlikely]]
      use([&](V score, int v) __attribute__((always_inline)) { return power_of<M, A>(score * factor - lse.values[v] - lse.rests[v], one); });
    else
      use([&](V score, int v) __attribute__((always_inline)) { return lse.weights(score, v); });
  }
  // scores to weights
  template <int NV>
  void weigh(int64_t n, const Lse<NV>& lse) {
    with_weights<NV>(lse, [&](const auto& weight) __attribute__((always_inline)) {
      for (int64_t x = 0; x < n * NV * W; x += NV * W)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store_vector(weights_ + x + v * W, weight(load_vector(weights_ + x + v * W), v));
    });
  }

  // Where they are not `direct`: the gradients of the weights, in `gradients_`, become those of the scores. The weights are what the values
  // are multiplied with afterwards.
  template <int NV>
  void form_gradients(int64_t begin, int64_t n, const V (&delta)[NV]) {
    constexpr int64_t lanes = NV * W;
    Block<S>& block = rows_.block;
    if (g.dweights.given()) add_gradients_of_weights<NV>(begin, n);
    if (kept_)
      block.template drop<NV>(begin, n, [&](int64_t at, V keep) {
        store_vector(kept_ + at, keep), store_vector(gradients_ + at, load_vector(gradients_ + at) * keep);
      });
    V subtracted[NV];
    for (int v = 0; v < NV; ++v) subtracted[v] = delta[v];
    if (alone_) of_these_keys_alone<NV>(n, subtracted);
    for (int64_t x = 0; x < n * lanes; x += lanes)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = x + v * W;
        const V weight = load_vector(weights_ + at);
        if (kept_) store_vector(weights_ + at, weight * load_vector(kept_ + at));
        store_vector(gradients_ + at, weight * (load_vector(gradients_ + at) - subtracted[v]));
      }
  }

  // The gradients of the scores become those of the products (but for the scale); on the way the biases get theirs.
  template <int NV>
  void through_scores(int64_t begin, int64_t n) {
    constexpr int64_t lanes = NV * W;
    Block<S>& block = rows_.block;
    if (g.dbias[0]) add_bias_gradient<NV>(begin, n);
    if (g.drelative_bias[0])
      block.template sum_diagonals<NV>(gradients_, begin, n, a.relative_bias_zero, a.relative_bias_length, [&](int64_t entry) {
        return static_cast<A*>(g.drelative_bias[worker_]) + block.h * a.relative_bias_length + entry;
      });
    if (capped_)
      for (int64_t x = 0; x < n * lanes; x += W) {
        const V t = load_vector(capped_ + x);
        store_vector(gradients_ + x, load_vector(gradients_ + x) * (A(1) - t * t));
      }
    if (drelative_q_ || g.drelative_k[0]) {
      A* dk = static_cast<A*>(g.drelative_k[worker_]);
      block.template add_relative_gradients<NV>(gradients_, begin, n, drelative_q_, dk ? dk + block.h * a.relative_k_length * E : nullptr);
    }
  }

  // The textbook's formula, for a chunk that has all the keys of a block: weights that add up to one, however lse was rounded, and delta as the
  // sum of the weights times their gradients, which no rounded output is part of. But not for lanes whose weights are far from one together:
  // their lse and their output are those of more keys than these. (Where weights were returned, the lse is that of these keys.)
  // Where one key has nearly all the weight, little is left of its gradient less delta. So delta is subtracted twice, as it was given, and then
  // what it lacks, a sum of differences as small as the result; and what the sum of the weights lacks is subtracted from them.
  template <int NV>
  void of_these_keys_alone(int64_t n, V (&delta)[NV]) {
    V all[NV], lacks[NV], excess[NV], reference[NV], share[NV];
    sum_in_runs<NV, A>(n, all, [&](int64_t at, int) __attribute__((always_inline)) { return load_vector(weights_ + at); });
    for (int v = 0; v < NV; ++v) {
      const V lse = load_vector(lse_ + v * W);
      share[v] = share_of_sink(lse);
      const V off = (all[v] - A(1)) + share[v], size = lse < 0 ? -lse : lse, sum = off + A(1);
      // what lse may be off by in the arithmetic's type; of 16 bits, below what the output is
      constexpr A kEpsilon = sizeof(A) == 8 ? 0x1p-52 : 0x1p-23, kShort = std::is_same_v<S, bfloat16> ? 0x1p-8 : 0x1p-11;
      const V most = sizeof(S) == 2 ? V{} + kShort : (size + A(1)) * (16 * kEpsilon);
      const auto some = sum > A(0);  // not of queries without keys
      const auto near = g.dweights.given() ? some : ((off < 0 ? -off : off) <= most) & (sum > A(0.5));
      excess[v] = near ? off / sum : V{};
      share[v] = near ? share[v] - share[v] * excess[v] : V{} + A(INFINITY);  // infinite: not near
      reference[v] = delta[v] - delta[v] == V{} ? delta[v] : V{};  // of 16 bits it may be infinite
    }
    sum_in_runs<NV, A>(n, lacks, [&](int64_t at, int v) __attribute__((always_inline)) {
      const V weight = load_vector(weights_ + at), normalized = weight - weight * excess[v];
      const V difference = load_vector(gradients_ + at) - reference[v];
      store_vector(weights_ + at, normalized), store_vector(gradients_ + at, difference);
      return normalized * difference;
    });
    V found[NV];
    for (int v = 0; v < NV; ++v) {
      const V rest = lacks[v] - share[v] * reference[v] - load_vector(delta_ + v * W);  // a sink has no gradient
      const auto far = share[v] == V{} + A(INFINITY);
      found[v] = far ? delta[v] : reference[v] + rest;
      delta[v] = far ? delta[v] - reference[v] : rest;
    }
    put_delta<NV>(found);
  }

  template <int NV>
  void store_queries() {
    for (int64_t lane = 0; lane < NV * W; ++lane) lse_[lane] = A(a.scale);
    if (g.dq.given()) rows_.block.store(dq_, E, lse_, g.dq);
    if (drelative_q_) rows_.block.store(drelative_q_, E, lse_, g.drelative_q);
  }

  template <int NV>
  void add_bias_gradient(int64_t begin, int64_t n) const {
    const Block<S>& block = rows_.block;
    const int64_t place = block.b * g.dbias_b + block.h * g.dbias_h + block.first * g.dbias_i + begin * g.dbias_j;
    if (g.dbias_once) return with_element(a.bias_type, [&]<class T>() { set_bias_gradient<NV>(static_cast<T*>(g.dbias[worker_]) + place, n); });
    A* base = static_cast<A*>(g.dbias[worker_]) + place;
    through_squares<NV>(n, [&](int64_t i, int64_t j, V row) {
      A* at = base + i * g.dbias_i + j * g.dbias_j;
      if (g.dbias_j)
        Memory<A, A>::store(at, Memory<A, A>::load(at, n - j) + row, n - j);
      else
        for (int64_t c = 0; c < W; ++c) *at += row[c];
    });
  }
  template <int NV, class T>
  void set_bias_gradient(T* base, int64_t n) const {
    if constexpr ((sizeof(T) == 8) == (sizeof(A) == 8))
      through_squares<NV>(n, [&](int64_t i, int64_t j, V row) __attribute__((always_inline)) { Memory<T, A>::store(base + i * g.dbias_i + j, row, n - j); });
  }

  // put(query, key, vector) gets the gradients of n keys' scores, a vector of keys at a time, zeros behind the last
  template <int NV, class Put>
  void through_squares(int64_t n, const Put& put) const {
    constexpr int64_t lanes = NV * W;
    for (int64_t v = 0; v < NV; ++v) {
      const int64_t valid = min(W, rows_.block.count - v * W);
      for (int64_t j = 0; j < n; j += W) {
        const A* at = gradients_ + j * lanes + v * W;
        if (valid == W && j + W <= n) {
          through_square<V>([&](int r) __attribute__((always_inline)) { return load_vector(at + r * lanes); },
                            [&](int r, V row) __attribute__((always_inline)) { put(v * W + r, j, row); });
          continue;
        }
        through_square<V>([&](int r) { return j + r < n ? load_vector(at + r * lanes) : V{}; },
                          [&](int r, V row) {
                            if (r < valid) put(v * W + r, j, row);
                          });
      }
    }
  }

  const AttentionBackward& g;
  const Attention& a;
  const int64_t E, Ev, padded_, padded_values_;
  Product<S> rows_;
  bool alone_ = false;  // whether a chunk has all the keys of a block of queries
  A *weights_, *gradients_, *kept_, *capped_, *dout_, *out_, *dq_, *drelative_q_, *lse_, *delta_;
  int64_t worker_ = 0;
};

// Queries of a block at most. Fewer where a causal mask hides much of a short sequence: blocks follow its edge more closely.
template <class A>
int64_t lanes_of_block(const Attention& a) {
  constexpr int64_t lanes = kMostLanes<A>;
  return a.right >= 0 && a.queries <= 4 * lanes ? lanes / 2 : lanes;
}

// The gradients that a part of the queries of a key head's query heads gives, by multiply-adds.
template <class S>
class BackwardKernel : public BackwardRows<S, MultiplyAdd> {
  using Base = BackwardRows<S, MultiplyAdd>;
  using typename Base::A, typename Base::V;
  using Base::W, Base::g, Base::a, Base::E, Base::Ev, Base::padded_, Base::padded_values_, Base::rows_, Base::weights_, Base::gradients_,
      Base::dout_, Base::dq_;

 public:
  BackwardKernel(const AttentionBackward& given, Arena arena)
      : Base(given, arena),
        query_rows_(arena.take<A>(padded_ * kMostLanes<A>)),
        dout_rows_(arena.take<A>(padded_values_ * kMostLanes<A>)),
        used(arena.used()) {}

  // part p of `parts` of the blocks of queries
  void run(int64_t b, int64_t key_head, int64_t p, int64_t parts, A* sums, int64_t worker) {
    sums_ = sums, this->worker_ = worker;
    const Attention::Sequence s = a.sequence(b);
    __builtin_memset(sums, 0, s.keys * Base::sums_width(a) * sizeof(A));
    const int64_t group = a.heads / a.key_heads, lanes = lanes_of_block<A>(a), blocks = blocks_of(s.queries, lanes);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
      for (int64_t block = blocks * p / parts; block < blocks * (p + 1) / parts; ++block) {
        const int64_t first = block * lanes;
        rows_.block.place(b, h, s, first, min(lanes, s.queries - first));
        with_vectors(rows_.block.vectors, [&]<int NV>() { run<NV>(); });
      }
  }

 private:
  template <int NV>
  void run() {
    constexpr int64_t lanes = NV * W;
    Block<S>& block = rows_.block;
    const int64_t count = block.count;
    rows_.load();
    const Operand<A> queries = whole(a.q, E, padded_, query_rows_), douts = whole(g.dout, Ev, padded_values_, dout_rows_);
    typename Base::template Lse<NV> lse{{}, {}, Weigher<typename Base::M, A, NV>(block.factor())};
    V delta[NV];
    this->template prepare<NV>(lse, delta);
    int64_t begin, end;
    block.keys(begin, end);
    this->alone_ = end - begin <= kChunk;
    if (g.dweights.given() && !this->alone_) this->template look_at_weights<NV>(begin, end, lse, delta);
    for (int64_t j = begin; j < end; j += kChunk) {
      const int64_t n = min(kChunk, end - j);
      if (block.look(j, n) == Seen::kNone) continue;
      V largest[NV];
      rows_.template scores<NV>(j, n, weights_, largest, this->capped_);
      this->template weigh<NV>(n, lse);
      const bool direct = this->direct();
      if (g.dout.given()) {
        const Operand<A> values = rows_.template values<Read::kRows>(j, n);
        multiply_rows<false, NV>(values.data, values.row, n, dout_, lanes, Ev, [&](int64_t r, int v, V dw) __attribute__((always_inline)) {
          const int64_t at = r * lanes + v * W;
          store_vector(gradients_ + at, direct ? load_vector(weights_ + at) * (dw - delta[v]) : dw);
        });
      } else {
        __builtin_memset(gradients_, 0, n * lanes * sizeof(A));
      }
      if (!direct) this->template form_gradients<NV>(j, n, delta);
      this->template through_scores<NV>(j, n);
      A* sums = sums_ + j * (padded_ + padded_values_);
      if (g.dv.given()) add_products(weights_, lanes, n, douts, Ev, count, sums + padded_);
      if (g.dk.given()) add_products(gradients_, lanes, n, queries, E, count, sums);
      if (g.dq.given()) {
        const Operand<A> keys = rows_.template keys<Read::kColumns>(j, n);
        multiply_rows<true, NV>(keys.data, keys.row, E, gradients_, lanes, n, [&](int64_t e, int v, V sum) __attribute__((always_inline)) {
          A* at = dq_ + e * lanes + v * W;
          store_vector(at, load_vector(at) + sum);
        });
      }
    }
    this->template store_queries<NV>();
  }

  // rows of queries, [lane][features] with whole vectors
  Operand<A> whole(const ConstRows& rows, int64_t features, int64_t padded, A* copy) const {
    const S* from = this->of_queries(rows);
    if constexpr (std::is_same_v<S, A>)
      if (features == padded) return {from, rows.t};
    for (int64_t i = 0; i < rows_.block.count; ++i)
      for (int64_t e = 0; e < features; e += W) store_vector(copy + i * padded + e, Memory<S, A>::load(from + i * rows.t + e, features - e));
    return {copy, padded};
  }

  // to[key][features] += sum over lanes of what[key][lane] times rows[lane]
  void add_products(const A* what, int64_t lanes, int64_t n, const Operand<A>& rows, int64_t features, int64_t count, A* to) const {
    const int64_t vectors = blocks_of(features, W), stride = padded_ + padded_values_;
    for (int64_t f = 0; f < vectors; f += kMostVectors)
      with_vectors(min(vectors - f, kMostVectors), [&]<int NV>() {
        multiply_rows<false, NV>(what, lanes, n, rows.data + f * W, rows.row, count, [&](int64_t r, int v, V sum) __attribute__((always_inline)) {
          A* at = to + r * stride + (f + v) * W;
          store_vector(at, load_vector(at) + sum);
        });
      });
  }

  A *query_rows_, *dout_rows_;
  A* sums_ = nullptr;

 public:
  const int64_t used;
};

// The sums of all parts as the gradients of the keys and values of a head.
template <class S, class A = Wide<S>>
void store_sums(const AttentionBackward& g, int64_t b, int64_t key_head, const A* sums, int64_t parts, int64_t stride) {
  using V = typename Math<A>::V;
  constexpr int64_t W = Math<A>::kWidth;
  const Attention& a = g.attention;
  const Attention::Sequence s = a.sequence(b);
  const int64_t width = Softmax<S>::padded(a.features) + Softmax<S>::padded(a.value_features);
  const auto put = [&](const MutableRows& rows, int64_t features, int64_t from, A factor) {
    if (!rows.given()) return;
    S* to = static_cast<S*>(rows.data) + rows.offset(a.cu_q ? 0 : b, key_head, s.first_k);
    for (int64_t j = 0; j < (a.cu_q ? s.keys : a.keys); ++j)
      for (int64_t e = 0; e < features; e += W) {
        V sum{};
        if (j < s.keys)
          for (int64_t p = 0; p < parts; ++p) sum += load_vector(sums + p * stride + j * width + from + e);
        Memory<S, A>::store(to + j * rows.t + e, sum * factor, features - e);
      }
  };
  put(g.dk, a.features, 0, A(a.scale));
  put(g.dv, a.value_features, Softmax<S>::padded(a.features), A(1));
}

#if defined(__AVX512BF16__)
#include "attention_tiles.inl"

// bfloat16 alone, but for what AMX has kernels of float for as well
template <class F>
void with_kernels(Type, F&& body) {
  body.template operator()<bfloat16, TileProduct, TileBackward>();
}
template <class F>
void with_forward([[maybe_unused]] Type type, F&& body) {
#if defined(FASTSEQ_TILES)
  if (type == Type::kFloat) return body.template operator()<TileForward<float>>();
#endif
  body.template operator()<TileForward<bfloat16>>();
}
#else
template <class F>
void with_kernels(Type type, F&& body) {
  with_element(type, [&]<class S>() { body.template operator()<S, MultiplyAdd, BackwardKernel<S>>(); });
}
template <class F>
void with_forward(Type type, F&& body) {
  with_element(type, [&]<class S>() { body.template operator()<ForwardKernel<S>>(); });
}
#endif

// Queries of a block at most, forward.
int64_t lanes_of(const Attention& a) {
#if defined(__AVX512BF16__)
  int64_t lanes = 0;
  with_forward(a.type, [&]<class Forward>() { lanes = Forward::lanes(a); });
  return lanes;
#else
  return a.type == Type::kDouble ? lanes_of_block<double>(a) : lanes_of_block<float>(a);
#endif
}

int64_t forward_workspace(const Attention& a) {
  int64_t bytes = 0;
  with_forward(a.type, [&]<class Forward>() { bytes = Forward(a, Arena(nullptr)).used; });
  return bytes;
}

int64_t forward(const Attention& a, AttentionTask* tasks, int64_t count, void* workspace) {
  int64_t refused = 0;
  with_forward(a.type, [&]<class Forward>() {
    Forward kernel(a, Arena(workspace));
    for (int64_t i = 0; i < count; ++i)
      if (!kernel.run(tasks[i].b, tasks[i].h, tasks[i].first, tasks[i].count)) tasks[refused++] = tasks[i];
  });
  return refused;
}

int64_t weights_workspace(const AttentionWeights& w) {
  int64_t bytes = 0;
  with_kernels(w.attention.type, [&]<class S, template <class> class Product, class>() {
    bytes = WeightsKernel<S, Product>(w, Arena(nullptr)).used;
  });
  return bytes;
}

void weights(const AttentionWeights& w, const AttentionTask* tasks, int64_t count, void* workspace) {
  with_kernels(w.attention.type, [&]<class S, template <class> class Product, class>() {
    WeightsKernel<S, Product> kernel(w, Arena(workspace));
    for (int64_t i = 0; i < count; ++i) kernel.run(tasks[i].b, tasks[i].h, tasks[i].first, tasks[i].count);
  });
}

int64_t backward_workspace(const AttentionBackward& g) {
  int64_t bytes = 0;
  with_kernels(g.attention.type, [&]<class S, template <class> class, class Backward>() { bytes = Backward(g, Arena(nullptr)).used; });
  return bytes;
}

// whole chunks of keys
int64_t sums_bytes(const Attention& a) {
  int64_t bytes = 0;
  with_kernels(a.type, [&]<class S, template <class> class, class Backward>() {
    bytes = blocks_of(a.keys, kChunk) * kChunk * Backward::sums_width(a) * sizeof(Wide<S>);
  });
  return bytes;
}

void backward(const AttentionBackward& g, int64_t b, int64_t key_head, int64_t part, int64_t parts, void* sums, int64_t worker,
              void* workspace) {
  with_kernels(g.attention.type, [&]<class S, template <class> class, class Backward>() {
    Backward(g, Arena(workspace)).run(b, key_head, part, parts, static_cast<Wide<S>*>(sums), worker);
  });
}

void store_gradients(const AttentionBackward& g, int64_t b, int64_t key_head, const void* sums, int64_t parts) {
  with_kernels(g.attention.type, [&]<class S, template <class> class, class Backward>() {
    store_sums<S>(g, b, key_head, static_cast<const Wide<S>*>(sums), parts, sums_bytes(g.attention) / sizeof(Wide<S>));
  });
}

}  // namespace

constexpr AttentionKernels kAttentionKernels{lanes_of,           forward_workspace, forward,  weights_workspace, weights,
                                             backward_workspace, sums_bytes,        backward, store_gradients};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
