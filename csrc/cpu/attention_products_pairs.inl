// Products of attention's tiles by vectors, of pairs of bfloat16 (AVX512-BF16). Included by attention_tiles.inl.

struct Multiplier {
  static constexpr bool kVectors = true;
  // Keys whose scores and gradients are formed, backward, before they become operands: both stay in the first-level cache, beside what they are
  // the product of.
  static constexpr int64_t kStep = 32;
  // Queries of a block, backward, where a causal mask hides keys: half of the others', which follow its edge less closely.
  static constexpr int64_t kCausalLanes = 32;
};

// c[row][column] of eight rows and N vectors of columns: sums over 16 pairs of a step of the depth, step by step; the steps of the right-hand
// matrix lie behind one another. What is added to is loaded at the end, when nothing waits for it. Few addresses, and a function of its own:
// else the compiler keeps some in vector registers, and what waits for one of these waits for all the products before.
template <int N, bool kAdd>
[[gnu::noinline]] void multiply_pairs(const char* left, int64_t a_row, const char* right, int64_t b_tile, int64_t a_depth, int64_t depths,
                                      char* c, int64_t c_row) {
  constexpr int64_t kPairs = kTileDepth / 2, kBytes = 4;  // of a row of a step, of a pair
  constexpr int M = 8;
  __m512 sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  const char* lower = left + M / 2 * a_row;
  int64_t three = 3 * a_row;
  asm("" : "+r"(lower), "+r"(three));  // not to be formed from others again
  for (int64_t k = 0; k < depths; ++k, left += a_depth - kPairs * kBytes, lower += a_depth - kPairs * kBytes)
    for (int64_t p = 0; p < kPairs; ++p, left += kBytes, lower += kBytes, right += 64) {
      __m512bh of_columns[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) of_columns[n] = (__m512bh)_mm512_loadu_si512(right + n * b_tile);
      const auto multiply = [&](int m, const char* at) __attribute__((always_inline)) {
        int32_t pair;
        __builtin_memcpy(&pair, at, sizeof pair);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)_mm512_set1_epi32(pair), of_columns[n]);
      };
      multiply(0, left), multiply(1, left + a_row), multiply(2, left + 2 * a_row), multiply(3, left + three);
      multiply(4, lower), multiply(5, lower + a_row), multiply(6, lower + 2 * a_row), multiply(7, lower + three);
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      char* const to = c + m * c_row + n * 64;
      _mm512_storeu_ps(to, kAdd ? _mm512_add_ps(sums[m][n], _mm512_loadu_ps(to)) : sums[m][n]);
    }
}

// c [rows][columns], in tiles, is the product, or is added to it; c_row in bytes.
template <bool kAdd, int kParts = 1, bool kStreams = false>
void multiply_tiles(const TileMatrix& a, int64_t rows, const TileMatrix& b, int64_t columns, int64_t depths, float* c, int64_t c_row) {
  static_assert(kParts == 1);
  for (int64_t m = 0; m < rows * kTileRows; m += 8) {
    const char *left = a.data + m / kTileRows * a.tile + m % kTileRows * a.row, *right = b.data;
    char* to = reinterpret_cast<char*>(c) + m * c_row;
    int64_t n = 0;
    for (; n + 2 <= columns; n += 2, right += 2 * b.tile, to += 2 * 64)
      multiply_pairs<2, kAdd>(left, a.row, right, b.tile, a.depth, depths, to, c_row);
    if (n < columns) multiply_pairs<1, kAdd>(left, a.row, right, b.tile, a.depth, depths, to, c_row);
  }
}

// Two by two tiles of a product, [32][32] numbers behind one another, and what they are the product of.
struct Square {
  TileMatrix left, right;
  int64_t depths = 0;  // 0: there is none
  float* to = nullptr;

  // Calls between() as often as there are steps of the depth. Vectors that multiply leave nothing idle for others.
  template <class Between>
  FASTSEQ_HOST_DEVICE void multiply(const Between& between) const {
    if (depths) multiply_tiles<false>(left, 2, right, 2, depths, to, 2 * 64);
    for (int64_t k = 0; k < depths; ++k) between();
  }
};
