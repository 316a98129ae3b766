// Vectors of one instruction set, in GCC's vector extension, so that the same lines serve every width and machine; intrinsics only
// where the extension has no words: heads of registers, estimates, roundings.
// Included inside the namespace of an instruction set, after <immintrin.h>; FASTSEQ_VECTOR_BYTES is its register width.

struct bfloat16 {
  uint16_t bits;
};
struct float16 {  // IEEE binary16
  uint16_t bits;
};

template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef uint8_t B __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 4)));
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int kMantissa = 23;
  static constexpr int32_t kOne = 0x3f800000;
  static constexpr int32_t kSign = INT32_MIN;
  static constexpr float kLargest = 87;      // of e's exponent, so that 2^n stays a normal number
  static constexpr float kTanhIsOne = 9.1f;  // beyond it tanh rounds to 1
  // minimax of (tanh(x) / x - 1) / x^2 over x^2 for |x| < kTanhNear, of tanh relative error 1.1e-9
  static constexpr float kTanhNear = 0.55f;
  static constexpr float kTanh[] = {-0.33333316f, 0.13332593f, -0.053853095f, 0.021075152f, -0.0062794713f};
  static constexpr float kLog2e = 1.44269502162933349609f;  // log2(e) as a sum of two floats
  static constexpr float kLog2eRest = 1.92596303350e-8f;
  // minimax of (2^f - 1) / f on [-1/2, 1/2], relative error 1.1e-8
  static constexpr float kExp2[] = {0.69314718792566665f, 0.24022649794964410f, 0.055503574336481868f,
                                    0.0096182374941833146f, 0.0013390735475399872f, 0.00015403512618661003f};
  // minimax of (2 atanh(t) / t - 2) / t^2 over t^2 on [0, 1/9], of atanh relative error 4.1e-10
  static constexpr float kAtanh[] = {0.666666673205274125f, 0.399997063319297174f, 0.285923579943028377f, 0.217065758008803726f,
                                     0.232243292240233488f};
};

template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(FASTSEQ_VECTOR_BYTES)));
  typedef uint8_t B __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 8)));
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr int64_t kOne = 0x3ff0000000000000;
  static constexpr int64_t kSign = INT64_MIN;
  static constexpr double kLargest = 708;
  static constexpr double kTanhIsOne = 19.1;
  static constexpr double kLog2e = 1.44269504088896338700;
  static constexpr double kLog2eRest = 2.0355273740931033e-17;
  // relative error 1.8e-17
  static constexpr double kExp2[] = {0.69314718055994531120,    0.24022650695910097889,    0.055504108664821236499,
                                     0.0096181291076070652998,  0.0013333558146531644707,  0.00015403530441481283746,
                                     0.000015252733701200713074, 1.3215442723878388157e-6, 1.0178121305806718011e-7,
                                     7.0725617683983011661e-9,  4.4455361318481760235e-10};
  // relative error 5.1e-18
  static constexpr double kAtanh[] = {0.66666666666666658561,  0.400000000000145826732, 0.28571428567108757162,
                                      0.222222227174278629893, 0.181817894361328581693, 0.153855700649586231034,
                                      0.133141442096549361503, 0.120010728095907125352, 0.0880073848614467388222,
                                      0.161640456119435322209};
};

// Elementwise mathematics of the cells.
template <class A>
struct Math {
  using V = typename Lanes<A>::V;
  using I = typename Lanes<A>::I;
  static constexpr int kWidth = sizeof(V) / sizeof(A);

  // a / b of normal numbers with a normal reciprocal of b. A division occupies its unit for 16 cycles and more, while an estimate of 14
  // bits and a correction by the remainder, nearly as exact, run beside other things.
  static FASTSEQ_HOST_DEVICE V divide(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      const V estimate = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)b), quotient = a * estimate;
      return quotient + estimate * (a - b * quotient);
    }
#endif
    return a / b;
  }
  // 1 - a / b of such numbers, a at most b / 2: the quotient is not rounded on its way.
  static FASTSEQ_HOST_DEVICE V one_less_quotient(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      const V estimate = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)b), result = A(1) - a * estimate;
      return result - estimate * (a - b * (A(1) - result));  // what is subtracted from 1 is exact
    }
