// Products of bfloat16 by AMX tiles: sums[row][vector] = rows x a tile of weights, summed in fp32.
// Included inside the namespace of an instruction set, after vector.inl and tiles.inl.

// S is what is stored: bfloat16, or float in three parts, which has to be watched.
template <class S>
struct TileProduct {
  using A = float;
  using V = Lanes<float>::V;
  static constexpr int kParts = sizeof(S) == sizeof(bfloat16) ? 1 : 3;
  using Activations = std::conditional_t<kParts == 1, ShortProducts, Math<float>>;
  using FewActivations = Activations;
  static constexpr int64_t W = 16;
  static constexpr bool kInterleaves = true;
  static constexpr bool kHasFew = false;
  static constexpr bool kWatched = kParts > 1;  // the operands have to stay within a range
  static constexpr bool kTakesRows = kParts == 1;
  static constexpr int64_t kMostRows = 32;  // two tiles of rows
  // Rows of input projected together: 128 rows of them and of their gates displace the recurrent weights, 32 fetch the input's too often
  // (LSTM of 256 units, 32 sequences: 6.8, 4.9 and 5.0 ms with 128, 64 and 32; of 512 units 27, 25 and 30).
  static constexpr int64_t kChunkRows = kParts == 1 ? 64 : 128;
  // Input weights that stay in the second-level cache beside the recurrent ones are multiplied in the same passes.
  static constexpr bool kFusesAll = true;
  static constexpr int64_t kFusedRows = 16, kFusedBytes = 1100 << 10;
  static constexpr int64_t kDepth = 32;     // of a tile
  static constexpr int64_t kTileBytes = 1024 * kParts;

  using Half = Memory<bfloat16, float>;
  using H = Half::H;

  // Whether rows of a tensor, `stride` elements apart, are multiplied as they lie: bfloat16, whole tiles that start at lines.
  static bool takes(const S* rows, int64_t columns, int64_t stride, int64_t count) {
    return columns % kDepth == 0 && (reinterpret_cast<uintptr_t>(rows) | stride * sizeof(S)) % 64 == 0 && count &&
           count % blocks_of(count, 16) == 0;
  }

  // 16 values, or the first n, in parts
  static FASTSEQ_HOST_DEVICE void load_parts(const S* p, int64_t n, H* parts) {
    if constexpr (kParts == 3)
      in_parts<kParts>(Memory<S, float>::load(p, n), parts);
    else if (n < W)
      parts[0] = load_head<H>(&p->bits, n);
    else
      __builtin_memcpy(parts, p, sizeof(H));
  }

  // The left-hand matrix, bfloat16, the parts of a row behind one another; zero beyond its columns up to a whole tile.
  class Matrix {
   public:
    Matrix() = default;
    Matrix(void* memory, int64_t columns)
        : data_(static_cast<bfloat16*>(memory)), depth_(blocks_of(columns, kDepth) * kDepth), stride_(depth_ * kParts) {}
    // rows that the product takes as they lie
    Matrix(const S* rows, int64_t columns, int64_t stride) : data_((bfloat16*)rows), depth_(columns), stride_(stride) {}
    // a tile of rows may reach beyond them
    static int64_t bytes(int64_t rows, int64_t columns) {
      return blocks_of(rows, 16) * 16 * blocks_of(columns, kDepth) * kDepth * kParts * sizeof(bfloat16);
    }

    bfloat16* row(int64_t r) const { return data_ + r * stride(); }
    int64_t stride() const { return stride_; }
    int64_t depth() const { return depth_; }
    V load(int64_t r, int64_t u) const {
      V v = Half::load(row(r) + u, W);
      if constexpr (kParts == 3) v += Half::load(row(r) + depth_ + u, W) + Half::load(row(r) + 2 * depth_ + u, W);
      return v;
    }
    template <class>
    void store(int64_t r, int64_t u, V v, int64_t n) const {
      H parts[kParts];
      in_parts<kParts>(v, parts);
      put_parts(r, u, parts, n);
    }
    void put(int64_t r, const S* from, int64_t columns) const {
      for (int64_t j = 0; j < columns; j += W) {
        H parts[kParts];
        load_parts(from + j, columns - j, parts);
        put_parts(r, j, parts, columns - j);
      }
      clear_beyond(r, columns);
    }
    void copy(int64_t r, const Matrix& from, int64_t) const { __builtin_memcpy(row(r), from.row(r), stride() * sizeof(bfloat16)); }
    // zeroes what the products read beyond the rows and columns
    void clear_rest(int64_t rows, int64_t columns) const {
      if (columns < depth_)
        for (int64_t r = 0; r < rows; ++r) clear_beyond(r, columns);
      __builtin_memset((void*)row(rows), 0, (blocks_of(rows, 16) * 16 - rows) * stride() * sizeof(bfloat16));
    }
    void prefetch(int64_t rows) const {
      for (int64_t i = 0; i < rows * stride(); i += 32) __builtin_prefetch(data_ + i, 0, 3);
    }

