// Products by multiply-adds: sums[row][vector] = rows x a tile of weights, the sums of a block of rows in registers.
// Included inside the namespace of an instruction set, after vector.inl.

template <class A_>
struct MultiplyAdd {
  using A = A_;
  using V = typename Lanes<A>::V;
  using Activations = Math<A>;
  static constexpr int64_t W = Math<A>::kWidth;
  static constexpr bool kInterleaves = false;
  static constexpr bool kWatched = false;
  static constexpr bool kTakesRows = false;
  static constexpr int64_t kChunkRows = 32;  // more of them, with their gates, displace the recurrent weights
  // So many rows multiply the input weights in the same passes, whatever their size: each weight is fetched once a step. With fewer, or
  // with gates that do not add the input, steps are projected together.
  static constexpr bool kFusesAll = false;
  static constexpr int64_t kFusedRows = 16, kFusedBytes = INT64_MAX;
  static constexpr int64_t kMostRows = 48;  // of one product: with a run of weights, their sums and their operands stay in the first cache

  // The left-hand matrix. Rows are a line further apart than they need: a power of two would put those of a block into one cache set.
  class Matrix {
   public:
    Matrix() = default;
    Matrix(void* memory, int64_t columns) : data_(static_cast<A*>(memory)), stride_(stride_of(columns)) {}
    static int64_t bytes(int64_t rows, int64_t columns) { return rows * stride_of(columns) * sizeof(A); }

    const A* row(int64_t r) const { return data_ + r * stride_; }
    int64_t stride() const { return stride_; }
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

  MultiplyAdd(int64_t, bool) {}
  int64_t block(int64_t rows) const { return blocks_of(rows, blocks_of(rows, kMostRows)); }

  static int64_t tile_bytes(int64_t vectors, int64_t depth) { return vectors * W * depth * sizeof(A); }

  // The tile lies in panels, [panels][depth][vectors of a panel][W]. Each is walked once, in runs, and a run stays in the first cache while
  // every block of rows is multiplied. Few rows take all panels at once: what sums there are must not wait for one another. Sums start
  // as given. The last block of a run fetches the next run, and at the end of the tile, what comes next.
  template <class Aside>
  void multiply(const Matrix& rows, int64_t begin, int64_t count, const void* packed, int64_t vectors, int64_t depth, Start<A> start,
                A* sums, const void* next, Aside&&) const {
    const int64_t stride = vectors * W, inner = panel_of(vectors), width = count <= kFewRows ? vectors : inner;
    const int64_t blocks = blocks_of(count, rows_of_block(width));
    const A* tile = static_cast<const A*>(packed);
    for (int64_t v = 0; v < vectors; v += width, tile += width * depth * W) {
      const int64_t given = max(0, min(width, start.vectors - v));
      for (int64_t k = 0; k < depth; k += kRun) {
        const int64_t run = min(kRun, depth - k);
        const bool ends = v + width == vectors && k + run == depth;
        const A* after = blocks == 1 ? tile + kAhead : ends ? static_cast<const A*>(next) - k * inner * W : tile + run * inner * W;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t r = count * b / blocks, n = count * (b + 1) / blocks - r;
          A* to = sums + r * stride + v * W;
          const Start<A> from = k ? Start<A>{to, stride, width} : Start<A>{start.rows + r * start.stride + v * W, start.stride, given};
          const A* ahead = b == blocks - 1 ? after : tile;
          kernel_of(n, width)({rows.row(begin + r), rows.stride(), tile, ahead, depth, k, k + run, from, to, stride});
        }
      }
    }
  }

  // The same with a second product in the same sums: that of the input, which comes first.
  template <class Weights, class Aside>
  void multiply_both(const Matrix& rows, int64_t begin, const Weights& weights, int64_t count, int64_t vectors, A* sums,
                     Aside&& aside) const {
    multiply(*weights.inputs, weights.input_row + begin, count, weights.packed_input, vectors, weights.input_depth, weights.start, sums,
             weights.packed, aside);
    multiply(rows, begin, count, weights.packed, vectors, weights.depth, {sums, vectors * W, vectors}, sums, weights.next, aside);
  }

