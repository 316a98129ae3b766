// Products of attention's tiles by AMX. Included by attention_tiles.inl.

// What products need as long as they are formed.
struct Multiplier {
  static constexpr bool kVectors = false;
  static constexpr int64_t kStep = kChunk;  // keys whose scores and gradients are formed, backward, before they become operands
  static constexpr int64_t kCausalLanes = 64;  // queries of a block, backward, where a causal mask hides keys

  const TileConfiguration configuration{16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 are sums, 4 and 5 of the left-hand matrix, 6 and 7 of the right-hand one.
template <int M, bool kStreams = false>
FASTSEQ_HOST_DEVICE void load_left(const char* at, const TileMatrix& a) {
  if constexpr (kStreams) {
    tile_stream<4>(at, a.row);
    if constexpr (M > 1) tile_stream<5>(at + a.tile, a.row);
  } else {
    tile_load<4>(at, a.row);
    if constexpr (M > 1) tile_load<5>(at + a.tile, a.row);
  }
}
template <int N>
FASTSEQ_HOST_DEVICE void load_right(const char* at, const TileMatrix& b) {
  tile_load<6>(at, b.row);
  if constexpr (N > 1) tile_load<7>(at + b.tile, b.row);
}
template <int M, int N>
FASTSEQ_HOST_DEVICE void multiply_loaded() {
  tile_multiply<0, 4, 6>();
  if constexpr (N > 1) tile_multiply<1, 4, 7>();
  if constexpr (M > 1) tile_multiply<2, 5, 6>();
  if constexpr (M > 1 && N > 1) tile_multiply<3, 5, 7>();
}

template <int M, int N, bool kAdd, int kParts, bool kStreams>
FASTSEQ_HOST_DEVICE void multiply_tiles(const TileMatrix& a, int64_t m, const TileMatrix& b, int64_t n, int64_t depths, float* c,
                                        int64_t c_row) {
  char *upper = reinterpret_cast<char*>(c) + m * kTileRows * c_row + n * 64, *lower = upper + kTileRows * c_row;
  if constexpr (kAdd) {
    tile_load<0>(upper, c_row);
    if constexpr (N > 1) tile_load<1>(upper + 64, c_row);
    if constexpr (M > 1) tile_load<2>(lower, c_row);
    if constexpr (M > 1 && N > 1) tile_load<3>(lower + 64, c_row);
  } else {
    tile_zero<0>();
    if constexpr (N > 1) tile_zero<1>();
    if constexpr (M > 1) tile_zero<2>();
    if constexpr (M > 1 && N > 1) tile_zero<3>();
  }
  const char *left = a.data + m * a.tile, *right = b.data + n * b.tile;
  for (int64_t k = 0; k < depths; ++k, left += a.depth, right += b.depth) {
    if constexpr (kParts == 1) {
      load_left<M, kStreams>(left, a), load_right<N>(right, b), multiply_loaded<M, N>();
    } else {
      // the six products that count, the largest last, each with one factor of the one before
      load_left<M>(left, a), load_right<N>(right + 2 * kTileBytes, b), multiply_loaded<M, N>();
      load_right<N>(right + kTileBytes, b), multiply_loaded<M, N>();
      load_left<M>(left + kTileBytes, a), multiply_loaded<M, N>();
      load_right<N>(right, b), multiply_loaded<M, N>();
      load_left<M>(left + 2 * kTileBytes, a), multiply_loaded<M, N>();
      load_left<M>(left, a), multiply_loaded<M, N>();
    }
  }
  tile_store<0>(upper, c_row);
  if constexpr (N > 1) tile_store<1>(upper + 64, c_row);
  if constexpr (M > 1) tile_store<2>(lower, c_row);
  if constexpr (M > 1 && N > 1) tile_store<3>(lower + 64, c_row);
}

// Two by two tiles of a product, [32][32] numbers behind one another, and what they are the product of.
struct Square {
  TileMatrix left, right;
  int64_t depths = 0;  // 0: there is none
  float* to = nullptr;

  // Calls between() at each step of the depth: the tiles of one step are multiplied while vectors work on something else.
  template <class Between>
  FASTSEQ_HOST_DEVICE void multiply(const Between& between) const {
    constexpr int64_t row = 2 * 64;
    if (!depths) return;
    char *upper = reinterpret_cast<char*>(to), *lower = upper + kTileRows * row;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    const char *a = left.data, *b = right.data;
    for (int64_t k = 0; k < depths; ++k, a += left.depth, b += right.depth) {
      load_left<2, true>(a, left), load_right<2>(b, right), multiply_loaded<2, 2>();
      between();
    }
    tile_store<0>(upper, row), tile_store<1>(upper + 64, row), tile_store<2>(lower, row), tile_store<3>(lower + 64, row);
  }
};

// c [rows][columns], in tiles, is the product, or is added to it; c_row in bytes. kStreams: of two columns at most, for which each tile of a is
// loaded once: it takes no room in the first-level cache from what is.
template <bool kAdd, int kParts = 1, bool kStreams = false>
void multiply_tiles(const TileMatrix& a, int64_t rows, const TileMatrix& b, int64_t columns, int64_t depths, float* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2) {
    int64_t n = 0;
    for (; n + 2 <= columns; n += 2) multiply_tiles<2, 2, kAdd, kParts, kStreams>(a, m, b, n, depths, c, c_row);
    if (n < columns) multiply_tiles<2, 1, kAdd, kParts, kStreams>(a, m, b, n, depths, c, c_row);
  }
  if (m < rows) {
    int64_t n = 0;
    for (; n + 2 <= columns; n += 2) multiply_tiles<1, 2, kAdd, kParts, kStreams>(a, m, b, n, depths, c, c_row);
    if (n < columns) multiply_tiles<1, 1, kAdd, kParts, kStreams>(a, m, b, n, depths, c, c_row);
  }
}
