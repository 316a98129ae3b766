// A block of queries, the lanes of a few vectors, and what shapes its scores. Included by attention_kernel.inl.
//
// Scores lie transposed, a row of lanes for each key of a chunk: [key][lane]. So the softmax is vertical, keys and values are read where
// they lie, as what is broadcast, and what shapes scores is a pass over a chunk that the first-level cache holds. What a call does not use
// costs it a branch for each chunk.

template <class A>
FASTSEQ_HOST_DEVICE typename Math<A>::V load_vector(const A* p) {
  typename Math<A>::V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
FASTSEQ_HOST_DEVICE void store_vector(A* p, typename Math<A>::V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Transposes a square of vectors: row(r) gives each, put(r, vector) takes each of the others. Where they ask for conditions the compiler keeps
// the square in memory: whole squares should be asked for without.
template <class V, class Row, class Put>
FASTSEQ_HOST_DEVICE void through_square(const Row& row, const Put& put) {
  constexpr int W = sizeof(V) / sizeof(V{}[0]);
  V square[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) square[r] = row(r);
  transpose<W / 2, W>(square);
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) put(r, square[r]);
}

// sums[m][v] = sum over k < depth of a(m, k) times the vectors b(k, v): a(m, k) is a[m * row + k], or a[k * row + m] if kAcross.
template <bool kAcross, int M, int NV, class A, class V>
FASTSEQ_HOST_DEVICE void multiply(const A* a, int64_t row, const A* b, int64_t b_row, int64_t depth, V (&sums)[M][NV]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[m][v] = V{};
  for (int64_t k = 0; k < depth; ++k, b += b_row) {
    V right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = load_vector(b + v * Math<A>::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const A left = kAcross ? a[k * row + m] : a[m * row + k];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[m][v] += left * right[v];
    }
  }
}

// Rows of a product beside one another: with NV vectors each, as many as the registers hold sums of.
template <int NV>
constexpr int kRowsAtOnce = FASTSEQ_VECTOR_REGISTERS >= 32 ? (NV > 2 ? 4 : 8) : (NV > 2 ? 3 : NV > 1 ? 4 : 8);

// The same over a long depth, summed in runs: rounding grows with the length of a sum.
constexpr int64_t kRun = 128;

template <bool kAcross, int M, int NV, class A>
[[gnu::noinline]] void multiply_long(const A* a, int64_t row, const A* b, int64_t b_row, int64_t depth, A* to) {
  using V = typename Math<A>::V;
  constexpr int64_t W = Math<A>::kWidth;
  for (int64_t k = 0; k < depth; k += kRun) {
    V sums[M][NV];
    multiply<kAcross>(a + k * (kAcross ? row : 1), row, b + k * b_row, b_row, min(kRun, depth - k), sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        A* at = to + (m * NV + v) * W;
        store_vector(at, k == 0 ? sums[m][v] : load_vector(at) + sums[m][v]);
      }
  }
}

template <bool kAcross, int M, int NV, class A, class Take>
FASTSEQ_HOST_DEVICE void multiply_block(const A* a, int64_t row, const A* b, int64_t b_row, int64_t depth, Take&& take) {
  using V = typename Math<A>::V;
  constexpr int64_t W = Math<A>::kWidth;
  V sums[M][NV];
  if (depth <= kRun) [[likely]] {
    multiply<kAcross>(a, row, b, b_row, depth, sums);
  } else {
    alignas(64) A memory[M * NV * W];
    multiply_long<kAcross, M, NV>(a, row, b, b_row, depth, memory);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[m][v] = load_vector(memory + (m * NV + v) * W);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) take(m, v, sums[m][v]);
}

// All rows of a product: take(m, v, sum) gets each vector of each.
template <bool kAcross, int NV, class A, class Take>
FASTSEQ_HOST_DEVICE void multiply_rows(const A* a, int64_t row, int64_t rows, const A* b, int64_t b_row, int64_t depth, Take&& take) {
  using V = typename Math<A>::V;
  constexpr int M = kRowsAtOnce<NV>;
  const int64_t next = kAcross ? 1 : row;
  int64_t first = 0;
  const auto offset = [&](int64_t m, int v, V sum) __attribute__((always_inline)) { take(first + m, v, sum); };
  for (; first + M <= rows; first += M) multiply_block<kAcross, M, NV>(a + first * next, row, b, b_row, depth, offset);
  for (; first < rows; ++first) multiply_block<kAcross, 1, NV>(a + first * next, row, b, b_row, depth, offset);
}

// Calls body.template operator()<NV>() with a number of vectors from 1 to 4.
template <class F>
FASTSEQ_HOST_DEVICE void with_vectors(int64_t vectors, F&& body) {
  switch (vectors) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 3: return body.template operator()<3>();
    default: return body.template operator()<4>();
  }
}

