// Products of bfloat16 by AVX512-BF16: a lane multiplies a pair of values with a pair of weights, and adds both products to a sum of fp32.
// AMD's processors do so at twice the rate of their multiply-adds. The instruction takes and gives zero for subnormal numbers.
// Included inside the namespace of an instruction set, after product_blocks.inl and short_products.inl.

// Pairs of neighboring columns of a row, and of neighboring depths of the weights.
struct Pairs {
  using A = float;
  using V = Lanes<float>::V;
  typedef uint32_t Factor __attribute__((may_alias));
  typedef uint32_t Vector __attribute__((vector_size(FASTSEQ_VECTOR_BYTES), may_alias));
  using Activations = ShortProducts;
  using FewActivations = Activations;
  using Half = Memory<bfloat16, float>;
  using H = Half::H;
  static constexpr int64_t W = Math<float>::kWidth;

  // The left-hand matrix, zero beyond its columns up to a whole pair. Rows are a line further apart than they need: a power of two would
  // put those of a block into one cache set.
  class Matrix {
   public:
    Matrix() = default;
    Matrix(void* memory, int64_t columns) : data_(static_cast<bfloat16*>(memory)), stride_(stride_of(columns)) {}
    static int64_t bytes(int64_t rows, int64_t columns) { return rows * stride_of(columns) * sizeof(bfloat16); }

    bfloat16* row(int64_t r) const { return data_ + r * stride_; }
    int64_t stride() const { return stride_; }
    const Factor* factors(int64_t r) const { return (const Factor*)row(r); }
    int64_t factors_stride() const { return stride_ / 2; }
    V load(int64_t r, int64_t u) const { return Half::load(row(r) + u, W); }
    template <class>
    void store(int64_t r, int64_t u, V v, int64_t n) const {
      Half::store(row(r) + u, v, n);
    }
    void put(int64_t r, const bfloat16* from, int64_t columns) const {
      __builtin_memcpy(row(r), from, columns * sizeof(bfloat16));
    }
    void copy(int64_t r, const Matrix& from, int64_t columns) const { put(r, from.row(r), columns); }
    // zeroes what is multiplied beyond the columns
    void clear_rest(int64_t rows, int64_t columns) const {
      for (int64_t r = 0; r < rows; ++r) __builtin_memset((void*)(row(r) + columns), 0, (stride_ - columns) * sizeof(bfloat16));
    }
    void prefetch(int64_t rows) const {
      for (int64_t i = 0; i < rows * stride_; i += 32) __builtin_prefetch(data_ + i, 0, 3);
    }

   private:
    static int64_t stride_of(int64_t columns) { return blocks_of(columns, 32) * 32 + 32; }
    bfloat16* data_ = nullptr;
    int64_t stride_ = 0;
  };

  static int64_t factors_of(int64_t depth) { return blocks_of(depth, 2); }

  static FASTSEQ_HOST_DEVICE Vector broadcast(Factor pair) { return (Vector)_mm512_set1_epi32(pair); }
  static FASTSEQ_HOST_DEVICE V add(V sum, Vector value, Vector weight) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)value, (__m512bh)weight);
  }
  // a vector of a row, or its first n values
  static FASTSEQ_HOST_DEVICE Vector load(const bfloat16* p, int64_t n) {
    if (n < 2 * W) return (Vector)_mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p);
    return (Vector)_mm512_loadu_si512(p);
  }
};

struct MultiplyPairs : BlockProduct<Pairs> {
  MultiplyPairs(int64_t, bool) {}

  // of weights [vectors*W rows, depth], rows given by row(vector, lane) or null: pairs of depths, transposed
  template <class, class Row>
  static void pack_transposed(int64_t vectors, int64_t depth, void* packed, const Row& row) {
    const int64_t pairs = Pairs::factors_of(depth);
    auto* to = static_cast<Factor*>(packed);
    for (int64_t v = 0; v < vectors; ++v) {  // W rows from end to end: as many as are well fetched ahead
      const bfloat16* from[W];
      for (int64_t j = 0; j < W; ++j) from[j] = row(v, j);
      for (int64_t k0 = 0; k0 < pairs; k0 += W) {  // W x W squares: whole cache lines on either side
        Vector square[W];
        for (int64_t j = 0; j < W; ++j) {
          square[j] = Vector{};
          if (!from[j]) continue;
          square[j] = Pairs::load(from[j] + 2 * k0, depth - 2 * k0);
          __builtin_prefetch(reinterpret_cast<const char*>(from[j] + 2 * k0) + 4 * sizeof(Vector), 0, 3);
        }
        transpose<W / 2, W>(square);
        for (int64_t k = 0; k < min(W, pairs - k0); ++k) *(Vector*)(to + place(k0 + k, v, vectors, pairs)) = square[k];
      }
    }
  }

  // of weights [depth, columns]: pairs of rows, interleaved
  template <class>
  static void pack(int64_t vectors, int64_t depth, int64_t columns, int64_t stride, const bfloat16* from, void* packed) {
    typedef uint16_t Interleaved __attribute__((vector_size(64)));
    const int64_t pairs = Pairs::factors_of(depth);
    auto* to = static_cast<Factor*>(packed);
    for (int64_t k = 0; k < pairs; ++k)
      for (int64_t v = 0; v < vectors; ++v) {
        Pairs::H rows[2]{};
        for (int64_t i = 0; i < min(2, depth - 2 * k); ++i) {
          const bfloat16* row = from + (2 * k + i) * stride + v * W;
          if (columns - v * W < W)
            rows[i] = load_head<Pairs::H>(&row->bits, columns - v * W);
          else
            __builtin_memcpy(&rows[i], row, sizeof(Pairs::H));
        }
        *(Vector*)(to + place(k, v, vectors, pairs)) = (Vector)(Interleaved)__builtin_shufflevector(
            rows[0], rows[1], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
            15, 31);
      }
  }
};
