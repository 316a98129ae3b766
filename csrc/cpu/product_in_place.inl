// Products with weights as PyTorch stores them, [columns, depth]: sums[row][column] = rows . weights[column]. For calls so short that
// packing the weights would cost more than it saves. Every weight is read once, in the order in which it lies; lanes run along the
// depth, and the sums of W products, of some rows and some columns, are added up across the lanes together.
// Included inside the namespace of an instruction set, after vector.inl.

template <>
struct Memory<int8_t, float> {
  using V = Lanes<float>::V;
  using B = Lanes<float>::B;
  typedef int8_t Signed __attribute__((vector_size(sizeof(B))));
  [[maybe_unused]] typedef int32_t Whole __attribute__((vector_size(sizeof(V))));
  static constexpr int kWidth = sizeof(V) / sizeof(float);

  static FASTSEQ_HOST_DEVICE V load(const int8_t* p, int64_t n) {
    B bytes;
    if (n < kWidth)
      bytes = load_head<B>((const uint8_t*)p, n);
    else
      __builtin_memcpy(&bytes, p, sizeof(B));
#if FASTSEQ_VECTOR_BYTES == 64  // the compiler widens fourfold element by element
    return __builtin_convertvector((Whole)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)bytes), V);
#elif FASTSEQ_VECTOR_BYTES == 32
    return __builtin_convertvector((Whole)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)bytes)), V);
#else
    return __builtin_convertvector((Signed)bytes, V);
#endif
  }
};

// Calls body.template operator()<T>() for the type of weights kept beside the parameters of type S.
template <class S, class F>
FASTSEQ_HOST_DEVICE void with_stored([[maybe_unused]] Stored stored, F&& body) {
  if constexpr (std::is_same_v<S, float>) {
    if (stored == Stored::kBfloat16) return body.template operator()<bfloat16>();
    if (stored == Stored::kInt8) return body.template operator()<int8_t>();
  }
  body.template operator()<S>();
}

// How many values of a row and of weights, of types X and S, are multiplied at once, and how.
template <class A, class X, class S>
struct Terms {
  using V = typename Lanes<A>::V;
  using Row = V;
  using Column = V;
  static constexpr int64_t kDepth = Math<A>::kWidth;
  static FASTSEQ_HOST_DEVICE V row(const X* p, int64_t n) { return Memory<X, A>::load(p, n); }
  static FASTSEQ_HOST_DEVICE V column(const S* p, int64_t n) { return Memory<S, A>::load(p, n); }
  static FASTSEQ_HOST_DEVICE V add(V sum, V row, V column) { return sum + row * column; }
};
#if defined(FASTSEQ_PAIRS)
template <>
struct Terms<float, bfloat16, bfloat16> : Pairs {
  using Row = Vector;
  using Column = Vector;
  static constexpr int64_t kDepth = 2 * W;
  static FASTSEQ_HOST_DEVICE Vector row(const bfloat16* p, int64_t n) { return load(p, n); }
  static FASTSEQ_HOST_DEVICE Vector column(const bfloat16* p, int64_t n) { return load(p, n); }
};
#endif

template <class A>
struct InPlace {
  using V = typename Lanes<A>::V;
  static constexpr int64_t W = Math<A>::kWidth;

  // W columns: column(j) is the row of weights of the j-th, of depth values. give(r, first, count, values): the sums of columns
  // first .. first + count of row r, in values[0 .. count). X and S are the types of rows and weights.
  template <class X, class S, class Column, class Give>
  static FASTSEQ_HOST_DEVICE void multiply(const X* rows, int64_t stride, int64_t count, int64_t depth, const Column& column,
                                           const Give& give) {
    int64_t r = 0;
    if constexpr (W >= 4)
      for (; r + 4 <= count; r += 4) block<4, X, S>(rows, stride, r, depth, column, give);
    for (; r + 2 <= count; r += 2) block<2, X, S>(rows, stride, r, depth, column, give);
    if (r < count) block<1, X, S>(rows, stride, r, depth, column, give);
  }

 private:
  template <int R, class X, class S, class Column, class Give>
  static FASTSEQ_HOST_DEVICE void block(const X* rows, int64_t stride, int64_t r, int64_t depth, const Column& column,
                                        const Give& give) {
    constexpr int64_t C = W / R;  // columns at a time: W sums
    for (int64_t j = 0; j < W; j += C) {
      const S* from[C];
      for (int64_t c = 0; c < C; ++c) from[c] = column(j + c);
      V sums[W];
      products<R, X, S>(rows + r * stride, stride, from, depth, sums);
      const V values = added_up<W / 2>(sums);
#pragma GCC unroll 4
      for (int64_t i = 0; i < R; ++i) give(r + i, j, C, reinterpret_cast<const A*>(&values) + i * C);
    }
  }

  // Columns that are read side by side: where rows of weights are whole pages apart, the lines under way all belong into one set of the
  // first-level cache, which has places for eight (H = 1024, a row: 16 columns took 1.4 times as long).
  static constexpr int64_t kTogether = 8;

  // sums[row * C + column], each still W partial ones
  template <int R, class X, class S>
  static __attribute__((noinline)) void products(const X* rows, int64_t stride, const S* const* columns, int64_t depth, V* sums) {
    using T = Terms<A, X, S>;
    constexpr int64_t C = W / R, N = C < kTogether ? C : kTogether;
    for (int64_t first = 0; first < C; first += N) {
      V sum[R][N];
      typename T::Row value[R];
#pragma GCC unroll 16
      for (int64_t i = 0; i < R * N; ++i) sum[i / N][i % N] = V{};
      int64_t k = 0;
      const auto add = [&](int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < R; ++i) value[i] = T::row(rows + i * stride + k, n);
#pragma GCC unroll 16
        for (int64_t c = 0; c < N; ++c) {
          const typename T::Column weight = T::column(columns[first + c] + k, n);
#pragma GCC unroll 4
          for (int64_t i = 0; i < R; ++i) sum[i][c] = T::add(sum[i][c], value[i], weight);
        }
      };
      for (; k + T::kDepth <= depth; k += T::kDepth) add(T::kDepth);
      if (k < depth) add(depth - k);
#pragma GCC unroll 16
      for (int64_t i = 0; i < R * N; ++i) sums[i / N * C + first + i % N] = sum[i / N][i % N];
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