// Hands out a thread's memory; with none, counts it.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += blocks_of(count * sizeof(T), 64) * 64;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <class S>
using Wide = std::conditional_t<sizeof(S) == 8, double, float>;
// the coefficients of e^x
template <class A>
struct LongMath : Math<A> {
  static constexpr const auto& kExp2 = Lanes<A>::kExp2;
};
// e^x of scores that end in S
template <class S>
using Exponential = std::conditional_t<sizeof(S) == 2, ShortMath, LongMath<Wide<S>>>;

constexpr int64_t kMostVectors = 4;  // of lanes in a block of queries
constexpr int64_t kChunk = 64;       // keys whose scores are formed together by multiply-adds
constexpr int64_t kMostKeys = 128;   // of any chunk
constexpr int64_t kLine = 32;        // keys that a word of `Block::visible` tells of

template <class A>
constexpr int64_t kMostLanes = kMostVectors* Math<A>::kWidth;

// log2(e) times a factor of scores, which makes exponents of two of them, as a sum of two numbers.
template <class A>
struct Unit {
  A most, rest;

  explicit Unit(A factor) {
    constexpr double kLog2e = Lanes<double>::kLog2e;
    const double exact = double(factor) * kLog2e;
    most = A(exact);
    rest = sizeof(A) == 8 ? A(double(factor) * Lanes<double>::kLog2eRest + __builtin_fma(double(factor), kLog2e, -exact)) : A(exact - most);
  }
};

// 2^f - 1, |f| <= 1/2
template <class M, class A>
FASTSEQ_HOST_DEVICE typename Math<A>::V fraction_of(typename Math<A>::V f) {
  constexpr int last = sizeof(M::kExp2) / sizeof(A) - 1;
  typename Math<A>::V q = typename Math<A>::V{} + M::kExp2[last];
#pragma GCC unroll 16
  for (int i = last - 1; i >= 0; --i) q = q * f + M::kExp2[i];
  return q * f;
}

// 2^(x units) as a whole power of two, n, and what is left, f, at most 1/2 in size, exactly but for one rounding of f, however large x units are.
template <class M, class A>
struct Power {
  using L = Lanes<A>;
  using V = typename L::V;
  V shifted, f;  // kRound + n

  FASTSEQ_HOST_DEVICE Power(V x, Unit<A> unit) : shifted(x * unit.most + L::kRound) {
    f = x * unit.most - (shifted - L::kRound);
    if constexpr (!std::is_same_v<M, ShortMath>) f = x * unit.rest + f;
  }
  // share 2^(kRound + n - origin + f): 0 where that is no normal number, or hardly one, -infinity included. A NaN stays one.
  FASTSEQ_HOST_DEVICE V of(V share, V origin) const {
    constexpr A kLeast = sizeof(A) == 8 ? -1021 : -125;
    const V fraction = fraction_of<M, A>(f) * share + share;
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {  // an instruction multiplies by powers of two; where nothing is left it must not run, as underflow is slow
      const V n = shifted - origin;
      const __mmask16 left = _mm512_cmp_ps_mask((__m512)n, _mm512_set1_ps(kLeast), _CMP_NLT_UQ);  // of a NaN as well
      return (V)_mm512_maskz_scalef_ps(left, (__m512)fraction, (__m512)n);
    }
#endif
    const V whole = shifted - (origin - L::kRound);
    const V scale = (V)(((typename L::I)Math<A>::at_least(whole, L::kRound + kLeast) << L::kMantissa) + L::kOne);
    return whole < L::kRound + kLeast ? V{} : scale * fraction;
  }
};

// e^(factor x) for factor x <= 0 or little more, factor > 0, as `Power` has it
template <class M, class A>
FASTSEQ_HOST_DEVICE typename Math<A>::V power_of(typename Math<A>::V x, Unit<A> unit) {
  using V = typename Math<A>::V;
  return Power<M, A>(x, unit).of(V{} + A(1), V{} + Lanes<A>::kRound);
}

// What of(vectors of double) gives of vectors, rounded to their type.
template <class A, class Of, class... Given>
FASTSEQ_HOST_DEVICE typename Math<A>::V in_double(const Of& of, Given... given) {
  using D = typename Math<double>::V;
  if constexpr (sizeof(A) == 8) {
    return of(given...);
  } else {
    typedef float Half __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));
    typename Math<A>::V result;
    for (int64_t half = 0; half < 2; ++half) {
      const auto widened = [&](const typename Math<A>::V& v) {
        Half part;
        __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + half * sizeof part, sizeof part);
        return __builtin_convertvector(part, D);
      };
      const Half part = __builtin_convertvector(of(widened(given)...), Half);
      __builtin_memcpy(reinterpret_cast<char*>(&result) + half * sizeof part, &part, sizeof part);
    }
    return result;
  }
}

// Weights e^(factor x - lse) of scores in lanes, from lse and what rounding took from it. As a power of two the lse is a whole number, which
// joins the exponent, and a rest, whose power is a factor of the weight, formed once. So a weight is exact but for the rounding of numbers
// below one (2^-25 of f, the same of the rest's power, 2^-24 of the product, and the polynomial), whatever the size of scores and lse:
// the difference factor x - lse, nearly as large as the lse where there are many keys, is never rounded.
template <class M, class A, int NV>
class Weigher {
 public:
  using V = typename Math<A>::V;

