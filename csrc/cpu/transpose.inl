// Squares of registers, and small numbers. Included inside the namespace of an instruction set, after vector.inl.

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Transposes a W x W square in registers: exchanges its off-diagonal quarters of S x S, then those of each quarter, and so on.
template <int S, int W, class V>
FASTSEQ_HOST_DEVICE void transpose(V* square) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      const V a = square[i], b = square[i + S];
      [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
        square[i] = __builtin_shufflevector(a, b, (J & S ? W + J - S : J)...);
        square[i + S] = __builtin_shufflevector(a, b, (J & S ? W + J : J + S)...);
      }(std::make_integer_sequence<int, W>());
    }
    transpose<S / 2, W>(square);
  }
}
