// Attention of bfloat16 by AMX tiles. Included by attention_kernel.inl.
//
// What multiplies what (A, the left-hand matrix, lies in rows; B in pairs of depths: tiles.inl):
//
//   scores^T [key][lane]     A: keys as they lie          B: queries, pairs of features
//   out^T [feature][lane]    A: values, transposed        B: weights, pairs of keys
//   dw^T [key][lane]         A: values as they lie        B: dout, pairs of features
//   dq^T [feature][lane]     A: keys, transposed          B: gradients of the scores, pairs of keys
//   dk, dv [key][feature]    A: the gradients of the scores, the weights [key][lane]     B: queries, dout, pairs of queries
//
// Keys and values are transposed once for all the queries of a head that a thread works on, when they are first needed.

constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileBytes = 1024;

// Tiles of a matrix; distances in bytes.
struct TileMatrix {
  const char* data;
  int64_t tile;   // from a tile to the next, of rows (A) or columns (B)
  int64_t depth;  // from a step of the depth to the next
  int64_t row;    // from a row of a tile to the next
};
constexpr TileMatrix packed_tiles(const void* data, int64_t depths) {
  return {static_cast<const char*>(data), depths * kTileBytes, kTileBytes, 64};
}

template <int M, int N, bool kAdd>
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
    tile_load<4>(left, a.row);
    tile_load<6>(right, b.row);
    tile_multiply<0, 4, 6>();
    if constexpr (N > 1) {
      tile_load<7>(right + b.tile, b.row);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (M > 1) {
      tile_load<5>(left + a.tile, a.row);
      tile_multiply<2, 5, 6>();
      if constexpr (N > 1) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(upper, c_row);
  if constexpr (N > 1) tile_store<1>(upper + 64, c_row);
  if constexpr (M > 1) tile_store<2>(lower, c_row);
  if constexpr (M > 1 && N > 1) tile_store<3>(lower + 64, c_row);
}

// c [rows][columns], in tiles, is the product, or is added to it; c_row in bytes
template <bool kAdd>
void multiply_tiles(const TileMatrix& a, int64_t rows, const TileMatrix& b, int64_t columns, int64_t depths, float* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2) {
    int64_t n = 0;
    for (; n + 2 <= columns; n += 2) multiply_tiles<2, 2, kAdd>(a, m, b, n, depths, c, c_row);
    if (n < columns) multiply_tiles<2, 1, kAdd>(a, m, b, n, depths, c, c_row);
  }
  if (m < rows) {
    int64_t n = 0;
    for (; n + 2 <= columns; n += 2) multiply_tiles<1, 2, kAdd>(a, m, b, n, depths, c, c_row);
    if (n < columns) multiply_tiles<1, 1, kAdd>(a, m, b, n, depths, c, c_row);
  }
}

typedef uint16_t Bits __attribute__((vector_size(64)));  // 32 values of bfloat16
using Float = Math<float>::V;

// the 16 of a, then those of b, rounded
FASTSEQ_HOST_DEVICE Bits rounded_both(Float a, Float b) { return (Bits)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
using HalfBits = Halves<bfloat16>::H;
// the first value of each, the second of each, ..
FASTSEQ_HOST_DEVICE Bits in_pairs(HalfBits a, HalfBits b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                 29, 14, 30, 15, 31);
}
// the first value of each half, the second of each, ..
FASTSEQ_HOST_DEVICE Bits in_pairs(Bits v) {
  return __builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                 29, 14, 30, 15, 31);
}
// n <= 32 values of a row, zeros behind them
FASTSEQ_HOST_DEVICE Bits load_bits(const bfloat16* p, int64_t n) {
  Bits v{};
  if (n >= 32)
    __builtin_memcpy(&v, p, sizeof v);
  else if (n > 0)
    v = (Bits)_mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p);
  return v;
}