  explicit Weigher(A factor) : unit_(factor) {}

  // Whether a lse is one that these can have: infinite, for nothing is left then, or such that sums of its whole number are exact. Without fused
  // multiply-adds the exponent, as large as the score, is rounded: then the lse of large scores is subtracted first.
  static bool takes(A lse) {
#if defined(__x86_64__) && !defined(__FMA__)
    constexpr A kMost = 16;
#else
    constexpr A kMost = 0x1p20;
#endif
    const A size = lse < 0 ? -lse : lse;
    return size <= kMost || size == A(INFINITY) || lse != lse;
  }
  void put(int v, V lse, V rest) {
    using D = typename Math<double>::V;
    using L = Lanes<double>;
    const auto whole = [](D of_lse) { return (of_lse * L::kLog2e + L::kRound) - L::kRound; };
    origin_[v] = in_double<A>(whole, lse) + Lanes<A>::kRound;
    share_[v] = in_double<A>([&](D of_lse, D of_rest) {
      D power = (of_lse * L::kLog2e - whole(of_lse)) + (of_lse * L::kLog2eRest + of_rest * L::kLog2e);
      power = (power == power) | (of_lse != of_lse) ? power : D{};  // no rest of infinity
      return fraction_of<LongMath<double>, double>(-power) + 1.0;
    }, lse, rest);
  }
  // the weights' sum is `by` instead of one
  void divide(int v, V by) { share_[v] = share_[v] / by; }

  FASTSEQ_HOST_DEVICE V operator()(V x, int v) const {
    return Power<M, A>(x, unit_).of(share_[v], origin_[v]);
  }

 private:
  Unit<A> unit_;
  V origin_[NV], share_[NV];  // kRound and the whole number; the power of the rest
};

// Of caps: tanh, and a polynomial for sizes up to kSmall, minimax of (tanh(t) / t - 1) / t^2 over t^2, by the type that scores end in.
template <class S>
struct Capping : Activation<Wide<S>> {  // relative error 4.4e-9
  static constexpr float kTanh[] = {-0.33333281942565261595f, 0.13331442213970171407f, -0.053739716597495065735f,
                                    0.020639092589826374452f, -0.0057049932677669670682f};
};
template <>
struct Capping<double> : Activation<double> {  // 1.0e-17
  static constexpr double kTanh[] = {-0.33333333333332855239,   0.13333333333262091989,    -0.05396825393126877614,
                                     0.021869487576126031105,   -0.0088632210030733334739, 0.0035919891774345290192,
                                     -0.0014549588963712862047, 0.00058631659930014077427, -0.00022856432741135539104,
                                     0.000077144495510548233656, -0.000016072631111087127998};
};
// A cap of 50 makes an error of 7e-4 of tanh's 1.5e-5: a fifth of bfloat16's step, but more than float16's.
template <>
struct Capping<bfloat16> : ShortMath {  // 3.4e-6
  static constexpr float kTanh[] = {-0.33315511501560110092f, 0.1304827593278519544f, -0.040514751930108941687f};
};
constexpr float kSmallTanh = 0.625f;

template <class S, class V>
FASTSEQ_HOST_DEVICE V small_tanh(V x) {
  constexpr const auto& factors = Capping<S>::kTanh;
  constexpr int last = sizeof(factors) / sizeof(factors[0]) - 1;
  const V square = x * x;
  V q = V{} + factors[last];
#pragma GCC unroll 16
  for (int i = last - 1; i >= 0; --i) q = q * square + factors[i];
  return x + x * square * q;
}

// Calls body.template operator()<T>() with the type of an element in memory.
template <class F>
FASTSEQ_HOST_DEVICE void with_element(Type type, F&& body) {
  switch (type) {
    case Type::kFloat: return body.template operator()<float>();
    case Type::kDouble: return body.template operator()<double>();
    case Type::kBfloat16: return body.template operator()<bfloat16>();
    case Type::kHalf: return body.template operator()<float16>();
  }
}

// one value
template <class T>
FASTSEQ_HOST_DEVICE Wide<T> value_of(const T* p) {
  if constexpr (sizeof(T) == 2)
    return Memory<T, float>::load(p, 1)[0];
  else
    return *p;
}

enum class Seen { kNone, kSome, kAll };

// Queries first .. first + count of one head of one sequence.
template <class S>
class Block {
 public:
  using A = Wide<S>;
  using M = Math<A>;
  using V = typename M::V;
  using I = typename Lanes<A>::I;
  using U = typename Lanes<A>::U;
  static constexpr int64_t W = M::kWidth;
  static constexpr int64_t kDiagonals = kMostLanes<A> + kMostKeys;  // of a chunk

  const Attention& a;
  int64_t b = 0, h = 0, first = 0, count = 0, vectors = 0;
  Attention::Sequence s{};