#endif
    return A(1) - a / b;
  }

  // e^(k x) = 2^n (1 + p): gives 2^n and p, |p| < 1/2 (a NaN stays one). |k x| must not exceed kLargest; up to twice that, the upper
  // bits of 2^n, then no number, still tell n
  static FASTSEQ_HOST_DEVICE void exp_parts(V x, A k, V& scale, V& fraction) {
    using L = Lanes<A>;
    const V shifted = x * (k * L::kLog2e) + L::kRound;
    const V n = shifted - L::kRound;
    V f = x * (k * L::kLog2e) - n;
    f = x * (k * L::kLog2eRest) + f;
    constexpr int last = sizeof(L::kExp2) / sizeof(A) - 1;
    V q = V{} + L::kExp2[last];
#pragma GCC unroll 16
    for (int i = last - 1; i >= 0; --i) q = q * f + L::kExp2[i];
    fraction = f * q;
    scale = (V)(((I)shifted << L::kMantissa) + L::kOne);
  }

  // x within [-most, most]; a NaN stays one
  static FASTSEQ_HOST_DEVICE V clamped(V x, A most) {
    return at_least(at_most(x, most), -most);
  }
  static FASTSEQ_HOST_DEVICE V at_most(V x, A most) {
#if defined(__AVX512F__)  // the instruction gives its second operand if either is a NaN, which the compiler does not rely on
    if constexpr (sizeof(A) == 4) return (V)_mm512_maskz_min_ps(0xffff, (__m512)(V{} + most), (__m512)x);
#endif
    return x > most ? V{} + most : x;
  }
  static FASTSEQ_HOST_DEVICE V at_least(V x, A least) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return (V)_mm512_maskz_max_ps(0xffff, (__m512)(V{} + least), (__m512)x);
#endif
    return x < least ? V{} + least : x;
  }

  static FASTSEQ_HOST_DEVICE V sigmoid(V x) {
    V scale, fraction;
    x = clamped(x, Lanes<A>::kLargest);
    exp_parts(x, -1, scale, fraction);
    return divide(V{} + 1, scale * fraction + (scale + A(1)));
  }

  // e^x over the whole range, subnormal numbers included: 2^n, which may not fit, as the product of two halves
  static FASTSEQ_HOST_DEVICE V exp(V x) {
    using L = Lanes<A>;
    V scale, fraction;
    x = clamped(x, 2 * L::kLargest);
    exp_parts(x, 1, scale, fraction);
    const I n = ((I)scale - L::kOne) >> L::kMantissa, half = n >> 1;
    const V power = (V)((half << L::kMantissa) + L::kOne), rest = (V)(((n - half) << L::kMantissa) + L::kOne);
    return (power + power * fraction) * rest;
  }

  // log(sigmoid(x)) = min(x, 0) - log(1 + e), e = e^-|x|, and log(1 + e) = 2 atanh(e / (2 + e)), which cancels nowhere
  static FASTSEQ_HOST_DEVICE V log_sigmoid(V x) {
    using L = Lanes<A>;
    const V e = exp(x < 0 ? x : -x);
    const V t = e / (e + A(2)), square = t * t;
    constexpr int last = sizeof(L::kAtanh) / sizeof(A) - 1;
    V q = V{} + L::kAtanh[last];
#pragma GCC unroll 16
    for (int i = last - 1; i >= 0; --i) q = q * square + L::kAtanh[i];
    return (x < 0 ? x : V{}) - (A(2) * t + t * square * q);
  }

  // With e = e^2|x| - 1, formed without cancellation: e / (e + 2) keeps the relative accuracy of small arguments, 1 - 2 / (e + 2) that of
  // the distance to 1, which the derivative 1 - tanh^2 lives on. In fp32 small ones have a polynomial, which little but rounding is wrong
  // with: a quotient makes twice its error.
  static FASTSEQ_HOST_DEVICE V tanh(V x) {
    using L = Lanes<A>;
    V scale, fraction, result;
    const I sign = (I)x & L::kSign;
    V a = (V)((I)x ^ sign);
    a = at_most(a, L::kTanhIsOne);
    exp_parts(a, 2, scale, fraction);
    if constexpr (sizeof(A) == 4) {
      const V far = one_less_quotient(V{} + 2, scale * fraction + (scale + A(1)));
      result = a < L::kTanhNear ? near_tanh(a) : far;
    } else {
      const V e = scale * fraction + (scale - A(1));
      const auto small = e < A(2);  // |x| < 0.55
      const V quotient = divide(small ? e : V{} + 2, e + A(2));
      result = small ? quotient : A(1) - quotient;
    }
    return (V)((I)result ^ sign);
  }
  // of |x| < kTanhNear
  static FASTSEQ_HOST_DEVICE V near_tanh(V x) {
    using L = Lanes<A>;
    const V square = x * x;
    constexpr int last = sizeof(L::kTanh) / sizeof(A) - 1;
    V q = V{} + L::kTanh[last];
#pragma GCC unroll 8
    for (int i = last - 1; i >= 0; --i) q = q * square + L::kTanh[i];
    return x + x * square * q;
  }

  static FASTSEQ_HOST_DEVICE V sigmoid_tanh(V x, V y) { return sigmoid(x) * tanh(y); }

  static FASTSEQ_HOST_DEVICE V relu(V x) { return x < 0 ? V{} : x; }  // a NaN stays one, as in torch

  // zero where h <= 0, else d, beside a NaN too, as in torch
  static FASTSEQ_HOST_DEVICE V where_positive(V h, V d) { return h <= 0 ? V{} : d; }

  // a where x < y, else b
  static FASTSEQ_HOST_DEVICE V where_less(V x, V y, V a, V b) { return x < y ? a : b; }

  // a NaN on either side stays one
  static FASTSEQ_HOST_DEVICE V maximum(V a, V b) { return (a > b) | (a != a) ? a : b; }
};