// Rows of 32 and more values to tiles of pairs of values, a column for each row: [tile of rows][step of features].
void pack_features(const bfloat16* from, int64_t row, int64_t rows, int64_t tiles, int64_t features, char* to) {
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t e = 0; e < features; e += kTileDepth, to += kTileBytes) {
      Float square[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t r = tile * kTileRows + i;
        square[i] = r < rows ? (Float)load_bits(from + r * row + e, features - e) : Float{};
      }
      transpose<8, 16>(square);
      __builtin_memcpy(to, square, kTileBytes);
    }
}

// Rows to tiles of pairs of rows, a column for each feature: [tile of features][step of rows].
void pack_rows(const bfloat16* from, int64_t row, int64_t rows, int64_t steps, int64_t features, char* to) {
  for (int64_t e = 0; e < features; e += kTileRows)
    for (int64_t r = 0; r < steps * kTileDepth; r += 2, to += 64) {
      Bits v{};
      const uint32_t mask = features - e < kTileRows ? (uint32_t(1) << (features - e)) - 1 : 0xffff;
      if (r < rows) {
        const __m256i first = _mm256_maskz_loadu_epi16(mask, from + r * row + e);
        const __m256i second = r + 1 < rows ? _mm256_maskz_loadu_epi16(mask, from + (r + 1) * row + e) : _mm256_setzero_si256();
        v = in_pairs((HalfBits)first, (HalfBits)second);
      }
      __builtin_memcpy(to, &v, 64);
    }
}

// Rows to tiles as they are, transposed: [tile of features] of one step of rows; `tile` bytes from one to the next.
void pack_transposed(const bfloat16* from, int64_t row, int64_t rows, int64_t features, char* to, int64_t tile) {
  for (int64_t e = 0; e < features; e += kTileRows, to += tile) {
    const uint32_t mask = features - e < kTileRows ? (uint32_t(1) << (features - e)) - 1 : 0xffff;
    Float square[kTileRows];
    for (int64_t pair = 0; pair < kTileRows; ++pair) {
      const int64_t r = 2 * pair;
      const __m256i first = r < rows ? _mm256_maskz_loadu_epi16(mask, from + r * row + e) : _mm256_setzero_si256();
      const __m256i second = r + 1 < rows ? _mm256_maskz_loadu_epi16(mask, from + (r + 1) * row + e) : _mm256_setzero_si256();
      square[pair] = (Float)in_pairs((HalfBits)first, (HalfBits)second);
    }
    transpose<8, 16>(square);
    __builtin_memcpy(to, square, kTileBytes);
  }
}

// Keys or values of a head, transposed, a step of 32 of them when it is first asked for.
class Transposed {
 public:
  Transposed(Arena& arena, int64_t keys, int64_t features)
      : steps_(blocks_of(keys, kTileDepth)),
        features_(features),
        data_(arena.take<char>(blocks_of(features, kTileRows) * steps_ * kTileBytes)),
        done_(arena.take<bool>(steps_)) {}

  // rows of keys 0 .. count
  void start(const bfloat16* from, int64_t row, int64_t count) {
    if (from == from_ && row == row_ && count == count_) return;
    from_ = from, row_ = row, count_ = count;
    __builtin_memset(done_, 0, steps_);
  }
  // of keys begin .. begin + n; begin is a multiple of 32
  TileMatrix tiles(int64_t begin, int64_t n) {
    for (int64_t step = begin / kTileDepth; step * kTileDepth < begin + n; ++step) {
      if (done_[step]) continue;
      const int64_t key = step * kTileDepth;
      pack_transposed(from_ + key * row_, row_, min(kTileDepth, count_ - key), features_, data_ + step * kTileBytes, steps_ * kTileBytes);
      done_[step] = true;
    }
    TileMatrix matrix = packed_tiles(data_, steps_);
    matrix.data += begin / kTileDepth * kTileBytes;
    return matrix;
  }

 private:
  int64_t steps_, features_;
  char* data_;
  bool* done_;
  const bfloat16* from_ = nullptr;
  int64_t row_ = 0, count_ = 0;
};

