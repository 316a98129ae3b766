// Products by blocks of sums in registers: sums[row][vector] = rows x a tile of weights. What is multiplied, and how it lies in memory,
// say product_fma.inl and product_pairs.inl.
// Included inside the namespace of an instruction set, after vector.inl.

// Factors: what a lane multiplies at once, a Factor, is a value, or a pair of values at neighboring depths. Depths are counted in factors
// here.
template <class Factors>
struct BlockProduct {
  using A = typename Factors::A;
  using V = typename Lanes<A>::V;
  using Factor = typename Factors::Factor;
  using Vector = typename Factors::Vector;  // of factors
  using Matrix = typename Factors::Matrix;
  using Activations = typename Factors::Activations;
  using FewActivations = typename Factors::FewActivations;
  static constexpr int64_t W = Math<A>::kWidth;
  static constexpr bool kInterleaves = false;
  static constexpr bool kWatched = false;
  static constexpr bool kTakesRows = false;
  static constexpr bool kHasFew = FASTSEQ_VECTOR_REGISTERS == 32;
  static constexpr int64_t kFewRows = 3;  // which take all panels of a tile at once
  static constexpr int64_t kChunkRows = 32;  // more of them, with their gates, displace the recurrent weights
  // So many rows multiply the input weights in the same passes, whatever their size: each weight is fetched once a step. With fewer, or
  // with gates that do not add the input, steps are projected together.
  static constexpr bool kFusesAll = false;
  static constexpr int64_t kFusedRows = 16, kFusedBytes = INT64_MAX;
  static constexpr int64_t kMostRows = 48;  // of one product: with a run of weights, their sums and their operands stay in the first cache

  int64_t block(int64_t rows) const { return blocks_of(rows, blocks_of(rows, kMostRows)); }

  static int64_t tile_bytes(int64_t vectors, int64_t depth) { return vectors * W * Factors::factors_of(depth) * sizeof(Factor); }