  Block(const Attention& given, Arena& arena)
      : a(given),
        words_(arena.take<uint32_t>(kMostKeys / kLine * kMostLanes<A>)),
        diagonal_(arena.take<A>(kDiagonals)),
        relative_(a.relative_q.given() ? arena.take<A>(blocks_of(a.features, W) * W * kMostLanes<A>) : nullptr),
        relative_keys_(a.relative_q.given() ? arena.take<A>(kDiagonals * a.features) : nullptr),
        relative_rows_(a.relative_q.given() ? arena.take<A>(blocks_of(a.features, W) * W * kMostLanes<A>) : nullptr),
        products_(a.relative_q.given() ? arena.take<A>(kDiagonals * kMostLanes<A>) : nullptr) {
    constexpr double kLeast = 0x1p-100;  // of a factor in the exponent
    shaped_ = a.scale < kLeast || a.softcap != 0 || a.bias.given() || a.relative_bias || a.relative_q.given() || a.slopes;
  }

  void place(int64_t batch, int64_t head, const Attention::Sequence& sequence, int64_t begin, int64_t queries) {
    b = batch, h = head, s = sequence, first = begin, count = queries, vectors = blocks_of(queries, W);
    if (!a.relative_q.given()) return;
    transposed(a.relative_q, relative_);
    const S* from = static_cast<const S*>(a.relative_q.data) + a.relative_q.offset(a.cu_q ? 0 : b, h, s.first_q + first);
    const int64_t row = blocks_of(a.features, W) * W;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t e = 0; e < a.features; e += W)
        store_vector(relative_rows_ + i * row + e, Memory<S, A>::load(from + i * a.relative_q.t + e, a.features - e));
  }

  int64_t lanes() const { return vectors * W; }
  bool shaped() const { return shaped_; }  // whether scores are more than the products times a positive scale
  // whether what was added to the scores of the last chunk is known to be numbers far from the ends of their range
  bool moderate() const { return !a.bias.given() && !a.relative_q.given() && moderate_; }
  A factor() const { return shaped_ ? A(1) : A(a.scale); }  // of the scores in the exponent

  // the keys that some query may see, but for masks; the first is a multiple of kLine
  void keys(int64_t& begin, int64_t& end) const {
    begin = 0, end = s.keys;
    if (a.left >= 0) begin = min(max(first + s.shift - a.left, 0), end) / kLine * kLine;
    if (a.right >= 0) end = max(min(end, first + count + s.shift + a.right), 0);
  }

  // the first of the block's rows of a tensor
  template <class T>
  T* row_of(const MutableRows& rows) const {
    return static_cast<T*>(rows.data) + rows.offset(a.cu_q ? 0 : b, h, s.first_q + first);
  }

  // [E][lanes] of rows of queries; lanes beyond the queries are zero
  void transposed(const ConstRows& rows, A* to, int64_t features) const {
    const S* from = static_cast<const S*>(rows.data) + rows.offset(a.cu_q ? 0 : b, h, s.first_q + first);
    const int64_t n = lanes();
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t e = 0; e < features; e += W) {
        const S* at = from + v * W * rows.t + e;
        const auto put = [&](int r, V x) __attribute__((always_inline)) { store_vector(to + (e + r) * n + v * W, x); };
        if ((v + 1) * W <= count && e + W <= features)
          through_square<V>([&](int r) __attribute__((always_inline)) { return Memory<S, A>::load(at + r * rows.t, W); }, put);
        else
          through_square<V>([&](int r) { return v * W + r < count ? Memory<S, A>::load(at + r * rows.t, features - e) : V{}; }, put);
      }
  }
  void transposed(const ConstRows& rows, A* to) const { transposed(rows, to, a.features); }

  // rows of [E][lanes] times factor[lane], back to the rows of a tensor
  void store(const A* from, int64_t features, const A* factor, const MutableRows& rows) const {
    S* to = static_cast<S*>(rows.data) + rows.offset(a.cu_q ? 0 : b, h, s.first_q + first);
    const int64_t n = lanes();
    for (int64_t v = 0; v < vectors; ++v) {
      const V scale = load_vector(factor + v * W);
      for (int64_t e = 0; e < features; e += W) {
        const A* at = from + e * n + v * W;
        S* row = to + v * W * rows.t + e;
        if ((v + 1) * W <= count && e + W <= features) {
          through_square<V>([&](int r) __attribute__((always_inline)) { return load_vector(at + r * n) * scale; },
                            [&](int r, V x) __attribute__((always_inline)) { Memory<S, A>::store(row + r * rows.t, x, W); });
        } else {
          through_square<V>([&](int r) { return e + r < features ? load_vector(at + r * n) * scale : V{}; },
                            [&](int r, V x) {
                              if (v * W + r < count) Memory<S, A>::store(row + r * rows.t, x, features - e);
                            });
        }
      }
    }
  }

  // Which of the keys begin .. begin + n, n <= kMostKeys, some query sees; remembers which query sees which for `shape`.
  Seen look(int64_t begin, int64_t n) {
    if (!a.mask.given() && !a.blocks.given()) {
      const int64_t lowest = first + s.shift, highest = lowest + count - 1;
      hides_ = (a.left >= 0 && begin < highest - a.left) || (a.right >= 0 && begin + n - 1 > lowest + a.right);
      return hides_ ? Seen::kSome : Seen::kAll;
    }
    uint32_t some = 0;
    bool all = true;
    for (int64_t line = 0; line * kLine < n; ++line) {
      const int64_t from = begin + line * kLine, valid = min(kLine, n - line * kLine);
      uint32_t* words = words_ + line * kMostLanes<A>;
      const uint32_t full = bits(0, valid);
      for (int64_t lane = 0; lane < lanes(); ++lane) words[lane] = lane < count ? seen(lane, from, valid) : full;
      for (int64_t lane = 0; lane < count; ++lane) some |= words[lane], all &= words[lane] == full;
    }
    hides_ = !all;
    return !some ? Seen::kNone : all ? Seen::kAll : Seen::kSome;
  }
  bool hides() const { return hides_; }

  // Products of keys begin .. begin + n become scores (but for the factor), -infinity where `look` saw the key hidden; and the largest of
  // every lane, which each pass finds on its way. `capped`, if wanted, gets the hyperbolic tangent of a softcap.
  template <int NV>
  void shape(A* scores, int64_t begin, int64_t n, V (&largest)[NV], A* capped = nullptr) {
    moderate_ = true;
    if (shaped_) {
      if (a.relative_q.given()) add_relative<NV>(scores, begin, n);
      A own = A(a.scale);  // what the scores are still to be multiplied by: the first pass does it
      const auto once = [&] { return std::exchange(own, A(1)); };
      if (a.softcap != 0) own = A(1), cap<NV>(scores, n, largest, capped);
      if (a.bias.given()) add_pairs<NV>(a.bias, a.bias_type, A(1), scores, begin, n, largest, once());
      if (a.slopes) add_slopes<NV>(scores, begin, n, largest, once());
      if (a.relative_bias) add_relative_bias<NV>(scores, begin, n, largest, once());
      if (own != A(1) || a.relative_q.given()) each<NV>(scores, n, largest, [&](int64_t, int, V score) { return score * own; });
    }
    if (!hides_) return;
    if (!a.mask.given() && !a.blocks.given()) return hide_outside<NV>(scores, begin, n, largest);
    each<NV>(scores, n, largest, [&](int64_t j, int v, V score) { return sees(j, v) ? score : V{} - A(INFINITY); });
  }

  // rows [key][lane] of keys begin .. begin + n, times `own`, get what a tensor has for them, times a factor; and the largest of every lane
  template <int NV>
  void add_pairs(const Pairs& pairs, Type type, A factor, A* to, int64_t begin, int64_t n, V (&largest)[NV], A own = 1) const {
    with_element(type, [&]<class T>() { add_pairs<NV, T>(pairs, factor, to, begin, n, largest, own); });
  }

  // weights of keys begin .. begin + n, of which a dropout zeroes some: rows [key][lane]; begin is a multiple of 4
  template <int NV, class Apply>
  void drop(int64_t begin, int64_t n, const Apply& apply) const {
    using R = Philox::Of<A>;
    using U32 = typename R::U;
    constexpr int64_t lanes = NV * W;
    const uint64_t threshold = static_cast<uint64_t>(a.dropout * 4294967296.0), seed = static_cast<uint64_t>(*a.seed);
    const int64_t query = a.placed ? a.seed[1] : 0, key = a.placed ? a.seed[2] : 0;
    const int64_t which = a.placed ? a.seed[3] + b * a.seed[4] + h : b * a.heads + h;
    const A kept = a.dropout < 1 ? A(1 / (1 - a.dropout)) : A(0);
    U32 of_lane;
    for (int64_t i = 0; i < W; ++i) of_lane[i] = uint32_t(i);
    for (int64_t j = -(key % 4); j < n; j += 4)  // four keys of one number, of which these may be the last
      for (int64_t v = 0; v < NV; ++v) {
        U32 numbers[4];
        R::random(seed, U32{} + uint32_t((key + begin + j) / 4), of_lane + uint32_t(query + first + v * W), U32{} + uint32_t(which), numbers);
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; ++r) {
          if (j + r < 0) continue;
          if (j + r >= n) break;
          const auto keeps = threshold >> 32 ? U32{} : (U32)(numbers[r] >= uint32_t(threshold));
          apply((j + r) * lanes + v * W, lanes_where(keeps, kept));
        }
      }
  }

  // Adds what a chunk of gradients of the scores gives along its diagonals to those of the distances: diagonal(entry) is the place of an
  // entry of `relative_bias`, in ascending order of distance
  template <int NV, class Place>
  void sum_diagonals(const A* ds, int64_t begin, int64_t n, int64_t zero, int64_t length, const Place& place) {
    constexpr int64_t lanes = NV * W;
    const int64_t count_of = lanes + n - 1;
    __builtin_memset(diagonal_, 0, kDiagonals * sizeof(A));
    for (int64_t j = 0; j < n; ++j)
      for (int64_t v = 0; v < NV; ++v) {
        A* at = diagonal_ + v * W - j + n - 1;
        store_vector(at, load_vector(at) + load_vector(ds + j * lanes + v * W));
      }
    const int64_t last = begin + n - 1 - first - s.shift + zero;  // entry of diagonal 0, the latest key beside the first query
    for (int64_t t = 0; t < count_of; ++t)
      if (last - t >= 0 && last - t < length) *place(last - t) += diagonal_[t];
  }

  // Adds the gradients that a chunk of those of the scores gives to relative_q, dq [feature][lane], and to relative_k of the head, dk
  // [entry][feature]; either may be null. `shape` was called for the chunk before.
  template <int NV>
  void add_relative_gradients(const A* ds, int64_t begin, int64_t n, A* dq, A* dk) const {
    constexpr int64_t lanes = NV * W;
    const int64_t last = begin + n - 1 - first - s.shift + a.relative_k_zero, E = a.features, diagonals = lanes + n - 1;
    __builtin_memset(products_, 0, diagonals * lanes * sizeof(A));
    for (int64_t j = 0; j < n; ++j)
      for (int64_t lane = 0; lane < lanes; ++lane) products_[(lane - j + n - 1) * lanes + lane] = ds[j * lanes + lane];
    if (dq)
      multiply_rows<true, NV>(relative_keys_, E, E, products_, lanes, diagonals, [&](int64_t e, int v, V sum) __attribute__((always_inline)) {
        A* at = dq + e * lanes + v * W;
        store_vector(at, load_vector(at) + sum);
      });
    const int64_t row = blocks_of(E, W) * W;
    for (int64_t f = 0; dk && f < E; f += W)
      multiply_rows<false, 1>(products_, lanes, diagonals, relative_rows_ + f, row, count, [&](int64_t t, int, V sum) __attribute__((always_inline)) {
        if (last - t < 0 || last - t >= a.relative_k_length) return;
        A* at = dk + (last - t) * E + f;
        Memory<A, A>::store(at, Memory<A, A>::load(at, E - f) + sum, E - f);
      });
  }

 private:
  // ones from begin to end
  static uint32_t bits(int64_t begin, int64_t end) {
    begin = min(max(begin, 0), 32), end = min(max(end, 0), 32);
    if (begin >= end) return 0;
    return uint32_t(((uint64_t(1) << end) - 1) & ~((uint64_t(1) << begin) - 1));
  }

  // bit by bit, whether a query sees keys from .. from + n
  uint32_t seen(int64_t lane, int64_t from, int64_t n) const {
    const int64_t i = first + lane, place = i + s.shift;
    uint32_t word = bits(a.left >= 0 ? place - a.left - from : 0, a.right >= 0 ? min(place + a.right + 1 - from, n) : n);
    if (word && a.blocks.given()) {
      const auto* row = static_cast<const uint8_t*>(a.blocks.data) + b * a.blocks.b + h * a.blocks.h + i / a.block_size * a.blocks.i;
      for (int64_t block = from / a.block_size; block * a.block_size < from + n; ++block)
        if (!row[block * a.blocks.j]) word &= ~bits(block * a.block_size - from, (block + 1) * a.block_size - from);
    }
    if (word && a.mask.given()) {
      const auto* row = static_cast<const uint8_t*>(a.mask.data) + b * a.mask.b + h * a.mask.h + i * a.mask.i + from * a.mask.j;
      if (a.mask.j == 0) return *row ? word : 0;
      if (a.mask.j == 1 && n == kLine) return word & nonzero(row);
      uint32_t given = 0;
      for (int64_t j = 0; j < n; ++j) given |= uint32_t(row[j * a.mask.j] != 0) << j;
      word &= given;
    }
    return word;
  }

  // which of 32 bytes are not zero
  static uint32_t nonzero(const uint8_t* bytes) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m256i v = _mm256_loadu_si256((const __m256i*)bytes);
    return _mm256_test_epi8_mask(v, v);