// Activations that end in bfloat16: e^x to 1.5e-5 (of its distance to 1, too), which is as if the argument were that wrong; the divisions
// are as exact as ever, since how far a gate is from 1 decides how long a state lasts.
struct ShortMath : Math<float> {
  // minimax of (2^f - 1) / f on [-1/2, 1/2], relative error 1.5e-5
  static constexpr float kExp2[] = {0.69313685778f, 0.240232521605f, 0.0558372882701f, 0.0096181108384f};

  // e^(k x) = 2^n (1 + p), |k x| at most kLargest: gives 2^n and p
  static FASTSEQ_HOST_DEVICE void exp_parts(V x, float k, V& scale, V& fraction) {
    using L = Lanes<float>;
    constexpr float kRound = L::kRound + 127;  // the sum's low bits are then the exponent of 2^n
    const V shifted = x * (k * L::kLog2e) + kRound;
    const V f = x * (k * L::kLog2e) - (shifted - kRound);
    fraction = f * (((kExp2[3] * f + kExp2[2]) * f + kExp2[1]) * f + kExp2[0]);
    scale = (V)((I)shifted << L::kMantissa);
  }

  // sigmoid = 1 / this; at most 2^125
  static FASTSEQ_HOST_DEVICE V sigmoid_divisor(V x) {
    V scale, fraction;
    exp_parts(clamped(x, Lanes<float>::kLargest), -1, scale, fraction);
    return (scale * fraction + scale) + 1.0f;
  }
  // tanh = this / (this + 2): e^2x - 1, formed without cancellation
  static FASTSEQ_HOST_DEVICE V tanh_dividend(V x) {
    V scale, fraction;
    exp_parts(clamped(x, Lanes<float>::kTanhIsOne), 2, scale, fraction);
    return scale * fraction + (scale - 1.0f);
  }

  static FASTSEQ_HOST_DEVICE V sigmoid(V x) { return divide(V{} + 1, sigmoid_divisor(x)); }
  static FASTSEQ_HOST_DEVICE V tanh(V x) {
    const V e = tanh_dividend(x);
    return divide(e, e + 2.0f);
  }
};

// Two vectors that go through a cell side by side: the long chain of one row's operations leaves room for another's.
template <class A>
struct Pair {
  using V = typename Lanes<A>::V;
  V a, b;
  friend FASTSEQ_HOST_DEVICE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
  friend FASTSEQ_HOST_DEVICE Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
  friend FASTSEQ_HOST_DEVICE Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
  friend FASTSEQ_HOST_DEVICE Pair operator/(Pair x, Pair y) { return {x.a / y.a, x.b / y.b}; }
  friend FASTSEQ_HOST_DEVICE Pair operator+(Pair x, A y) { return {x.a + y, x.b + y}; }
};

// Mathematics of one row, and of two: a value of the cell is gathered from value(row), and given to take(row, value).
template <class A, class M>
struct OneRow : M {
  using V = typename Math<A>::V;
  static constexpr int64_t kRows = 1;
  template <class F>
  static FASTSEQ_HOST_DEVICE V gather(F&& value) {
    return value(0);
  }
  template <class F>
  static FASTSEQ_HOST_DEVICE void scatter(V v, F&& take) {
    take(0, v);
  }
};