// scores[key][lane] of keys that lie in rows, times packed features of the lanes
template <int NV>
void multiply_keys(const bfloat16* from, int64_t row, int64_t n, int64_t features, const char* packed, float* to, char* copy) {
  constexpr int64_t lanes = NV * 16;
  const int64_t depths = blocks_of(features, kTileDepth), whole = features % kTileDepth ? 0 : n / kTileRows;
  const TileMatrix right = packed_tiles(packed, depths);
  if (whole) {
    const TileMatrix left{reinterpret_cast<const char*>(from), kTileRows * row * 2, 64, row * 2};
    multiply_tiles<false>(left, whole, right, NV, depths, to, lanes * 4);
  }
  if (whole * kTileRows == n) return;
  // rows that end within a tile are copied, zeros beyond their features and beyond them
  const int64_t first = whole * kTileRows, tiles = blocks_of(n - first, kTileRows), bytes = depths * 64;
  for (int64_t j = 0; j < tiles * kTileRows; ++j)
    for (int64_t e = 0; e < features; e += kTileDepth) {
      const Bits v = first + j < n ? load_bits(from + (first + j) * row + e, features - e) : Bits{};
      __builtin_memcpy(copy + j * bytes + e * 2, &v, 64);
    }
  multiply_tiles<false>({copy, kTileRows * bytes, 64, bytes}, tiles, right, NV, depths, to + first * lanes, lanes * 4);
}

// The products of a block of queries, by tiles.
template <class S>
class TileProduct : public Softmax<S> {
 public:
  using Softmax<S>::a, Softmax<S>::block, Softmax<S>::padded, Softmax<S>::row_of;
  using typename Softmax<S>::V;
  static constexpr int64_t W = 16, kKeys = kMostKeys;

  TileProduct(const Attention& given, Arena& arena)
      : Softmax<S>(given, arena),
        queries_(arena.take<char>(kMostVectors * blocks_of(a.features, kTileDepth) * kTileBytes)),
        copy_(arena.take<char>(kMostKeys * blocks_of(max(a.features, a.value_features), kTileDepth) * 64)),
        weights_(arena.take<char>(kMostVectors * kMostKeys / kTileDepth * kTileBytes)),
        values_(arena, a.keys, a.value_features) {}

  void load() {
    const bfloat16* from = static_cast<const bfloat16*>(a.q.data) + a.q.offset(a.cu_q ? 0 : block.b, block.h, block.s.first_q + block.first);
    pack_features(from, a.q.t, block.count, block.vectors, a.features, queries_);
    if (a.v.given()) values_.start(row_of(a.v, 0), a.v.t, block.s.keys);
  }

  template <int NV>
  void products(int64_t begin, int64_t n, float* to) {
    multiply_keys<NV>(row_of(a.k, begin), a.k.t, n, a.features, queries_, to, copy_);
  }
  template <int NV>
  void scores(int64_t begin, int64_t n, float* to, V (&largest)[NV], float* capped = nullptr) {
    products<NV>(begin, n, to);
    this->template shape<NV>(begin, n, to, largest, capped);
  }

  // The weights of two keys, next to one another, of the lanes of a vector.
  FASTSEQ_HOST_DEVICE void put(int64_t key, int64_t v, V first, V second) {
    const Bits pairs = in_pairs(rounded_both(first, second));
    __builtin_memcpy(weights_ + v * kRow + key / kTileDepth * kTileBytes + key % kTileDepth / 2 * 64, &pairs, 64);
  }
  // those of the keys n .. of the step that n ends in are zero
  template <int NV>
  void put_zeros(int64_t n) {
    for (int64_t key = blocks_of(n, 2) * 2; key % kTileDepth; key += 2)
      for (int64_t v = 0; v < NV; ++v) put(key, v, V{}, V{});
  }
  // sums[feature][lane] += what keys begin .. begin + n have of the weights that were put
  template <int NV>
  void add(int64_t begin, int64_t n, float* sums) {
    const TileMatrix right{weights_, kRow, kTileBytes, 64};
    multiply_tiles<true>(values_.tiles(begin, n), blocks_of(a.value_features, kTileRows), right, NV, blocks_of(n, kTileDepth), sums, NV * 64);
  }