#elif defined(__AVX2__)
    const __m256i v = _mm256_loadu_si256((const __m256i*)bytes);
    return ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
#else
    uint32_t word = 0;
    for (int64_t j = 0; j < 32; ++j) word |= uint32_t(bytes[j] != 0) << j;
    return word;
#endif
  }

  // lanes that see key j of the chunk
  FASTSEQ_HOST_DEVICE I sees(int64_t j, int64_t v) const {
    const uint32_t* words = words_ + j / kLine * kMostLanes<A> + v * W;
    typedef uint32_t Half __attribute__((vector_size(4 * W)));
    Half word;
    __builtin_memcpy(&word, words, sizeof word);
    using Bit = std::remove_cvref_t<decltype(U{}[0])>;
    return (I)((__builtin_convertvector(word, U) & (Bit(1) << j % kLine)) != 0);
  }

  static FASTSEQ_HOST_DEVICE V lanes_where(typename Philox::Of<A>::U keeps, A value) {
    typedef int32_t Narrow __attribute__((vector_size(4 * W)));
    return (V)(__builtin_convertvector((Narrow)keeps, I) & (I)(V{} + value));
  }

  // Each score of n keys becomes of(key, vector, score); and the largest of every lane.
  template <int NV, class Of>
  static FASTSEQ_HOST_DEVICE void each(A* scores, int64_t n, V (&largest)[NV], const Of& of) {
    V most[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) most[v] = V{} - A(INFINITY);
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        A* at = scores + (j * NV + v) * W;
        const V score = of(j, v, load_vector(at));
        store_vector(at, score);
        most[v] = score > most[v] ? score : most[v];
      }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) largest[v] = most[v];
  }

  // the keys outside of each query's window
  template <int NV>
  void hide_outside(A* scores, int64_t begin, int64_t n, V (&largest)[NV]) const {
    I lane;
    for (int64_t i = 0; i < W; ++i) lane[i] = i;
    each<NV>(scores, n, largest, [&](int64_t j, int v, V score) {
      const int64_t distance = begin + j - first - s.shift - v * W;  // from the query of the first lane
      if (a.right >= 0) score = lane < limited(distance - a.right) ? V{} - A(INFINITY) : score;
      if (a.left >= 0) score = lane > limited(distance + a.left) ? V{} - A(INFINITY) : score;
      return score;
    });
  }
  // within what every lane's number is on the same side of
  static FASTSEQ_HOST_DEVICE auto limited(int64_t x) {
    using Number = std::remove_cvref_t<decltype(I{}[0])>;
    return I{} + Number(min(max(x, -1), W));
  }

  // one square of registers after the other
  template <int NV, class T>
  void add_pairs(const Pairs& pairs, A factor, A* to, int64_t begin, int64_t n, V (&largest)[NV], A own) const {
    constexpr int64_t lanes = NV * W;
    const T* base = static_cast<const T*>(pairs.data) + b * pairs.b + h * pairs.h + first * pairs.i + begin * pairs.j;
    if (pairs.i == 0)  // the same for every query
      return each<NV>(to, n, largest, [&](int64_t j, int, V score) { return score * own + A(value_of(base + j * pairs.j)) * factor; });
    // What the next chunk of keys reads, or, behind the last, the next queries, is fetched meanwhile: pieces of many rows, which no processor
    // expects by itself.
    const int64_t ahead = begin + n < s.keys ? n : count * pairs.i - begin;
    for (int64_t v = 0; v < NV; ++v) {
      V most = V{} - A(INFINITY);
      const auto put = [&](int64_t key, V x) __attribute__((always_inline)) {
        A* at = to + key * lanes + v * W;
        const V sum = load_vector(at) * own + x * factor;
        store_vector(at, sum);
        most = sum > most ? sum : most;
      };
      for (int64_t j = 0; j < n; j += W) {
        if (pairs.j == 1 && (v + 1) * W <= count && j + W <= n) {
          through_square<V>([&](int r) __attribute__((always_inline)) {
                              const T* at = base + (v * W + r) * pairs.i + j;
                              __builtin_prefetch(at + ahead, 0, 2);
                              return loaded<T>(at, W);
                            },
                            [&](int r, V x) __attribute__((always_inline)) { put(j + r, x); });
          continue;
        }
        V square[W];
        for (int64_t r = 0; r < W; ++r) {
          const int64_t i = v * W + r;
          if (i >= count) {
            square[r] = V{};
          } else if (pairs.j == 1) {
            square[r] = loaded<T>(base + i * pairs.i + j, n - j);
          } else {
            square[r] = V{};
            for (int64_t c = 0; c < min(W, n - j); ++c) square[r][c] = A(value_of(base + i * pairs.i + (j + c) * pairs.j));
          }
        }
        transpose<W / 2, W>(square);
        for (int64_t r = 0; r < min(W, n - j); ++r) put(j + r, square[r]);
      }
      largest[v] = most;
    }
  }

  template <class T>
  static FASTSEQ_HOST_DEVICE V loaded(const T* p, int64_t n) {
    if constexpr (sizeof(A) == 8 && sizeof(T) != 8) {  // no such bias: fp64 has biases of fp64
      return V{};
    } else if constexpr (sizeof(A) == 4 && sizeof(T) == 8) {
      return V{};
    } else {
      return Memory<T, A>::load(p, n);
    }
  }

  static constexpr A kModerate = A(0x1p60);
  static FASTSEQ_HOST_DEVICE V size_of(V v) { return (V)((I)v & ~Lanes<A>::kSign); }
  // whether some lane is, or a NaN
  static FASTSEQ_HOST_DEVICE bool beyond(V v, A most) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(most), _CMP_NLE_UQ) != 0;
