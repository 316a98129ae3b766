// Products of bfloat16 by AMX tiles: sums[row][vector] = rows x a tile of weights, summed in fp32.
// Included inside the namespace of an instruction set, after vector.inl.
//
// A tile register holds up to 16 rows of 64 bytes. A, the left-hand matrix, is loaded as it lies: 16 rows x 32 values. B holds 16
// pairs of depths x 16 columns, the two values of a pair side by side; C 16 rows x 16 columns of fp32.

// Tile instructions as assembly, since gcc 12's intrinsics know nothing of the memory that they read and write.
template <int kTile>
FASTSEQ_HOST_DEVICE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
FASTSEQ_HOST_DEVICE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
FASTSEQ_HOST_DEVICE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
FASTSEQ_HOST_DEVICE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

struct TileProduct {
  using A = float;
  using V = Lanes<float>::V;
  static constexpr int64_t W = 16;
  static constexpr bool kInterleaves = true;
  static constexpr int64_t kMostRows = 32;  // two tiles of rows
  // Rows of input projected together: 128 rows of them and of their gates displace the recurrent weights, 32 fetch the input's too often
  // (LSTM of 256 units, 32 sequences: 6.8, 4.9 and 5.0 ms with 128, 64 and 32; of 512 units 27, 25 and 30).
  static constexpr int64_t kChunkRows = 64;
  static constexpr int64_t kFusedRows = INT64_MAX;  // no step projects its own input
  static constexpr int64_t kDepth = 32;     // of a tile
  static constexpr int64_t kTileBytes = 1024;

  // The left-hand matrix, bfloat16; zero beyond its columns up to a whole tile.
  class Matrix {
   public:
    Matrix() = default;
    Matrix(void* memory, int64_t columns) : data_(static_cast<bfloat16*>(memory)), stride_(blocks_of(columns, kDepth) * kDepth) {}
    // a tile of rows may reach beyond them
    static int64_t bytes(int64_t rows, int64_t columns) {
      return blocks_of(rows, 16) * 16 * blocks_of(columns, kDepth) * kDepth * sizeof(bfloat16);
    }

    bfloat16* row(int64_t r) const { return data_ + r * stride_; }
    int64_t stride() const { return stride_; }
    V load(int64_t r, int64_t u) const { return Memory<bfloat16, float>::load(row(r) + u, W); }
    template <class S>
    void store(int64_t r, int64_t u, V v, int64_t n) const {
      Memory<bfloat16, float>::store(row(r) + u, v, n);
    }
    void put(int64_t r, const bfloat16* from, int64_t columns) const {
      __builtin_memcpy(row(r), from, columns * sizeof(bfloat16));
      __builtin_memset((void*)(row(r) + columns), 0, (stride_ - columns) * sizeof(bfloat16));
    }
    void copy(int64_t r, const Matrix& from, int64_t) const { __builtin_memcpy(row(r), from.row(r), stride_ * sizeof(bfloat16)); }
    // zeroes what the products read beyond the rows and columns
    void clear_rest(int64_t rows, int64_t columns) const {
      if (columns < stride_)
        for (int64_t r = 0; r < rows; ++r) __builtin_memset((void*)(row(r) + columns), 0, (stride_ - columns) * sizeof(bfloat16));
      __builtin_memset((void*)row(rows), 0, (blocks_of(rows, 16) * 16 - rows) * stride_ * sizeof(bfloat16));
    }
    void prefetch(int64_t rows) const {
      for (int64_t i = 0; i < rows * stride_; i += 32) __builtin_prefetch(data_ + i, 0, 3);
    }

   private:
    bfloat16* data_ = nullptr;
    int64_t stride_ = 0;
  };