  template <int NV, bool>
  void weigh(int64_t begin, int64_t n, const float* weights, const V (&)[NV], float* sums) {
    constexpr int64_t lanes = NV * W;
    for (int64_t key = 0; key < n; key += 2)
      for (int64_t v = 0; v < NV; ++v) {
        const float* at = weights + key * lanes + v * W;
        put(key, v, load_vector(at), key + 1 < n ? load_vector(at + lanes) : V{});
      }
    put_zeros<NV>(n);
    add<NV>(begin, n, sums);
  }

 private:
  const TileConfiguration configuration_{16, 16, 16, 16, 16, 16, 16, 16};
  static constexpr int64_t kRow = kMostKeys / kTileDepth * kTileBytes;  // of the weights, from a vector of lanes to the next
  char *queries_, *copy_, *weights_;
  Transposed values_;
};

// out and lse. The highest score of a lane is raised only when it has grown by so much that weights might grow large: 2^8 is exact.
class TileForward {
 public:
  using S = bfloat16;
  using V = Math<float>::V;
  using M = ShortMath;
  static constexpr int64_t W = 16, kLanes = 32;

  TileForward(const Attention& given, Arena arena)
      : a(given),
        rows_(given, arena),
        scores_(arena.take<float>(kMostKeys * kLanes)),
        sums_(arena.take<float>(rows_.padded(a.value_features) * kLanes)),
        used(arena.used()) {}

  void run(int64_t b, int64_t h, int64_t first, int64_t count) {
    rows_.block.place(b, h, a.sequence(b), first, count);
    if (count > W)
      run<2>();
    else
      run<1>();
  }

 private:
  template <int NV>
  void run() {
    constexpr int64_t lanes = NV * W;
    Block<S>& block = rows_.block;
    rows_.load();
    V highest[NV], total[NV];
    for (int v = 0; v < NV; ++v) highest[v] = V{} - INFINITY, total[v] = V{};
    const int64_t features = rows_.padded(a.value_features);
    __builtin_memset(sums_, 0, features * lanes * sizeof(float));
    const float factor = block.factor(), growth = 8 * 0.69314718f / factor;
    int64_t begin, end;
    block.keys(begin, end);
    for (int64_t j = begin; j < end; j += kMostKeys) {
      const int64_t n = min(kMostKeys, end - j);
      if (block.look(j, n) == Seen::kNone) continue;
      V largest[NV], base[NV], sums[NV];
      rows_.template scores<NV>(j, n, scores_, largest);
      uint32_t grown = 0;
      for (int v = 0; v < NV; ++v) grown |= _mm512_cmp_ps_mask((__m512)largest[v], (__m512)(highest[v] + growth), _CMP_GT_OQ);
      if (grown) {
        V alpha[NV];
        for (int v = 0; v < NV; ++v) {
          const V next = largest[v] > highest[v] ? largest[v] : highest[v];
          alpha[v] = power_of<M, float>(highest[v] - rows_.base_of(next), factor);
          highest[v] = next, total[v] *= alpha[v];
        }
        for (int64_t x = 0; x < features * lanes; x += lanes)
          for (int v = 0; v < NV; ++v) store_vector(sums_ + x + v * W, load_vector(sums_ + x + v * W) * alpha[v]);
      }
      for (int v = 0; v < NV; ++v) base[v] = rows_.base_of(highest[v]), sums[v] = V{};
      const auto weight = [&](int64_t key, int v) __attribute__((always_inline)) {
        return power_of<M, float>(load_vector(scores_ + key * lanes + v * W) - base[v], factor);
      };
      int64_t key = 0;
      for (; key + 2 <= n; key += 2)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          const V first = weight(key, v), second = weight(key + 1, v);
          sums[v] += first + second;
          if (a.dropout > 0)
            store_vector(scores_ + key * lanes + v * W, first), store_vector(scores_ + (key + 1) * lanes + v * W, second);
          else
            rows_.put(key, v, first, second);
        }
      if (key < n)
        for (int v = 0; v < NV; ++v) {
          const V last = weight(key, v);
          sums[v] += last;
          store_vector(scores_ + key * lanes + v * W, last);
          rows_.put(key, v, last, V{});
        }
      for (int v = 0; v < NV; ++v) total[v] += sums[v];
      if (a.dropout > 0) {
        block.template drop<NV>(j, n, [&](int64_t at, V keep) { store_vector(scores_ + at, load_vector(scores_ + at) * keep); });
        rows_.template weigh<NV, false>(j, n, scores_, base, sums_);
      } else {
        rows_.template put_zeros<NV>(n);
        rows_.template add<NV>(j, n, sums_);
      }
    }
    rows_.template finish<NV>(highest, total);
    block.store(sums_, a.value_features, rows_.factors(), a.out);
  }

  const Attention& a;
  TileProduct<S> rows_;
  float *scores_, *sums_;

 public:
  const int64_t used;
};