#elif defined(__AVX2__)
    if constexpr (sizeof(A) == 4) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(most), _CMP_NLE_UQ)) != 0;
#endif
    bool some = false;
    for (int64_t i = 0; i < W; ++i) some |= !(v[i] <= most);
    return some;
  }

  // Scores times the scale become softcap tanh(score / softcap). Most scores are far from their cap: a key that has no other takes the
  // polynomial.
  template <int NV>
  void cap(A* scores, int64_t n, V (&largest)[NV], A* capped) const {
    const A inner = A(a.scale / a.softcap), outer = A(a.softcap);
    V most[NV];
    for (int v = 0; v < NV; ++v) most[v] = V{} - A(INFINITY);
    for (int64_t j = 0; j < n; ++j, scores += NV * W) {
      V t[NV], size{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        t[v] = load_vector(scores + v * W) * inner;
        const V own = size_of(t[v]);
        size = own > size ? own : size;
      }
      if (beyond(size, A(kSmallTanh))) [[unlikely]]
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) t[v] = Capping<S>::tanh(t[v]);
      else
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) t[v] = small_tanh<S>(t[v]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V score = t[v] * outer;
        store_vector(scores + v * W, score);
        most[v] = score > most[v] ? score : most[v];
        if (capped) store_vector(capped + (j * NV + v) * W, t[v]);
      }
    }
    for (int v = 0; v < NV; ++v) largest[v] = most[v];
  }

  template <int NV>
  void add_slopes(A* scores, int64_t begin, int64_t n, V (&largest)[NV], A own) {
    const A slope = static_cast<const A*>(a.slopes)[b * a.slopes_b + h];
    moderate_ &= slope < kModerate && slope > -kModerate;
    V lane;
    for (int64_t i = 0; i < W; ++i) lane[i] = A(i);
    const int64_t distance = first + s.shift - begin;  // of the first lane from the first key
    each<NV>(scores, n, largest, [&](int64_t j, int v, V score) { return score * own - slope * size_of(lane + A(distance + v * W - j)); });
  }

  // diagonal t of a chunk holds the pairs with lane - key = t - (n - 1)
  template <int NV>
  void add_relative_bias(A* scores, int64_t begin, int64_t n, V (&largest)[NV], A own) {
    constexpr int64_t lanes = NV * W, count_of = lanes - 1;
    with_element(a.relative_bias_type, [&]<class T>() { fill_diagonal<T>(begin + n - 1 - first - s.shift + a.relative_bias_zero, n + count_of); });
    for (int64_t t = 0; t < n + count_of; t += W)
      moderate_ &= !beyond(size_of(Memory<A, A>::load(diagonal_ + t, n + count_of - t)), kModerate);
    each<NV>(scores, n, largest,
             [&](int64_t j, int v, V score) { return score * own + load_vector(diagonal_ + v * W - j + n - 1); });
  }

  // entries last, last - 1, .. of the head's relative bias, nothing beyond its ends
  template <class T>
  void fill_diagonal(int64_t last, int64_t count) const {
    const int64_t length = a.relative_bias_length;
    const T* table = static_cast<const T*>(a.relative_bias) + h * length;
    for (int64_t t = 0; t < count; t += W) {
      if constexpr ((sizeof(T) == 8) == (sizeof(A) == 8)) {
        const int64_t lowest = last - t - (W - 1);
        if (lowest >= 0 && last - t < length) {
          store_vector(diagonal_ + t, reversed(loaded<T>(table + lowest, W), std::make_integer_sequence<int, W>()));
          continue;
        }
      }
      for (int64_t r = t; r < min(t + W, count); ++r)
        diagonal_[r] = last - r >= 0 && last - r < length ? A(value_of(table + last - r)) : A(0);
    }
  }
  template <int... J>
  static FASTSEQ_HOST_DEVICE V reversed(V v, std::integer_sequence<int, J...>) {
    return __builtin_shufflevector(v, v, (W - 1 - J)...);
  }

  // relative_q . relative_k[distance], of every lane and every distance of the chunk, and then the diagonal that is each key's
  template <int NV>
  void add_relative(A* scores, int64_t begin, int64_t n) const {
    constexpr int64_t lanes = NV * W;
    const int64_t last = begin + n - 1 - first - s.shift + a.relative_k_zero, length = a.relative_k_length, E = a.features;
    const int64_t diagonals = lanes + n - 1;
    const S* table = static_cast<const S*>(a.relative_k) + h * length * E;
    for (int64_t t = 0; t < diagonals; ++t) {
      A* row = relative_keys_ + t * E;
      if (last - t < 0 || last - t >= length) {
        __builtin_memset(row, 0, E * sizeof(A));
        continue;
      }
      for (int64_t e = 0; e < E; e += W) Memory<A, A>::store(row + e, Memory<S, A>::load(table + (last - t) * E + e, E - e), E - e);
    }
    multiply_rows<false, NV>(relative_keys_, E, diagonals, relative_, lanes, E, [&](int64_t t, int v, V sum) __attribute__((always_inline)) {
      store_vector(products_ + t * lanes + v * W, sum);
    });
    for (int64_t j = 0; j < n; ++j)
      for (int64_t lane = 0; lane < lanes; ++lane) scores[j * lanes + lane] += products_[(lane - j + n - 1) * lanes + lane];
  }

  uint32_t* words_;  // [kMostKeys / kLine][most lanes]
  A* diagonal_;
  A *relative_, *relative_keys_, *relative_rows_, *products_;
  bool shaped_, hides_ = false, moderate_ = true;
};