  // The tile lies in panels, [panels][depth][vectors of a panel][W]. Each is walked once, in runs, and a run stays in the first cache while
  // every block of rows is multiplied. Few rows take all panels at once: what sums there are must not wait for one another. Sums start
  // as given. The last block of a run fetches the next run, and at the end of the tile, what comes next.
  template <class Aside>
  void multiply(const Matrix& rows, int64_t begin, int64_t count, const void* packed, int64_t vectors, int64_t depth, Start<A> start,
                A* sums, const void* next, Aside&&) const {
    depth = Factors::factors_of(depth);
    const int64_t stride = vectors * W, inner = panel_of(vectors), width = count <= kFewRows ? vectors : inner;
    const int64_t blocks = blocks_of(count, rows_of_block(width));
    const Factor* tile = static_cast<const Factor*>(packed);
    for (int64_t v = 0; v < vectors; v += width, tile += width * depth * W) {
      const int64_t given = max(0, min(width, start.vectors - v));
      for (int64_t k = 0; k < depth; k += kRun) {
        const int64_t run = min(kRun, depth - k);
        const bool ends = v + width == vectors && k + run == depth;
        const Factor* after = blocks == 1 ? tile + kAhead
                              : ends      ? static_cast<const Factor*>(next) - k * inner * W
                                          : tile + run * inner * W;
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t r = count * b / blocks, n = count * (b + 1) / blocks - r;
          A* to = sums + r * stride + v * W;
          const Start<A> from = k ? Start<A>{to, stride, width} : Start<A>{start.rows + r * start.stride + v * W, start.stride, given};
          const Factor* ahead = b == blocks - 1 ? after : tile;
          kernel_of(n, width)({rows.factors(begin + r), rows.factors_stride(), tile, ahead, depth, k, k + run, from, to, stride});
        }
      }
    }
  }

  // The same of few rows. Before a run of some length comes beside(first, second): whether it is a piece of another product, which fetches
  // the run's first half from where its panels begin.
  template <class Beside>
  void multiply_few(const Matrix& rows, int64_t count, const void* packed, int64_t vectors, int64_t depth, Start<A> start, A* sums,
                    const Beside& beside) const {
    depth = Factors::factors_of(depth);
    const int64_t stride = vectors * W, inner = panel_of(vectors);
    const Factor* tile = static_cast<const Factor*>(packed);
    for (int64_t k = 0; k < depth; k += kRun) {
      const int64_t run = min(kRun, depth - k);
      const bool fetched = run >= kFetched && beside(tile + k * inner * W, tile + (depth + k) * inner * W) && run == kRun;
      const Start<A> from = k ? Start<A>{sums, stride, vectors} : Start<A>{start.rows, start.stride, min(vectors, start.vectors)};
      const Block block{rows.factors(0), rows.factors_stride(), tile, tile + kAhead, depth, k, k + run, from, sums, stride};
      if (fetched && vectors == 4)
        kernel<1, 4, Form::kAfterPiece>(block);
      else if (fetched && vectors == 3)
        kernel<1, 3, Form::kAfterPiece>(block);
      else
        kernel_of(count, vectors)(block);
    }
  }

  // The product of a tile of NV vectors in pieces, one for each block of rows, panel and short run, which run between the products of a
  // single row with other weights: these come from the second-level cache half as fast as they could be multiplied, while a piece
  // multiplies what the first one holds. So it fetches the first half of the run after it, of its panels, which takes as long as a piece.
  // Weights of so many bytes do: what is larger comes from further away, and pieces displace more of it (LSTM of 512 units).
  static constexpr int64_t kPiecesBytes = 1 << 20;
  static constexpr int64_t kPieceRows = 8, kPieceDepth = 32;
  template <int64_t NV>
  static int64_t pieces(int64_t depth) {
    return NV / panel_of(NV) * blocks_of(Factors::factors_of(depth), kPieceDepth);
  }
  // the runs of a product before which a piece may run
  static int64_t runs(int64_t depth) {
    depth = Factors::factors_of(depth);
    return depth / kRun + (depth % kRun >= kFetched);
  }
  // The i-th, of at most kPieceRows rows. What it fetches begins at `first` and, of a second panel, at `second`.
  template <int64_t NV>
  static void multiply_piece(int64_t i, const Matrix& rows, int64_t begin, int64_t count, const void* packed, int64_t depth, const A* bias,
                             A* sums, const void* first, const void* second) {
    constexpr int64_t width = panel_of(NV), stride = NV * W;
    depth = Factors::factors_of(depth);
    const int64_t runs = blocks_of(depth, kPieceDepth), v = i / runs * width, k = i % runs * kPieceDepth;
    A* to = sums + v * W;
    const Start<A> from = k ? Start<A>{to, stride, width} : Start<A>{bias + v * W, 0, width};
    const auto* tile = static_cast<const Factor*>(packed) + v * depth * W;
    kernel_of_rows<width, Form::kPiece>(count)({{rows.factors(begin), rows.factors_stride(), tile, static_cast<const Factor*>(first), depth,
                                                 k, min(k + kPieceDepth, depth), from, to, stride},
                                                static_cast<const Factor*>(width < NV ? second : first)});
  }

  // The same with a second product in the same sums: that of the input, which comes first.
  template <class Weights, class Aside>
  void multiply_both(const Matrix& rows, int64_t begin, const Weights& weights, int64_t count, int64_t vectors, A* sums,
                     Aside&& aside) const {
    multiply(*weights.inputs, weights.input_row + begin, count, weights.packed_input, vectors, weights.input_depth, weights.start, sums,
             weights.packed, aside);
    multiply(rows, begin, count, weights.packed, vectors, weights.depth, {sums, vectors * W, vectors}, sums, weights.next, aside);
  }

 protected:
  // Vectors of a panel: with 32 registers two, so that a block has many rows and a run many depths.
  static constexpr int64_t panel_of(int64_t vectors) { return FASTSEQ_VECTOR_REGISTERS == 32 && vectors == 4 ? 2 : vectors; }

  // where the vector v of a depth lies in a tile
  static FASTSEQ_HOST_DEVICE int64_t place(int64_t k, int64_t v, int64_t vectors, int64_t depth) {
    const int64_t panel = panel_of(vectors);
    return (v / panel * depth * panel + k * panel + v % panel) * W;
  }

 private:
  // Products are summed in runs of this many, and the runs then added up: a sum of n terms loses about sqrt(n) roundings.
  static constexpr int64_t kRun = 128;
  static constexpr int64_t kFetched = kRun / 2;  // depths of a run that a piece fetches
  static constexpr int64_t kMostOfBlock = 14;
  static constexpr int64_t kAhead = 2048 / sizeof(Factor);  // of a single block: factors between a product and the fetching of its weights

  // The sums fill the registers, but for what a product needs beside them: with 32 registers a tile row and a broadcast value, with 16
  // one of either.
  static constexpr int64_t rows_of_block(int64_t vectors) {
    return FASTSEQ_VECTOR_REGISTERS == 32 ? min(kMostOfBlock, (32 - 2 - vectors) / vectors) : min(kMostOfBlock, 12 / vectors);
  }
  static_assert(rows_of_block(4) >= kFewRows);

  // sums[r][v] += rows[r] x the depths [begin, end) of a panel, or of a whole tile
  struct Block {
    const Factor* rows;
    int64_t stride;
    const Factor *tile, *after;  // fetched ahead: what lies at the same depths after `after`
    int64_t depth, begin, end;
    Start<A> start;
    A* sums;
    int64_t sums_stride;
  };
  struct Piece : Block {
    const Factor* second;  // fetched ahead is what lies at `after` and here, in the order in which it lies
  };
  // what a kernel fetches ahead: what is multiplied after it, or a piece that run's first half, and the run its second one
  enum class Form { kPlain, kPiece, kAfterPiece };
  template <Form form>
  using Kernel = void (*)(const std::conditional_t<form == Form::kPiece, Piece, Block>&);
  template <int N, Form form>
  struct Kernels {
    Kernel<form> of_rows[N];
  };

  template <int RB, int NV, Form form = Form::kPlain>
  static void kernel(const std::conditional_t<form == Form::kPiece, Piece, Block>& block) {
    const auto [rows, stride, tile, after, depth, begin, end, start, sums, sums_stride] = static_cast<const Block&>(block);
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
        if constexpr (form == Form::kPiece) {
          constexpr int64_t kLines = kFetched * NV * sizeof(V) / 64 / kPieceDepth;
#pragma GCC unroll 8
          for (int64_t line = 0; line < kLines; ++line) {
            const int64_t ahead = ((k + s - begin) * kLines + line) * (64 / sizeof(Factor));
            __builtin_prefetch(after + ahead, 0, 3);
            if (NV == 2) __builtin_prefetch(block.second + ahead, 0, 3);  // a panel of two
          }
        } else if constexpr (form == Form::kAfterPiece) {
          if (s % 2 == 0)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) __builtin_prefetch(tile + place(begin + kFetched + (k - begin + s) / 2, v, NV, depth), 0, 3);
        }
        Vector weight[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          weight[v] = *(const Vector*)(tile + place(k + s, v, NV, depth));
          if constexpr (RB > 1 && form == Form::kPlain) __builtin_prefetch(after + place(k + s, v, NV, depth), 0, 3);
        }