// The gradients that a part of the queries of a key head's query heads gives, by tiles.
class TileBackward : public BackwardRows<bfloat16, TileProduct> {
  static constexpr int64_t kLanes = 64;

 public:
  TileBackward(const AttentionBackward& given, Arena arena)
      : BackwardRows(given, arena),
        dout_features_(arena.take<char>(kMostVectors * blocks_of(Ev, kTileDepth) * kTileBytes)),
        query_pairs_(arena.take<char>(padded_ / kTileRows * kLanes / kTileDepth * kTileBytes)),
        dout_pairs_(arena.take<char>(padded_values_ / kTileRows * kLanes / kTileDepth * kTileBytes)),
        copy_(arena.take<char>(kChunk * blocks_of(Ev, kTileDepth) * 64)),
        weight_rows_(arena.take<char>(kChunk * kLanes * 2)),
        gradient_rows_(arena.take<char>(kChunk * kLanes * 2)),
        gradient_pairs_(arena.take<char>(kMostVectors * kChunk / kTileDepth * kTileBytes)),
        keys_(arena, a.keys, E),
        used(arena.used()) {}

  void run(int64_t b, int64_t key_head, int64_t p, int64_t parts, float* sums, int64_t worker) {
    sums_ = sums, worker_ = worker;
    const Attention::Sequence s = a.sequence(b);
    __builtin_memset(sums, 0, blocks_of(s.keys, kChunk) * kChunk * sums_width(a) * sizeof(float));
    const int64_t group = a.heads / a.key_heads, blocks = blocks_of(s.queries, kLanes);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
      for (int64_t block = blocks * p / parts; block < blocks * (p + 1) / parts; ++block) {
        const int64_t first = block * kLanes;
        rows_.block.place(b, h, s, first, min(kLanes, s.queries - first));
        with_vectors(rows_.block.vectors, [&]<int NV>() { run<NV>(); });
      }
  }