   private:
    FASTSEQ_HOST_DEVICE void put_parts(int64_t r, int64_t u, const H* parts, int64_t n) const {
#pragma GCC unroll 3
      for (int p = 0; p < kParts; ++p) {
        uint16_t* to = &row(r)[p * depth_ + u].bits;
        if (n < W)
          store_head(to, parts[p], n);
        else
          __builtin_memcpy(to, &parts[p], sizeof(H));
      }
    }
    void clear_beyond(int64_t r, int64_t columns) const {
      for (int p = 0; p < kParts; ++p)
        __builtin_memset((void*)(row(r) + p * depth_ + columns), 0, (depth_ - columns) * sizeof(bfloat16));
    }

    bfloat16* data_ = nullptr;
    int64_t depth_ = 0;  // columns of a row, whole tiles
    int64_t stride_ = 0;
  };

  // Rows are cut evenly into tiles; a product takes two. C: tiles 0 to 3, A: 4 and 5, B: 6 and 7. two_parts: of the three.
  TileProduct(int64_t rows, bool two_parts)
      : rows_(rows ? blocks_of(rows, blocks_of(rows, 16)) : 1), two_parts_(two_parts),
        configuration_({rows_, rows_, rows_, rows_, rows_, rows_, 16, 16}) {}

  int64_t block(int64_t) const { return 2 * rows_; }

  static int64_t tile_bytes(int64_t vectors, int64_t depth) { return vectors * blocks_of(depth, kDepth) * kTileBytes; }

  // aside() does a share of other work: its divisions and latencies pass while the tiles are multiplied
  template <class Aside>
  void multiply(const Matrix& rows, int64_t begin, int64_t count, const void* packed, int64_t vectors, int64_t depth,
                Start<float> start, float* sums, const void*, Aside&& aside) const {
    const Sums to{rows_, vectors, start, sums, two_parts_};
    const Factors h(rows, begin, packed, vectors, depth);
    passes(to, count, vectors, aside, h);
    aside.rest();
  }

  // The same with a second product in the same sums: those of the input. The last `own` vectors of it have sums of their own, behind the
  // others, which start as given while those of the state start from zero.
  template <class Weights, class Aside>
  void multiply_both(const Matrix& rows, int64_t begin, const Weights& weights, int64_t count, int64_t vectors, float* sums,
                     Aside&& aside) const {
    const int64_t own = weights.own, shared = vectors - own;
    Sums to{rows_, vectors + own, weights.start, sums, two_parts_};
    Factors h(rows, begin, weights.packed, vectors, weights.depth);
    Factors x(*weights.inputs, weights.input_row + begin, weights.packed_input, vectors, weights.input_depth);
    passes(to, count, shared, aside, x, h);
    if (own) {
      h.b += shared * kTileBytes, x.b += shared * kTileBytes;
      to.first += shared, to.start.vectors = 0;
      passes(to, count, own, aside, h);
      to.first += own, to.start = weights.start, to.start.rows += shared * W;
      passes(to, count, own, aside, x);
    }
    aside.rest();
  }

  // of weights [vectors*W rows, depth], rows given by row(vector, lane) or null: pairs of depths of 16 rows, transposed
  template <class, class Row>
  static void pack_transposed(int64_t vectors, int64_t depth, void* packed, const Row& row) {
    char* to = static_cast<char*>(packed);
    for (int64_t k = 0; k < depth; k += kDepth)
      for (int64_t v = 0; v < vectors; ++v) {
        V square[kParts][W]{};
        for (int64_t j = 0; j < W; ++j)
          if (const S* from = row(v, j))
            for (int64_t half = 0; half < kDepth; half += W) {
              H parts[kParts];
              if (depth - k <= half) break;
              load_parts(from + k + half, depth - k - half, parts);
              for (int p = 0; p < kParts; ++p) __builtin_memcpy((bfloat16*)&square[p][j] + half, &parts[p], sizeof(H));
            }
        for (int p = 0; p < kParts; ++p, to += 1024) {
          transpose<W / 2, W>(square[p]);
          __builtin_memcpy(to, square[p], 1024);
        }
      }
  }

