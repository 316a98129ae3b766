// Products by multiply-adds. Included inside the namespace of an instruction set, after product_blocks.inl.

// Of values of type A in blocks of sums.
template <class A_>
struct Values {
  using A = A_;
  using V = typename Lanes<A>::V;
  using Factor = A;
  using Vector = V;
  using Activations = Math<A>;
  using FewActivations = Activation<A>;
  static constexpr int64_t W = Math<A>::kWidth;

  // The left-hand matrix. Rows are a line further apart than they need: a power of two would put those of a block into one cache set.
  class Matrix {
   public:
    Matrix() = default;
    Matrix(void* memory, int64_t columns) : data_(static_cast<A*>(memory)), stride_(stride_of(columns)) {}
    static int64_t bytes(int64_t rows, int64_t columns) { return rows * stride_of(columns) * sizeof(A); }

    const A* row(int64_t r) const { return data_ + r * stride_; }
    int64_t stride() const { return stride_; }
    const A* factors(int64_t r) const { return row(r); }
    int64_t factors_stride() const { return stride_; }
    V load(int64_t r, int64_t u) const { return *(const V*)(row(r) + u); }
    template <class S>
    void store(int64_t r, int64_t u, V v, int64_t n) const {
      Memory<A, A>::store(data_ + r * stride_ + u, Memory<S, A>::rounded(v), n);
    }
    // a row of a tensor
    template <class S>
    void put(int64_t r, const S* from, int64_t columns) const {
      A* to = data_ + r * stride_;
      for (int64_t j = 0; j < columns; j += W) Memory<A, A>::store(to + j, Memory<S, A>::load(from + j, columns - j), columns - j);
    }
    void copy(int64_t r, const Matrix& from, int64_t columns) const {
      __builtin_memcpy(data_ + r * stride_, from.row(r), columns * sizeof(A));
    }
    // zeroes what is loaded, though never used, beyond the columns
    void clear_rest(int64_t rows, int64_t columns) const {
      for (int64_t r = 0; r < rows; ++r) __builtin_memset(data_ + r * stride_ + columns, 0, (stride_ - columns) * sizeof(A));
    }
    void prefetch(int64_t rows) const {
      for (int64_t i = 0; i < rows * stride_; i += 64 / sizeof(A)) __builtin_prefetch(data_ + i, 0, 3);
    }

   private:
    static int64_t stride_of(int64_t columns) {
      constexpr int64_t line = 64 / sizeof(A);
      return blocks_of(columns, line) * line + line;
    }
    A* data_ = nullptr;
    int64_t stride_ = 0;
  };

  static int64_t factors_of(int64_t depth) { return depth; }

  // Subtracting zero is nothing, so that one load remains; adding it, which turns -0 into 0, would take two of the ports that multiply.
  static FASTSEQ_HOST_DEVICE V broadcast(A a) { return a - V{}; }
  static FASTSEQ_HOST_DEVICE V add(V sum, V value, V weight) { return sum + value * weight; }
};

template <class A_>
struct MultiplyAdd : BlockProduct<Values<A_>> {
  using Blocks = BlockProduct<Values<A_>>;
  using typename Blocks::A, typename Blocks::V;
  using Blocks::W, Blocks::place;

  MultiplyAdd(int64_t, bool) {}

  // of weights [vectors*W rows, depth], rows given by row(vector, lane) or null: transposed
  template <class S, class Row>
  static void pack_transposed(int64_t vectors, int64_t depth, void* packed, const Row& row) {
    A* to = static_cast<A*>(packed);
    for (int64_t v = 0; v < vectors; ++v) {  // W rows from end to end: as many as are well fetched ahead
      const S* from[W];
      for (int64_t j = 0; j < W; ++j) from[j] = row(v, j);
      for (int64_t k0 = 0; k0 < depth; k0 += W) {  // W x W squares: whole cache lines on either side
        V square[W];
        for (int64_t j = 0; j < W; ++j) {
          square[j] = V{};
          if (!from[j]) continue;
          square[j] = Memory<S, A>::load(from[j] + k0, depth - k0);
          __builtin_prefetch(reinterpret_cast<const char*>(from[j] + k0) + 4 * sizeof(V), 0, 3);
        }
        transpose<W / 2, W>(square);
        for (int64_t k = 0; k < min(W, depth - k0); ++k) *(V*)(to + place(k0 + k, v, vectors, depth)) = square[k];
      }
    }
  }

  // of weights [depth, columns], as they lie
  template <class S>
  static void pack(int64_t vectors, int64_t depth, int64_t columns, int64_t stride, const S* from, void* packed) {
    A* to = static_cast<A*>(packed);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t v = 0; v < vectors; ++v)
        *(V*)(to + place(k, v, vectors, depth)) = Memory<S, A>::load(from + k * stride + v * W, columns - v * W);
  }
};