template <class A, class M>
struct TwoRows {
  using V = Pair<A>;
  static constexpr int64_t kRows = 2;
  template <class F>
  static FASTSEQ_HOST_DEVICE V gather(F&& value) {
    return {value(0), value(1)};
  }
  template <class F>
  static FASTSEQ_HOST_DEVICE void scatter(V v, F&& take) {
    take(0, v.a), take(1, v.b);
  }
  static FASTSEQ_HOST_DEVICE V sigmoid(V x) { return {M::sigmoid(x.a), M::sigmoid(x.b)}; }
  static FASTSEQ_HOST_DEVICE V exp(V x) { return {M::exp(x.a), M::exp(x.b)}; }
  static FASTSEQ_HOST_DEVICE V log_sigmoid(V x) { return {M::log_sigmoid(x.a), M::log_sigmoid(x.b)}; }
  static FASTSEQ_HOST_DEVICE V tanh(V x) { return {M::tanh(x.a), M::tanh(x.b)}; }
  static FASTSEQ_HOST_DEVICE V sigmoid_tanh(V x, V y) { return {M::sigmoid_tanh(x.a, y.a), M::sigmoid_tanh(x.b, y.b)}; }
  static FASTSEQ_HOST_DEVICE V relu(V x) { return {M::relu(x.a), M::relu(x.b)}; }
  static FASTSEQ_HOST_DEVICE V maximum(V x, V y) { return {M::maximum(x.a, y.a), M::maximum(x.b, y.b)}; }
};

// The first n elements, fewer than a register's, at the end of a row: the register's others are zero, memory's are not touched.
template <class R, class E>
FASTSEQ_HOST_DEVICE R load_head(const E* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(R) == 64 && sizeof(E) == 4) return (R)_mm512_maskz_loadu_epi32(mask, p);
  if constexpr (sizeof(R) == 64 && sizeof(E) == 8) return (R)_mm512_maskz_loadu_epi64(mask, p);
  if constexpr (sizeof(R) == 32 && sizeof(E) == 2) return (R)_mm256_maskz_loadu_epi16(mask, p);
  if constexpr (sizeof(R) == 16 && sizeof(E) == 1) return (R)_mm_maskz_loadu_epi8(mask, p);
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 32 && sizeof(E) == 4) {
    const auto lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return (R)_mm256_maskload_epi32((const int*)p, lanes);
  }
  if constexpr (sizeof(R) == 32 && sizeof(E) == 8) {
    const auto lanes = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    return (R)_mm256_maskload_epi64((const long long*)p, lanes);
  }
#endif
  R v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

template <class R, class E>
FASTSEQ_HOST_DEVICE void store_head(E* p, R v, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(R) == 64 && sizeof(E) == 4) return _mm512_mask_storeu_epi32(p, mask, (__m512i)v);
  if constexpr (sizeof(R) == 64 && sizeof(E) == 8) return _mm512_mask_storeu_epi64(p, mask, (__m512i)v);
  if constexpr (sizeof(R) == 32 && sizeof(E) == 2) return _mm256_mask_storeu_epi16(p, mask, (__m256i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 32 && sizeof(E) == 4) {
    const auto lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_maskstore_epi32((int*)p, lanes, (__m256i)v);
  }
  if constexpr (sizeof(R) == 32 && sizeof(E) == 8) {
    const auto lanes = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    return _mm256_maskstore_epi64((long long*)p, lanes, (__m256i)v);
  }
#endif
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// Moves between memory (float, double or 16 bits) and vectors; n < kWidth at the end of a row.
template <class S, class A>
struct Memory {
  using V = typename Lanes<A>::V;
  static constexpr int kWidth = sizeof(V) / sizeof(A);

  static FASTSEQ_HOST_DEVICE V load(const S* p, int64_t n) {
    if (n < kWidth) return load_head<V>(p, n);
    V v;
    __builtin_memcpy(&v, p, sizeof(V));
    return v;
  }

  static FASTSEQ_HOST_DEVICE void store(S* p, V v, int64_t n) {
    if (n < kWidth) return store_head(p, v, n);
    __builtin_memcpy(p, &v, sizeof(V));
  }

  static FASTSEQ_HOST_DEVICE V rounded(V v) { return v; }
};

// Between fp32 and a type of 16 bits, exactly, rounding to nearest even; a NaN stays a NaN.
template <class S>
struct Halves;

template <>
struct Halves<bfloat16> {
  using V = Lanes<float>::V;
  using U = Lanes<float>::U;
  typedef uint16_t H __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));

  static FASTSEQ_HOST_DEVICE V widened(H half) {
#if FASTSEQ_VECTOR_BYTES == 64  // the compiler would widen one half after the other; without a mask it warns of its own header
    return (V)((U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half) << 16);
#else
    return (V)(__builtin_convertvector(half, U) << 16);
#endif
  }

  static FASTSEQ_HOST_DEVICE H narrowed(V v) {
#if defined(__AVX512BF16__)
    return (H)_mm512_cvtneps_pbh((__m512)v);  // takes and gives zero for subnormal numbers
#else
    const U bits = (U)v;
    const U nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? nearest : U{} + 0x7fc0, H);