  // of weights [vectors*W rows, depth], rows given by row(vector, lane) or null: transposed
  template <class S, class Row>
  static void pack_transposed(int64_t vectors, int64_t depth, void* packed, const Row& row) {
    A* to = static_cast<A*>(packed);
    for (int64_t k0 = 0; k0 < depth; k0 += W)  // W x W squares: whole cache lines on either side
      for (int64_t v = 0; v < vectors; ++v) {
        V square[W];
        for (int64_t j = 0; j < W; ++j) {
          const S* from = row(v, j);
          square[j] = from ? Memory<S, A>::load(from + k0, depth - k0) : V{};
        }
        transpose<W / 2, W>(square);
        for (int64_t k = 0; k < min(W, depth - k0); ++k) *(V*)(to + place(k0 + k, v, vectors, depth)) = square[k];
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

 private:
  // Products are summed in runs of this many, and the runs then added up: a sum of n terms loses about sqrt(n) roundings.
  static constexpr int64_t kRun = 128;
  static constexpr int64_t kMostOfBlock = 14, kFewRows = 3;
  static constexpr int64_t kAhead = 2048 / sizeof(A);  // of a single block: elements between a product and the fetching of its weights

  // The sums fill the registers, but for what a product needs beside them: with 32 registers a tile row and a broadcast value, with 16
  // one of either.
  static constexpr int64_t rows_of_block(int64_t vectors) {
    return FASTSEQ_VECTOR_REGISTERS == 32 ? min(kMostOfBlock, (32 - 2 - vectors) / vectors) : min(kMostOfBlock, 12 / vectors);
  }
  static_assert(rows_of_block(4) >= kFewRows);

  // Vectors of a panel: with 32 registers two, so that a block has many rows and a run many depths.
  static constexpr int64_t panel_of(int64_t vectors) { return FASTSEQ_VECTOR_REGISTERS == 32 && vectors == 4 ? 2 : vectors; }

  // where the vector v of a depth lies in a tile
  static FASTSEQ_HOST_DEVICE int64_t place(int64_t k, int64_t v, int64_t vectors, int64_t depth) {
    const int64_t panel = panel_of(vectors);
    return (v / panel * depth * panel + k * panel + v % panel) * W;
  }

  // Subtracting zero is nothing, so that one load remains; adding it, which turns -0 into 0, would take two of the ports that multiply.
  static FASTSEQ_HOST_DEVICE V broadcast(A a) { return a - V{}; }

  // sums[r][v] += rows[r] x the depths [begin, end) of a panel, or of a whole tile
  struct Block {
    const A* rows;
    int64_t stride;
    const A *tile, *after;  // fetched ahead: what lies at the same depths after `after`
    int64_t depth, begin, end;
    Start<A> start;
    A* sums;
    int64_t sums_stride;
  };
  using Kernel = void (*)(const Block&);
  template <int N>
  struct Kernels {
    Kernel of_rows[N];
  };

  template <int RB, int NV>
  static void kernel(const Block& block) {
    const auto [rows, stride, tile, after, depth, begin, end, start, sums, sums_stride] = block;
    // few sums would wait for one another: then interleaved sets, over depths modulo their number
    constexpr int SETS = RB * NV <= 4 ? 4 : RB * NV < 8 ? 2 : 1;
    V sum[SETS][RB][NV];
#pragma GCC unroll 4
    for (int s = 0; s < SETS; ++s)
#pragma GCC unroll 16
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[s][r][v] = V{};
    int64_t k = begin;
    for (; k + SETS <= end; k += SETS) {
#pragma GCC unroll 4
      for (int s = 0; s < SETS; ++s) {
        V weight[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          weight[v] = *(const V*)(tile + place(k + s, v, NV, depth));
          if constexpr (RB > 1) __builtin_prefetch(after + place(k + s, v, NV, depth), 0, 3);
        }
#pragma GCC unroll 16
        for (int r = 0; r < RB; ++r) {
          const V value = broadcast(rows[r * stride + k + s]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) sum[s][r][v] += value * weight[v];
        }
      }
    }
    for (; k < end; ++k)
#pragma GCC unroll 16
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[0][r][v] += broadcast(rows[r * stride + k]) * *(const V*)(tile + place(k, v, NV, depth));
#pragma GCC unroll 16
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if (SETS == 4) sum[0][r][v] += sum[SETS / 2][r][v], sum[SETS / 4][r][v] += sum[SETS - 1][r][v];
        if (SETS > 1) sum[0][r][v] += sum[SETS > 2 ? 1 : SETS - 1][r][v];
        if (v < start.vectors) sum[0][r][v] += *(const V*)(start.rows + r * start.stride + v * W);
        *(V*)(sums + r * sums_stride + v * W) = sum[0][r][v];
      }
  }

  // [rows - 1]: kernels of up to as many rows as a block has
  template <int NV>
  static Kernel kernel_of_rows(int64_t rows) {
    static constexpr auto kernels = []<int... R>(std::integer_sequence<int, R...>) {
      return Kernels<sizeof...(R)>{{kernel<R + 1, NV>...}};
    }(std::make_integer_sequence<int, rows_of_block(NV)>());
    return kernels.of_rows[rows - 1];
  }

  static Kernel kernel_of(int64_t rows, int64_t vectors) {
    switch (vectors) {
      case 1: return kernel_of_rows<1>(rows);
      case 2: return kernel_of_rows<2>(rows);
      case 3: return kernel_of_rows<3>(rows);
      default: return kernel_of_rows<4>(rows);
    }
  }
};