  // of weights [depth, columns]: pairs of rows, interleaved
  template <class>
  static void pack(int64_t vectors, int64_t depth, int64_t columns, int64_t stride, const S* from, void* packed) {
    typedef uint16_t Pairs __attribute__((vector_size(64)));
    char* to = static_cast<char*>(packed);
    for (int64_t k = 0; k < blocks_of(depth, kDepth) * kDepth; k += kDepth)
      for (int64_t v = 0; v < vectors; ++v, to += kTileBytes)
        for (int64_t pair = 0; pair < kDepth / 2; ++pair) {
          H rows[2][kParts]{};
          for (int64_t i = 0; i < 2; ++i) {
            const int64_t r = k + 2 * pair + i;
            if (r < depth && columns > v * W) load_parts(from + r * stride + v * W, columns - v * W, rows[i]);
          }
          for (int p = 0; p < kParts; ++p)
            *(Pairs*)(to + p * 1024 + pair * 64) =
                __builtin_shufflevector(rows[0][p], rows[1][p], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25,
                                        10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
  }

 private:
  struct Sums {
    int64_t rows;     // of a tile
    int64_t vectors;  // of a row
    Start<float> start;  // of the first of the vectors that a product fills, and the following
    float* data;  // [rows][vectors][16]
    bool two_parts;
    int64_t first = 0;  // of the vectors that a product fills
  };

  struct Factors {
    const char* a;
    int64_t stride, part;  // bytes from one row of a to the next, from one of its parts to the next
    const char* b;         // [depths][vectors][parts] tiles
    int64_t vectors, depths;
    Factors(const Matrix& matrix, int64_t begin, const void* packed, int64_t vectors, int64_t depth)
        : a((const char*)matrix.row(begin)), stride(matrix.stride() * sizeof(bfloat16)), part(matrix.depth() * sizeof(bfloat16)),
          b(static_cast<const char*>(packed)), vectors(vectors), depths(blocks_of(depth, kDepth)) {}
  };

  // all `vectors` of the rows, in passes of up to four tiles of sums
  template <class Aside, class... F>
  static FASTSEQ_HOST_DEVICE void passes(const Sums& to, int64_t count, int64_t vectors, Aside& aside, const F&... factors) {
    const int64_t depths = (factors.depths + ...);
    if (count <= to.rows) {
      aside.share(depths);
      switch (vectors) {
        case 1: return pass<1, 1>(to, 0, aside, factors...);
        case 2: return pass<1, 2>(to, 0, aside, factors...);
        case 3: return pass<1, 3>(to, 0, aside, factors...);
        default: return pass<1, 4>(to, 0, aside, factors...);
      }
    }
    aside.share(depths * ((vectors + 1) / 2));
    if (vectors == 1) return pass<2, 1>(to, 0, aside, factors...);
    pass<2, 2>(to, 0, aside, factors...);
    if (vectors == 3) pass<2, 1>(to, 2, aside, factors...);
    if (vectors == 4) pass<2, 2>(to, 2, aside, factors...);
  }

  template <int kTile>
  static FASTSEQ_HOST_DEVICE void begin(const Sums& to, int64_t row, int64_t vector) {
    if (vector < to.start.vectors)
      tile_load<kTile>(to.start.rows + row * to.start.stride + vector * W, to.start.stride * sizeof(float));
    else
      tile_zero<kTile>();
  }

  // kTiles tiles of rows times NV of the vectors, from `first` on
  template <int kTiles, int NV, class Aside, class... F>
  static FASTSEQ_HOST_DEVICE void pass(const Sums& sums, int64_t first, Aside& aside, const F&... factors) {
    static_assert(kTiles * NV <= 4);
    begin<0>(sums, 0, first);
    if constexpr (NV > 1) begin<1>(sums, 0, first + 1);
    if constexpr (NV > 2) begin<2>(sums, 0, first + 2);
    if constexpr (NV > 3) begin<3>(sums, 0, first + 3);
    if constexpr (kTiles == 2) {
      begin<NV>(sums, sums.rows, first);
      if constexpr (NV > 1) begin<NV + 1>(sums, sums.rows, first + 1);
    }
    (accumulate<kTiles, NV>(sums, first, aside, factors), ...);
    const int64_t stride = sums.vectors * 64;
    float* to = sums.data + (sums.first + first) * W;
    tile_store<0>(to, stride);
    if constexpr (NV > 1) tile_store<1>(to + W, stride);
    if constexpr (NV > 2) tile_store<2>(to + 2 * W, stride);
    if constexpr (NV > 3) tile_store<3>(to + 3 * W, stride);
    if constexpr (kTiles == 2) {
      to += sums.rows * sums.vectors * W;
      tile_store<NV>(to, stride);
      if constexpr (NV > 1) tile_store<NV + 1>(to + W, stride);
    }
  }

  template <int kTiles, int NV, class Aside>
  static FASTSEQ_HOST_DEVICE void accumulate(const Sums& sums, int64_t first, Aside& aside, const Factors& f) {
    const char* a = f.a;
    const char* b = f.b + first * kTileBytes;
    const int64_t second = sums.rows * f.stride;
    for (int64_t k = 0; k < f.depths; ++k, a += 64, b += f.vectors * kTileBytes) {
      if constexpr (kParts == 1)
        multiply_part<kTiles, NV, true>(a, second, f.stride, b);
      else if (sums.two_parts)
        multiply_two_parts<kTiles, NV>(a, second, f.stride, f.part, b);
      else
        multiply_parts<kTiles, NV>(a, second, f.stride, f.part, b);
      aside();
    }
  }

  // tiles 4 and 5 hold the rows of a, if they are not loaded; 6 and 7 take those of b
  template <int kTiles, int NV, bool kLoadsA>
  static FASTSEQ_HOST_DEVICE void multiply_part(const char* a, int64_t second, int64_t stride, const char* b) {
    tile_load<6>(b, 64);
    if constexpr (kLoadsA) tile_load<4>(a, stride);
    tile_multiply<0, 4, 6>();
    if constexpr (kTiles == 2) {
      if constexpr (kLoadsA) tile_load<5>(a + second, stride);
      tile_multiply<NV, 5, 6>();
    }
    if constexpr (NV > 1) {
      tile_load<7>(b + kTileBytes, 64);
      tile_multiply<1, 4, 7>();
      if constexpr (kTiles == 2) tile_multiply<NV + 1, 5, 7>();
    }
    if constexpr (NV > 2) {
      tile_load<6>(b + 2 * kTileBytes, 64);
      tile_multiply<2, 4, 6>();
    }
    if constexpr (NV > 3) {
      tile_load<7>(b + 3 * kTileBytes, 64);
      tile_multiply<3, 4, 7>();
    }
  }

  // The six products of parts that count, each differing from the one before in one factor, so that the other stays where it is, and the
  // largest last. Parts: 0 the first, 1 the second, 2 the third.
  template <int kTiles, int NV>
  static FASTSEQ_HOST_DEVICE void multiply_parts(const char* a, int64_t second, int64_t stride, int64_t part, const char* b) {
    const char *a1 = a + part, *a2 = a1 + part, *b1 = b + 1024, *b2 = b1 + 1024;
    multiply_part<kTiles, NV, true>(a, second, stride, b2);
    multiply_part<kTiles, NV, false>(a, second, stride, b1);
    if constexpr (NV <= 2) {
      multiply_loaded<kTiles, NV>(a1, second, stride);
    } else {
      multiply_part<kTiles, NV, true>(a1, second, stride, b1);
    }
    multiply_part<kTiles, NV, false>(a1, second, stride, b);
    if constexpr (NV <= 2) {
      multiply_loaded<kTiles, NV>(a2, second, stride);
      multiply_loaded<kTiles, NV>(a, second, stride);
    } else {
      multiply_part<kTiles, NV, true>(a2, second, stride, b);
      multiply_part<kTiles, NV, true>(a, second, stride, b);
    }
  }

  // Three products of the first two parts: what they leave out is up to 2^-16 of a product.
  template <int kTiles, int NV>
  static FASTSEQ_HOST_DEVICE void multiply_two_parts(const char* a, int64_t second, int64_t stride, int64_t part, const char* b) {
    multiply_part<kTiles, NV, true>(a, second, stride, b + 1024);
    multiply_part<kTiles, NV, true>(a + part, second, stride, b);
    if constexpr (NV <= 2) {
      multiply_loaded<kTiles, NV>(a, second, stride);
    } else {
      multiply_part<kTiles, NV, true>(a, second, stride, b);
    }
  }

  // other rows of a with what tiles 6 and 7 hold of b
  template <int kTiles, int NV>
  static FASTSEQ_HOST_DEVICE void multiply_loaded(const char* a, int64_t second, int64_t stride) {
    tile_load<4>(a, stride);
    tile_multiply<0, 4, 6>();
    if constexpr (NV > 1) tile_multiply<1, 4, 7>();
    if constexpr (kTiles == 2) {
      tile_load<5>(a + second, stride);
      tile_multiply<NV, 5, 6>();
      if constexpr (NV > 1) tile_multiply<NV + 1, 5, 7>();
    }
  }

  int64_t rows_;  // of a tile
  bool two_parts_;
  TileConfiguration configuration_;
};