#endif
  }
};

template <>
struct Halves<float16> {
  using V = Lanes<float>::V;
  using U = Lanes<float>::U;
  typedef uint16_t H __attribute__((vector_size(FASTSEQ_VECTOR_BYTES / 2)));

  static FASTSEQ_HOST_DEVICE V widened(H half) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
#elif defined(__AVX2__)
    return (V)_mm256_cvtph_ps((__m128i)half);
#else
    const U bits = __builtin_convertvector(half, U), magnitude = bits & 0x7fff;
    const U normal = (magnitude << 13) + (magnitude < kInfinity ? U{} + kRebias : U{} + 2 * kRebias);
    // of a subnormal number, the units of 2^-24 are the last bits of 1/2 and more
    const V subnormal = (V)(magnitude + kHalf) - 0.5f;
    return (V)((magnitude < kNormal ? (U)subnormal : normal) | (bits & 0x8000) << 16);
#endif
  }

  static FASTSEQ_HOST_DEVICE H narrowed(V v) {
#if defined(__AVX512F__)
    return (H)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const U bits = (U)v, magnitude = bits & 0x7fffffff;
    const U normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) - kRebias) >> 13;  // carries into the exponent, to infinity at most
    const U subnormal = (U)((V)magnitude + 0.5f) - kHalf;
    const U finite = magnitude < kRebias + (kNormal << 13) ? subnormal : magnitude < kTooLarge ? normal : U{} + kInfinity;
    return __builtin_convertvector((v == v ? finite : U{} + 0x7e00) | (bits >> 16 & 0x8000), H);
#endif
  }

 private:
  static constexpr uint32_t kInfinity = 0x7c00, kNormal = 0x400;  // as binary16: infinity, the smallest normal number
  static constexpr uint32_t kRebias = 112u << 23;                 // between the exponents of fp32 and binary16
  static constexpr uint32_t kHalf = 0x3f000000, kTooLarge = 0x47800000;  // as fp32: 1/2, 2^16
};

template <class S>
  requires(sizeof(S) == 2)
struct Memory<S, float> : Halves<S> {
  using V = Lanes<float>::V;
  using typename Halves<S>::H;
  using Halves<S>::narrowed, Halves<S>::widened;
  static constexpr int kWidth = sizeof(V) / sizeof(float);

  static FASTSEQ_HOST_DEVICE V load(const S* p, int64_t n) {
    if (n < kWidth) return widened(load_head<H>(&p->bits, n));
    H half;
    __builtin_memcpy(&half, p, sizeof(H));
    return widened(half);
  }

  static FASTSEQ_HOST_DEVICE void store(S* p, V v, int64_t n) {
    const H half = narrowed(v);
    if (n < kWidth) return store_head(&p->bits, half, n);
    __builtin_memcpy(p, &half, sizeof(H));
  }

  static FASTSEQ_HOST_DEVICE V rounded(V v) { return widened(narrowed(v)); }
};

// Masks: one where true, else zero.
template <class A>
struct Memory<bool, A> {
  using V = typename Lanes<A>::V;
  using B = typename Lanes<A>::B;
  static constexpr int kWidth = sizeof(V) / sizeof(A);

  static FASTSEQ_HOST_DEVICE V load(const bool* p, int64_t n) {
    const auto* given = (const uint8_t*)p;
    if (n < kWidth) return __builtin_convertvector(load_head<B>(given, n), V);
    B bytes;
    __builtin_memcpy(&bytes, given, sizeof(B));
    return __builtin_convertvector(bytes, V);
  }
};