 private:
  template <int NV>
  void run() {
    constexpr int64_t lanes = NV * W, steps = (NV + 1) / 2;  // of the lanes as a depth
    Block<S>& block = rows_.block;
    rows_.load();
    const bfloat16 *queries = of_queries(a.q), *dout = of_queries(g.dout);
    pack_features(dout, g.dout.t, block.count, NV, Ev, dout_features_);
    if (g.dk.given()) pack_rows(queries, a.q.t, block.count, steps, E, query_pairs_);
    if (g.dv.given()) pack_rows(dout, g.dout.t, block.count, steps, Ev, dout_pairs_);
    if (g.dq.given()) keys_.start(rows_.row_of(a.k, 0), a.k.t, block.s.keys);
    const float factor = block.factor();
    V lse[NV], delta[NV];
    prepare<NV>(lse, delta);
    int64_t begin, end;
    block.keys(begin, end);
    alone_ = end - begin <= kChunk;
    for (int64_t j = begin; j < end; j += kChunk) {
      const int64_t n = min(kChunk, end - j);
      if (block.look(j, n) == Seen::kNone) continue;
      rows_.template products<NV>(j, n, weights_);
      if (!rows_.plain()) block.template shape<NV>(weights_, j, n, capped_);
      multiply_keys<NV>(rows_.row_of(a.v, j), a.v.t, n, Ev, dout_features_, gradients_, copy_);
      if (plain()) {
        round<NV>(n, [&](int64_t at, int v, V& weight, V& gradient) __attribute__((always_inline)) {
          weight = power_of<M, float>(load_vector(weights_ + at) * factor - lse[v], 1.0f);
          gradient = weight * (load_vector(gradients_ + at) - delta[v]);
        });
      } else {
        weigh<NV>(n, lse);
        through_scores<NV>(j, n, delta);
        round<NV>(n, [&](int64_t at, int, V& weight, V& gradient) __attribute__((always_inline)) {
          weight = load_vector(weights_ + at), gradient = load_vector(gradients_ + at);
        });
      }
      const int64_t row = padded_ + padded_values_, tiles = blocks_of(n, kTileRows), depth = kTileDepth * 2;
      float* sums = sums_ + j * row;
      const auto add = [&](const char* left, const char* pairs, int64_t features, float* to) {
        multiply_tiles<true>({left, kTileRows * kLanes * 2, depth, kLanes * 2}, tiles, packed_tiles(pairs, steps),
                             blocks_of(features, kTileRows), steps, to, row * 4);
      };
      if (g.dv.given()) add(weight_rows_, dout_pairs_, Ev, sums + padded_);
      if (g.dk.given()) add(gradient_rows_, query_pairs_, E, sums);
      if (g.dq.given())
        multiply_tiles<true>(keys_.tiles(j, n), padded_ / kTileRows, packed_tiles(gradient_pairs_, kChunk / kTileDepth), NV,
                             blocks_of(n, kTileDepth), dq_, lanes * 4);
    }
    store_queries<NV>();
  }

  // Weights and gradients of n keys, get(place, vector, weight, gradient), as operands: rows of lanes, and pairs of keys; zeros up to a whole
  // step of either.
  template <int NV, class Get>
  void round(int64_t n, const Get& get) {
    constexpr int64_t lanes = NV * W;
    for (int64_t key = 0; key < blocks_of(n, kTileDepth) * kTileDepth; key += 2) {
      V weight[2][NV + 1]{}, gradient[2][NV + 1]{};
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r)
        if (key + r < n)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) get((key + r) * lanes + v * W, v, weight[r][v], gradient[r][v]);
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v += 2) {
          const int64_t at = (key + r) * kLanes * 2 + v * W * 2;
          const Bits weights = rounded_both(weight[r][v], weight[r][v + 1]), gradients = rounded_both(gradient[r][v], gradient[r][v + 1]);
          __builtin_memcpy(weight_rows_ + at, &weights, 64), __builtin_memcpy(gradient_rows_ + at, &gradients, 64);
        }
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Bits pairs = in_pairs(rounded_both(gradient[0][v], gradient[1][v]));
        __builtin_memcpy(gradient_pairs_ + (v * kChunk + key / kTileDepth * kTileDepth) / kTileDepth * kTileBytes + key % kTileDepth / 2 * 64,
                         &pairs, 64);
      }
    }
  }

  using S = bfloat16;
  char *dout_features_, *query_pairs_, *dout_pairs_, *copy_, *weight_rows_, *gradient_rows_, *gradient_pairs_;
  Transposed keys_;
  float* sums_ = nullptr;

 public:
  const int64_t used;
};