  // Rows are cut evenly into tiles; a product takes two. The configuration is the thread's own, and other libraries' kernels change it:
  // it holds from construction to destruction, within which nothing else runs.
  explicit TileProduct(int64_t rows) : rows_(rows ? blocks_of(rows, blocks_of(rows, 16)) : 1) {
    struct alignas(64) {
      uint8_t palette, start;
      uint8_t reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } configuration{};
    configuration.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.bytes[tile] = 64;
      configuration.rows[tile] = tile < 6 ? rows_ : 16;  // C: 0 to 3, A: 4 and 5, B: 6 and 7
    }
    asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  }
  ~TileProduct() { asm volatile("tilerelease" ::: "memory"); }
  TileProduct(const TileProduct&) = delete;
  TileProduct& operator=(const TileProduct&) = delete;

  int64_t block(int64_t) const { return 2 * rows_; }

  static int64_t tile_bytes(int64_t vectors, int64_t depth) { return vectors * blocks_of(depth, kDepth) * kTileBytes; }

  // aside() does a share of other work: its divisions and latencies pass while the tiles are multiplied
  template <class Aside>
  void multiply(const Matrix& rows, int64_t begin, int64_t count, const void* packed, int64_t vectors, int64_t depth,
                Start<float> start, float* sums, const void*, Aside&& aside) const {
    const Operands o{rows.row(begin), rows.stride() * 2, rows_, static_cast<const char*>(packed), vectors, blocks_of(depth, kDepth),
                     start, sums};
    if (count <= rows_) {
      aside.share(o.depths);
      switch (vectors) {
        case 1: pass<1, 1>(o, 0, aside); break;
        case 2: pass<1, 2>(o, 0, aside); break;
        case 3: pass<1, 3>(o, 0, aside); break;
        default: pass<1, 4>(o, 0, aside);
      }
    } else {
      aside.share(o.depths * ((vectors + 1) / 2));
      if (vectors == 1) {
        pass<2, 1>(o, 0, aside);
      } else {
        pass<2, 2>(o, 0, aside);
        if (vectors == 3) pass<2, 1>(o, 2, aside);
        if (vectors == 4) pass<2, 2>(o, 2, aside);
      }
    }
    aside.rest();
  }

  // of weights [vectors*W rows, depth], rows given by row(vector, lane) or null: pairs of depths of 16 rows, transposed
  template <class S, class Row>
  static void pack_transposed(int64_t vectors, int64_t depth, void* packed, const Row& row) {
    char* to = static_cast<char*>(packed);
    for (int64_t k = 0; k < depth; k += kDepth)
      for (int64_t v = 0; v < vectors; ++v, to += kTileBytes) {
        V square[W];
        for (int64_t j = 0; j < W; ++j) {
          const bfloat16* from = row(v, j);
          square[j] = V{};
          if (from && depth - k >= kDepth)
            __builtin_memcpy(&square[j], from + k, kDepth * sizeof(bfloat16));
          else if (from)
            __builtin_memcpy(&square[j], from + k, (depth - k) * sizeof(bfloat16));
        }
        transpose<W / 2, W>(square);
        __builtin_memcpy(to, square, kTileBytes);
      }
  }

  // of weights [depth, columns]: pairs of rows, interleaved
  template <class S>
  static void pack(int64_t vectors, int64_t depth, int64_t columns, int64_t stride, const bfloat16* from, void* packed) {
    typedef uint16_t Pairs __attribute__((vector_size(64)));
    using H = Memory<bfloat16, float>::H;
    char* to = static_cast<char*>(packed);
    for (int64_t k = 0; k < blocks_of(depth, kDepth) * kDepth; k += kDepth)
      for (int64_t v = 0; v < vectors; ++v)
        for (int64_t pair = 0; pair < kDepth / 2; ++pair, to += 64) {
          const int64_t r = k + 2 * pair;
          const auto half = [&](int64_t row) __attribute__((always_inline)) {
            if (row >= depth || columns <= v * W) return H{};
            const uint16_t* p = &from[row * stride + v * W].bits;
            if (columns - v * W < W) return load_head<H>(p, columns - v * W);
            H h;
            __builtin_memcpy(&h, p, sizeof(H));
            return h;
          };
          const H a = half(r), b = half(r + 1);
          *(Pairs*)to = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11,
                                                27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
  }

 private:
  struct Operands {
    const bfloat16* a;
    int64_t stride;  // bytes from one row of a to the next
    int64_t rows;    // of a tile
    const char* b;   // [depths][vectors] tiles
    int64_t vectors, depths;
    Start<float> start;
    float* sums;  // [rows][vectors][16]
  };

  template <int kTile>
  static FASTSEQ_HOST_DEVICE void begin(const Operands& o, int64_t row, int64_t vector) {
    if (vector < o.start.vectors)
      tile_load<kTile>(o.start.rows + row * o.start.stride + vector * W, o.start.stride * sizeof(float));
    else
      tile_zero<kTile>();
  }

  // kTiles tiles of rows times NV of the vectors, from the first on
  template <int kTiles, int NV, class Aside>
  static FASTSEQ_HOST_DEVICE void pass(const Operands& o, int64_t first, Aside& aside) {
    static_assert(kTiles * NV <= 4);
    begin<0>(o, 0, first);
    if constexpr (NV > 1) begin<1>(o, 0, first + 1);
    if constexpr (NV > 2) begin<2>(o, 0, first + 2);
    if constexpr (NV > 3) begin<3>(o, 0, first + 3);
    if constexpr (kTiles == 2) {
      begin<NV>(o, o.rows, first);
      if constexpr (NV > 1) begin<NV + 1>(o, o.rows, first + 1);
    }
    const char* a = reinterpret_cast<const char*>(o.a);
    const char* b = o.b + first * kTileBytes;
    const int64_t second = o.rows * o.stride;
    for (int64_t k = 0; k < o.depths; ++k, a += 64, b += o.vectors * kTileBytes) {
      tile_load<6>(b, 64);
      tile_load<4>(a, o.stride);
      tile_multiply<0, 4, 6>();
      if constexpr (kTiles == 2) {
        tile_load<5>(a + second, o.stride);
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
      aside();
    }
    const int64_t stride = o.vectors * 64;
    float* to = o.sums + first * W;
    tile_store<0>(to, stride);
    if constexpr (NV > 1) tile_store<1>(to + W, stride);
    if constexpr (NV > 2) tile_store<2>(to + 2 * W, stride);
    if constexpr (NV > 3) tile_store<3>(to + 3 * W, stride);
    if constexpr (kTiles == 2) {
      to += o.rows * o.vectors * W;
      tile_store<NV>(to, stride);
      if constexpr (NV > 1) tile_store<NV + 1>(to + W, stride);
    }
  }

  int64_t rows_;  // of a tile
};