#pragma GCC unroll 16
        for (int r = 0; r < RB; ++r) {
          const Vector value = Factors::broadcast(rows[r * stride + k + s]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) sum[s][r][v] = Factors::add(sum[s][r][v], value, weight[v]);
        }
      }
    }
    for (; k < end; ++k)
#pragma GCC unroll 16
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          sum[0][r][v] =
              Factors::add(sum[0][r][v], Factors::broadcast(rows[r * stride + k]), *(const Vector*)(tile + place(k, v, NV, depth)));
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

  // [rows - 1]: kernels of up to as many rows as a block, or a piece, has
  template <int NV, Form form = Form::kPlain>
  static Kernel<form> kernel_of_rows(int64_t rows) {
    static constexpr auto kernels = []<int... R>(std::integer_sequence<int, R...>) {
      return Kernels<sizeof...(R), form>{{kernel<R + 1, NV, form>...}};
    }(std::make_integer_sequence<int, form == Form::kPiece ? kPieceRows : rows_of_block(NV)>());
    return kernels.of_rows[rows - 1];
  }

  static Kernel<Form::kPlain> kernel_of(int64_t rows, int64_t vectors) {
    switch (vectors) {
      case 1: return kernel_of_rows<1>(rows);
      case 2: return kernel_of_rows<2>(rows);
      case 3: return kernel_of_rows<3>(rows);
      default: return kernel_of_rows<4>(rows);
    }
  }
};
