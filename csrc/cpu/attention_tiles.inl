// Attention by products of pairs of bfloat16, laid out in tiles, which AMX multiplies, or vectors: of bfloat16, and by AMX forward of float32, each
// number of which is three of bfloat16. Included by attention_kernel.inl.
//
// A tile has 16 rows of 64 bytes. A, the left-hand matrix, lies in rows of 32 values; B has 16 pairs of depths x 16 columns, the two values
// of a pair side by side. What multiplies what:
//
//   scores^T [key][lane]     A: keys as they lie          B: queries, pairs of features
//   out^T [feature][lane]    A: values, transposed        B: weights, pairs of keys
//   dw^T [key][lane]         A: values as they lie        B: dout, pairs of features
//   dq^T [feature][lane]     A: keys, transposed          B: gradients of the scores, pairs of keys
//   dk, dv [key][feature]    A: the gradients of the scores, the weights [key][lane]     B: queries, dout, pairs of queries
//
// Keys and values are transposed once for all the queries of a head that a thread works on, when they are first needed.

constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileBytes = 1024;

// of a number, each in a tile of its own, behind one another
template <class S>
constexpr int kPartsOf = sizeof(S) == sizeof(bfloat16) ? 1 : 3;

// Tiles of a matrix; distances in bytes.
struct TileMatrix {
  const char* data;
  int64_t tile;   // from a tile to the next, of rows (A) or columns (B)
  int64_t depth;  // from a step of the depth to the next
  int64_t row;    // from a row of a tile to the next
};
template <int kParts = 1>
constexpr TileMatrix packed_tiles(const void* data, int64_t depths) {
  return {static_cast<const char*>(data), depths * kParts * kTileBytes, kParts * kTileBytes, 64};
}

#if defined(FASTSEQ_TILES)
#include "tiles.inl"
#include "attention_products_amx.inl"
#else
#include "attention_products_pairs.inl"
#endif

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

// The parts of two vectors, the values of one beside those of the other. Rounded, what is left fits in the parts below, and is positive or
// negative by chance. Else cut off, which is faster: as exact, if the other factor's parts are rounded.
template <bool kRounds>
FASTSEQ_HOST_DEVICE void parts_of_pairs(Float a, Float b, Bits (&parts)[3]) {
  typedef Lanes<float>::U Words;
  constexpr uint32_t kUpper = 0xffff0000;
#pragma GCC unroll 3
  for (int part = 0; part < 3; ++part) {
    const uint32_t half = kRounds && part < 2 ? 0x8000 : 0;
    const Words of_a = (Words)a + half, of_b = ((Words)b + half) & kUpper;
    parts[part] = (Bits)(of_a >> 16 | of_b);
    if (part < 2) a -= (Float)(of_a & kUpper), b -= (Float)of_b;
  }
}

// What was met of numbers in parts: the bits of the largest and of the smallest but zero.
class Extent {
 public:
  FASTSEQ_HOST_DEVICE void see(Float v) {
    const Words size = (Words)v & 0x7fffffff, less = size - 1;
    most_ = size > most_ ? size : most_;
    least_ = less < least_ ? less : least_;
  }
  // nothing but zeros, and numbers of a size from least to most
  bool within(float least, float most) const {
    const auto from = __builtin_bit_cast(uint32_t, least), to = __builtin_bit_cast(uint32_t, most);
    bool inside = true;
    for (int i = 0; i < 16; ++i) inside &= most_[i] <= to && least_[i] >= (from ? from - 1 : 0);
    return inside;
  }

 private:
  typedef Lanes<float>::U Words;
  Words most_{}, least_ = ~Words{};
};

// 32 values of a row, or the first n, zeros behind them, as pairs or in parts: value e beside value e + 1, or, in parts, e + 16
template <class S>
FASTSEQ_HOST_DEVICE void load_pairs(const S* from, int64_t n, Bits (&parts)[kPartsOf<S>], Extent& extent) {
  if constexpr (kPartsOf<S> == 1) {
    parts[0] = load_bits(from, n);
  } else {
    const Float a = n > 0 ? Memory<S, float>::load(from, n) : Float{}, b = n > 16 ? Memory<S, float>::load(from + 16, n - 16) : Float{};
    extent.see(a), extent.see(b);
    parts_of_pairs<true>(a, b, parts);
  }
}
// 16 values of one row and of the next, or the first n
template <class S>
FASTSEQ_HOST_DEVICE void load_pairs(const S* first, const S* second, int64_t n, Bits (&parts)[kPartsOf<S>], Extent& extent) {
  if constexpr (kPartsOf<S> == 1) {
    const uint32_t mask = n < kTileRows ? (uint32_t(1) << n) - 1 : 0xffff;
    const __m256i a = first ? _mm256_maskz_loadu_epi16(mask, first) : _mm256_setzero_si256();
    const __m256i b = second ? _mm256_maskz_loadu_epi16(mask, second) : _mm256_setzero_si256();
    parts[0] = in_pairs((HalfBits)a, (HalfBits)b);
  } else {
    const Float a = first ? Memory<S, float>::load(first, n) : Float{}, b = second ? Memory<S, float>::load(second, n) : Float{};
    extent.see(a), extent.see(b);
    parts_of_pairs<true>(a, b, parts);
  }
}

// Stores squares of pairs, a part each, transposed, as tiles behind one another.
template <int kParts>
FASTSEQ_HOST_DEVICE void store_transposed(Float (&squares)[kParts][kTileRows], char* to) {
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part) {
    transpose<8, 16>(squares[part]);
    __builtin_memcpy(to + part * kTileBytes, squares[part], kTileBytes);
  }
}

// Rows of 32 and more values to tiles of pairs of values, a column for each row: [tile of rows][step of features].
template <class S>
void pack_features(const S* from, int64_t row, int64_t rows, int64_t tiles, int64_t features, char* to, Extent& extent) {
  constexpr int kParts = kPartsOf<S>;
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t e = 0; e < features; e += kTileDepth, to += kParts * kTileBytes) {
      const S* at = from + tile * kTileRows * row + e;
      Float squares[kParts][kTileRows];
      if ((tile + 1) * kTileRows <= rows && e + kTileDepth <= features) {  // without conditions, which would keep them in memory
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileRows; ++i) {
          Bits parts[kParts];
          load_pairs(at + i * row, kTileDepth, parts, extent);
#pragma GCC unroll 3
          for (int part = 0; part < kParts; ++part) squares[part][i] = (Float)parts[part];
        }
        store_transposed(squares, to);
        continue;
      }
      for (int64_t i = 0; i < kTileRows; ++i) {
        Bits parts[kParts]{};
        if (tile * kTileRows + i < rows) load_pairs(at + i * row, features - e, parts, extent);
        for (int part = 0; part < kParts; ++part) squares[part][i] = (Float)parts[part];
      }
      store_transposed(squares, to);
    }
}

// Rows to tiles as they are: [tile of rows][step of features].
template <class S>
void pack_lying(const S* from, int64_t row, int64_t rows, int64_t tiles, int64_t features, char* to, Extent& extent) {
  constexpr int kParts = kPartsOf<S>;
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t e = 0; e < features; e += kTileDepth, to += kParts * kTileBytes)
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t r = tile * kTileRows + i;
        Bits parts[kParts]{};
        if (r < rows) load_pairs(from + r * row + e, features - e, parts, extent);
        for (int part = 0; part < kParts; ++part) __builtin_memcpy(to + part * kTileBytes + i * 64, &parts[part], 64);
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

// Rows to tiles as they are, transposed: [tile of features] of one step of rows.
template <class S>
void pack_transposed(const S* from, int64_t row, int64_t rows, int64_t features, char* to, Extent& extent) {
  constexpr int kParts = kPartsOf<S>;
  for (int64_t e = 0; e < features; e += kTileRows, to += kParts * kTileBytes) {
    Float squares[kParts][kTileRows];
    if (rows >= kTileDepth && e + kTileRows <= features) {
#pragma GCC unroll 16
      for (int64_t pair = 0; pair < kTileRows; ++pair) {
        const S* first = from + 2 * pair * row + e;
        Bits parts[kParts];
        load_pairs(first, first + row, kTileRows, parts, extent);
#pragma GCC unroll 3
        for (int part = 0; part < kParts; ++part) squares[part][pair] = (Float)parts[part];
      }
      store_transposed(squares, to);
      continue;
    }
    for (int64_t pair = 0; pair < kTileRows; ++pair) {
      const int64_t r = 2 * pair;
      const S* first = from + r * row + e;
      Bits parts[kParts];
      load_pairs(r < rows ? first : nullptr, r + 1 < rows ? first + row : nullptr, features - e, parts, extent);
      for (int part = 0; part < kParts; ++part) squares[part][pair] = (Float)parts[part];
    }
    store_transposed(squares, to);
  }
}

// Keys or values of a head in tiles, transposed or as they lie, a step of 32 of them when it is first asked for.
template <class S, bool kTransposed>
class Packed {
 public:
  Packed(Arena& arena, int64_t keys, int64_t features)
      : steps_(blocks_of(keys, kTileDepth)),
        features_(features),
        step_bytes_(kTransposed ? blocks_of(features, kTileRows) * kBytes : 2 * blocks_of(features, kTileDepth) * kBytes),
        data_(arena.take<char>(steps_ * step_bytes_)),
        states_(arena.take<State>(steps_)) {}

  // rows of keys 0 .. count, each number zero or of a size from least to most
  void start(const S* from, int64_t row, int64_t count, float least = 0, float most = 0) {
    least_ = least, most_ = most;
    if (from == from_ && row == row_ && count == count_) return;
    from_ = from, row_ = row, count_ = count;
    for (int64_t step = 0; step < blocks_of(count, kTileDepth); ++step) states_[step] = State::kMissing;
  }
  // of keys begin .. begin + n; begin is a multiple of 32
  TileMatrix tiles(int64_t begin, int64_t n) {
    const int64_t first = begin / kTileDepth;
    for (int64_t step = first; step * kTileDepth < begin + n; ++step) {
      if (states_[step] == State::kMissing) pack(step);
      refuses_ |= states_[step] == State::kRefused;
    }
    const char* data = data_ + first * step_bytes_;
    return kTransposed ? TileMatrix{data, kBytes, step_bytes_, 64} : TileMatrix{data, step_bytes_ / 2, kBytes, 64};
  }
  // whether a number that was asked for, since the last call, is of none of these sizes
  bool refuses() { return std::exchange(refuses_, false); }

 private:
  static constexpr int64_t kBytes = kPartsOf<S> * kTileBytes;
  enum class State : uint8_t { kMissing, kThere, kRefused };

  void pack(int64_t step) {
    const int64_t key = step * kTileDepth, rows = min(kTileDepth, count_ - key);
    const S* from = from_ + key * row_;
    Extent extent;
    if constexpr (kTransposed)
      pack_transposed(from, row_, rows, features_, data_ + step * step_bytes_, extent);
    else
      pack_lying(from, row_, rows, 2, features_, data_ + step * step_bytes_, extent);
    states_[step] = kPartsOf<S> == 1 || extent.within(least_, most_) ? State::kThere : State::kRefused;
  }

  int64_t steps_, features_, step_bytes_;
  char* data_;
  State* states_;
  const S* from_ = nullptr;
  int64_t row_ = 0, count_ = 0;
  float least_ = 0, most_ = 0;
  bool refuses_ = false;
};

// scores[key][lane] of keys that lie in rows, times packed features of the lanes
template <int NV>
void multiply_keys(const bfloat16* from, int64_t row, int64_t n, int64_t features, const char* packed, float* to, char* copy) {
  constexpr int64_t lanes = NV * 16;
  const int64_t depths = blocks_of(features, kTileDepth), whole = features % kTileDepth ? 0 : n / kTileRows;
  const TileMatrix right = packed_tiles(packed, depths);
  if (whole) {
    const TileMatrix left{reinterpret_cast<const char*>(from), kTileRows * row * 2, 64, row * 2};
    multiply_tiles<false, 1, NV <= 2>(left, whole, right, NV, depths, to, lanes * 4);
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

// What of float32 is multiplied in parts. Parts below 2^-126 are taken as zero: values and keys within these are exactly the sum of their
// parts, but for what is lost of keys or queries too small, which changes no score by more than 2^-126 times the largest of the others. Nor
// does a sum of products come near infinity. A query that is infinite or NaN has no number for a result however it is multiplied, and is
// nobody else's matter.
constexpr float kLeastOfParts = 0x1p-100f, kMostOfParts = 0x1p60f;

// The products of a block of queries.
template <class S>
class TileProduct : public Softmax<S> {
 public:
  using Softmax<S>::a, Softmax<S>::block, Softmax<S>::padded, Softmax<S>::row_of;
  using typename Softmax<S>::V;
  static constexpr int kParts = kPartsOf<S>;
  static constexpr int64_t W = 16, kKeys = kMostKeys;

  // `blocks` of queries take turns; whether keys are packed, or lie in rows
  TileProduct(const Attention& given, Arena& arena, int64_t blocks = 1, bool packs = false)
      : Softmax<S>(given, arena),
        packs_(packs),
        queries_bytes_(kMostVectors * blocks_of(a.features, kTileDepth) * kParts * kTileBytes),
        queries_(arena.take<char>(blocks * queries_bytes_)),
        copy_(packs ? nullptr : arena.take<char>(kMostKeys * blocks_of(max(a.features, a.value_features), kTileDepth) * 64)),
        weights_(arena.take<char>(kMostVectors * kRow)),
        keys_(arena, packs ? a.keys : 0, a.features),
        values_(arena, a.keys, a.value_features) {}

  // the queries of the block, which takes turn i
  void load(int64_t i = 0) {
    const S* from = static_cast<const S*>(a.q.data) + a.q.offset(a.cu_q ? 0 : block.b, block.h, block.s.first_q + block.first);
    Extent extent;
    pack_features(from, a.q.t, block.count, block.vectors, a.features, queries_ + i * queries_bytes_, extent);
    if (kParts == 3 && !extent.within(0, kMostOfParts)) refuses_ |= beyond(from);
    if (packs_) keys_.start(row_of(a.k, 0), a.k.t, block.s.keys, 0, kMostOfParts);
    if (a.v.given()) values_.start(row_of(a.v, 0), a.v.t, block.s.keys, kLeastOfParts, kMostOfParts);
  }

  // Of float: whether a number was met, since the last call, that is beyond what is multiplied in parts.
  bool refuses() {
    const bool keys = keys_.refuses(), values = values_.refuses();
    return std::exchange(refuses_, false) || keys || values;
  }

  template <int NV>
  void products(int64_t begin, int64_t n, float* to, int64_t i = 0) {
    const char* queries = queries_ + i * queries_bytes_;
    if constexpr (kParts == 1)
      if (!packs_) return multiply_keys<NV>(row_of(a.k, begin), a.k.t, n, a.features, queries, to, copy_);
    const int64_t depths = blocks_of(a.features, kTileDepth);
    multiply_tiles<false, kParts, kParts == 1 && NV <= 2>(keys_.tiles(begin, n), blocks_of(n, kTileRows), packed_tiles<kParts>(queries, depths),
                                                         NV, depths, to, NV * 64);
  }
  // Of bfloat16: the scores of 32 keys and of two vectors of lanes, if `has_squares`.
  bool has_squares() const { return packs_ || a.features % kTileDepth == 0; }
  Square square(int64_t begin, float* to, int64_t i) {
    const int64_t depths = blocks_of(a.features, kTileDepth), row = a.k.t * sizeof(S);
    const TileMatrix keys = packs_ ? keys_.tiles(begin, kTileDepth)
                                   : TileMatrix{reinterpret_cast<const char*>(row_of(a.k, begin)), kTileRows * row, 64, row};
    return {keys, packed_tiles<kParts>(queries_ + i * queries_bytes_, depths), depths, to};
  }
  template <int NV>
  void scores(int64_t begin, int64_t n, float* to, V (&largest)[NV], float* capped = nullptr, int64_t i = 0) {
    products<NV>(begin, n, to, i);
    this->template shape<NV>(begin, n, to, largest, capped);
  }

  // Where weights of a key and the next go, of the lanes of the first vector.
  char* pairs(int64_t key) const { return weights_ + key / kTileDepth * kParts * kTileBytes + key % kTileDepth / 2 * 64; }
  // The weights of two keys, next to one another, of the lanes of vector v.
  static FASTSEQ_HOST_DEVICE void put(char* to, int64_t v, V first, V second) {
    Bits parts[kParts];
    if constexpr (kParts == 1)
      parts[0] = in_pairs(rounded_both(first, second));
    else
      parts_of_pairs<false>(first, second, parts);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) __builtin_memcpy(to + v * kRow + part * kTileBytes, &parts[part], 64);
  }
  // The same of positive numbers that half of what bfloat16 tells apart was added to already, or is added here: then the upper half is the
  // rounded number. Gives the sum of both, rounded. An instruction rounds, too, but takes twice the time, and so does one that sums.
  template <bool kAdded>
  static FASTSEQ_HOST_DEVICE V put_rounded(char* to, int64_t v, V first, V second) {
    typedef Lanes<float>::U Words;
    constexpr uint32_t kUpper = 0xffff0000, half = kAdded ? 0 : 0x8000;
    const Words a = (Words)first + half, b = ((Words)second + half) & kUpper;
    const Bits pair = (Bits)(a >> 16 | b);
    __builtin_memcpy(to + v * kRow, &pair, 64);
    return (V)(a & kUpper) + (V)b;
  }
  // The same in two parts, of at most two vectors: what is cut off lies where those of two more would.
  static FASTSEQ_HOST_DEVICE void put_split(char* to, int64_t v, V first, V second) {
    typedef Lanes<float>::U Words;
    constexpr uint32_t kUpper = 0xffff0000;
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      const Words a = (Words)first & kUpper, b = (Words)second & kUpper;
      const Bits pair = (Bits)(a >> 16 | b);
      __builtin_memcpy(to + (v + part * kMostVectors / 2) * kRow, &pair, 64);
      first -= (V)a, second -= (V)b;
    }
  }
  // those of the keys n .. of the step that n ends in are zero
  template <int NV>
  void put_zeros(int64_t n) {
    for (int64_t key = blocks_of(n, 2) * 2; key % kTileDepth; key += 2)
      for (int64_t v = 0; v < NV; ++v) put(pairs(key), v, V{}, V{});
  }
  template <int NV>
  void put_split_zeros(int64_t n) {
    for (int64_t key = blocks_of(n, 2) * 2; key % kTileDepth; key += 2)
      for (int64_t v = 0; v < NV; ++v) put_split(pairs(key), v, V{}, V{});
  }
  // sums[feature][lane] (+)= what keys begin .. begin + n have of the weights that were put
  template <int NV, bool kAdd = true>
  void add(int64_t begin, int64_t n, float* sums) {
    const TileMatrix right{weights_, kRow, kParts * kTileBytes, 64};
    multiply_tiles<kAdd, kParts, kParts == 1 && NV <= 2>(values_.tiles(begin, n), blocks_of(a.value_features, kTileRows), right, NV,
                                                        blocks_of(n, kTileDepth), sums, NV * 64);
  }

  // the same of the lower parts
  template <int NV>
  void add_split(int64_t begin, int64_t n, float* sums) {
    const TileMatrix right{weights_ + kMostVectors / 2 * kRow, kRow, kTileBytes, 64};
    multiply_tiles<true, 1, NV <= 2>(values_.tiles(begin, n), blocks_of(a.value_features, kTileRows), right, NV, blocks_of(n, kTileDepth),
                                     sums, NV * 64);
  }

  // the weights [key][lane] of n keys
  template <int NV>
  void put_all(int64_t n, const float* weights) {
    constexpr int64_t lanes = NV * W;
    for (int64_t key = 0; key < n; key += 2)
      for (int64_t v = 0; v < NV; ++v) {
        const float* at = weights + key * lanes + v * W;
        put(pairs(key), v, load_vector(at), key + 1 < n ? load_vector(at + lanes) : V{});
      }
    put_zeros<NV>(n);
  }
  template <int NV, bool>
  void weigh(int64_t begin, int64_t n, const float* weights, const V (&)[NV], float* sums) {
    put_all<NV>(n, weights);
    add<NV>(begin, n, sums);
  }
  void put_out(const float* sums, const float* factors) const { block.store(sums, a.value_features, factors, a.out); }

 private:
  // whether a finite number of the queries is too large for parts
  bool beyond(const S* from) const {
    if constexpr (kParts == 3)
      for (int64_t i = 0; i < block.count; ++i)
        for (int64_t e = 0; e < a.features; ++e) {
          const float size = std::fabs(from[i * a.q.t + e]);
          if (size > kMostOfParts && size < INFINITY) return true;
        }
    return false;
  }

  [[no_unique_address]] const Multiplier multiplier_{};
  static constexpr int64_t kRow = kMostKeys / kTileDepth * kParts * kTileBytes;  // of the weights, from a vector of lanes to the next
  const bool packs_;
  const int64_t queries_bytes_;
  char *queries_, *copy_, *weights_;
  Packed<S, false> keys_;
  Packed<S, true> values_;
  bool refuses_ = false;
};

// 2^t: infinity where that is more than a float holds; of t < -126 not less than 2^-126, or, if kZeroes, nothing. A NaN stays one.
// kHalf: half of what bfloat16 tells apart is added.
template <class M, bool kZeroes, bool kHalf = false>
FASTSEQ_HOST_DEVICE Float power_of_two(Float t) {
  constexpr float kLeast = -126, kRound = Lanes<float>::kRound;
  const __mmask16 some = kZeroes ? _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(kLeast), _CMP_NLT_UQ) : 0xffff;
  t = Math<float>::at_least(t, kLeast);
  if constexpr (std::is_same_v<M, ShortMath>) {  // minimax of (2^f - 1) / f on [0, 1], relative error 3e-6
    constexpr float one = kHalf ? 1 + 0x1p-8f : 1;
    const Float f = (Float)_mm512_reduce_ps((__m512)t, 0x9);  // t less the integer below, which is what scalef takes of it
    const Float q = (((0.01342669f * f + 0.05224246f) * f + 0.24128021f) * f + 0.69304484f) * f + one;
    return (Float)_mm512_maskz_scalef_ps(some, (__m512)q, (__m512)t);
  }
  static_assert(!kHalf || std::is_same_v<M, ShortMath>);
  const Float n = (t + kRound) - kRound, f = t - n;
  constexpr int last = sizeof(M::kExp2) / sizeof(float) - 1;
  Float q = Float{} + M::kExp2[last];
#pragma GCC unroll 16
  for (int i = last - 1; i >= 0; --i) q = q * f + M::kExp2[i];
  return (Float)_mm512_maskz_scalef_ps(some, (__m512)(q * f + 1.0f), (__m512)n);
}

// out and lse. A task is a few blocks of queries of a head, that take turns with each chunk of keys: so keys and values of long sequences
// are fetched once for all of them.
template <class S>
class TileForward {
 public:
  using V = Math<float>::V;
  using M = Exponential<S>;
  static constexpr int64_t W = 16, kLanes = 32;  // of a block

  // queries of a task
  static int64_t lanes(const Attention& a) { return blocks_of_task(a) * kLanes; }

  TileForward(const Attention& given, Arena arena)
      : a(given),
        blocks_(blocks_of_task(a)),
        keys_(a.value_features > 96 && (kFolds || (a.right < 0 && a.keys >= 512)) ? kMostKeys : kMostKeys / 2),
        rows_(given, arena, blocks_, kFolds || a.queries > 512),
        sums_size_(rows_.padded(a.value_features) * kLanes),
        scores_(arena.take<float>(keys_ * kLanes)),
        of_steps_(kFolds ? nullptr : arena.take<float>(2 * kTileDepth * kLanes)),
        weights_(a.dropout > 0 ? arena.take<float>(keys_ * kLanes) : nullptr),
        fresh_(kFolds ? arena.take<float>(sums_size_) : nullptr),
        sums_(arena.take<float>(blocks_ * sums_size_)),
        used(arena.used()) {}

  // False: a number of float was met that is beyond what is multiplied in parts. Then the results are not to be used.
  bool run(int64_t b, int64_t h, int64_t first, int64_t count) {
    const Attention::Sequence s = a.sequence(b);
    const int64_t blocks = blocks_of(count, kLanes);
    const auto place = [&](int64_t i) { rows_.block.place(b, h, s, first + i * kLanes, min(kLanes, count - i * kLanes)); };
    int64_t begin[kMostBlocks], end[kMostBlocks], lowest = s.keys, highest = 0;
    rows_.refuses();  // of the task before
    for (int64_t i = 0; i < blocks; ++i) {
      place(i), rows_.load(i);
      rows_.block.keys(begin[i], end[i]);
      lowest = min(lowest, begin[i]), highest = max(highest, end[i]);
      for (V& v : base_[i]) v = V{} - INFINITY;
      for (V& v : total_[i]) v = V{};
      for (V& v : rounded_[i]) v = V{};
      started_[i] = false;
    }
    // The scores of the turn that `t` stands at, or of the next one that some query sees, or those of its first step, which may be left to be
    // multiplied; false: there is none.
    const auto forms = [&](Turn& t, Square& square) {
      for (; t.chunk < highest; t.chunk += keys_, t.i = 0)
        for (; t.i < blocks; ++t.i) {
          t.begin = max(t.chunk, begin[t.i]), t.n = min(t.chunk + keys_, end[t.i]) - t.begin;
          if (t.n <= 0) continue;
          if (blocks > 1) place(t.i);
          if (rows_.block.look(t.begin, t.n) == Seen::kNone) continue;
          t.vectors = rows_.block.vectors;
          t.in_steps = !kFolds && t.vectors > 1 && rows_.plain() && a.dropout == 0 && rows_.has_squares();
          if (t.in_steps)
            form_step(t, 0, square);
          else if (t.vectors > 1)
            rows_.template products<2>(t.begin, t.n, scores_, t.i);
          else
            rows_.template products<1>(t.begin, t.n, scores_, t.i);
          return true;
        }
      return false;
    };
    Turn turn{lowest, 0, 0, 0, 0, false};
    Square square;
    bool more = forms(turn, square);
    square.multiply([] {});
    while (more) {
      Turn next{turn.chunk, turn.i + 1, 0, 0, 0, false};
      const auto ahead = [&] {
        Square square;
        more = forms(next, square);
        return square;
      };
      if (turn.vectors > 1)
        step<2>(turn, ahead);
      else
        step<1>(turn, ahead);
      if (kFolds && rows_.refuses()) return false;
      turn = next;
    }
    for (int64_t i = 0; i < blocks; ++i) {
      if (blocks > 1) place(i);
      if (rows_.block.vectors > 1)
        store<2>(i);
      else
        store<1>(i);
    }
    return true;
  }

 private:
  static constexpr int64_t kMostBlocks = 4;
  // Long sums are more exact if those of each chunk are added to the others: what float's softmax has to be.
  static constexpr bool kFolds = kPartsOf<S> > 1;
  static constexpr bool kRounds = !kFolds;  // the weights
  // Keys up to which bfloat16's weights, if no gradient needs the same again, are multiplied in two parts: so the result has no error but that
  // of its own rounding. A third more arithmetic, which is a small part of a short call, and more than a longer one has to spare.
  static constexpr int64_t kSplitKeys = 64;
  bool splits() const { return kRounds && a.keys <= kSplitKeys && !a.lse && a.dropout == 0; }

  static int64_t blocks_of_task(const Attention& a) {
    constexpr int64_t kNear = 1 << 20;  // what stays in the second-level cache, beside all else
    const int64_t bytes = a.keys * (a.features + a.value_features) * kPartsOf<S> * sizeof(bfloat16);
    return bytes > kNear && !a.relative_q.given() ? min(kMostBlocks, blocks_of(a.queries, kLanes)) : 1;
  }

  // A chunk of keys for one of the blocks.
  struct Turn {
    int64_t chunk, i;           // the chunk's first key, the block
    int64_t begin, n, vectors;  // the keys of it that the block may see; the block's vectors
    bool in_steps;              // whether its scores are formed 32 keys at a time, since each stays as it is formed
  };

  // Scores of all keys of a turn, formed before.
  struct Whole {
    const float* scores;
    int64_t lanes;

    const float* of(int64_t step) const { return scores + step * lanes; }
    template <class Weigh>
    FASTSEQ_HOST_DEVICE void operator()(int64_t, int64_t pairs, const Weigh& weigh) const {
      weigh(pairs);
    }
  };

  // Scores of a step at a time: those of the next step, or of the next turn's first, are formed beside the weights of this one. Neither the
  // vectors nor the tiles fill all of a core, and what one waits for, the other uses.
  template <class Ahead>
  struct InSteps {
    TileForward& forward;
    const Turn& turn;
    const Ahead& ahead;

    const float* of(int64_t) const { return forward.scores_of_step(); }
    template <class Weigh>
    FASTSEQ_HOST_DEVICE void operator()(int64_t step, int64_t pairs, const Weigh& weigh) const {
      Square square;
      if (step + kTileDepth < turn.n)
        forward.form_step(turn, step + kTileDepth, square);
      else
        square = ahead();
      const int64_t each = square.depths ? pairs / square.depths : 0;
      square.multiply([&]() __attribute__((always_inline)) { weigh(each); });
      weigh(pairs - each * square.depths);
    }
  };

  float* scores_of_step() const { return of_steps_ + place_ * kTileDepth * kLanes; }
  // Scores of a turn's keys from `at` on, in the other place; or what is to be multiplied for them.
  void form_step(const Turn& turn, int64_t at, Square& square) {
    place_ ^= 1;
    if (turn.n - at >= kTileDepth)
      square = rows_.square(turn.begin + at, scores_of_step(), turn.i);
    else
      rows_.template products<2>(turn.begin + at, turn.n - at, scores_of_step(), turn.i);
  }

  // Weighs the scores of a turn and adds its values. Before it ends, ahead() forms the scores of the next turn, or tells what is to be
  // multiplied for them: its tiles are multiplied while the weights are still on their way to the cache, and its scores have arrived there
  // before they are wanted. Not of parts, three times as large, which it would displace.
  template <int NV, class Ahead>
  void step(const Turn& turn, const Ahead& ahead) {
    constexpr int64_t lanes = NV * W;
    const int64_t i = turn.i, begin = turn.begin, n = turn.n, values = a.value_features * lanes;
    Block<S>& block = rows_.block;
    float* all = sums_ + i * sums_size_;
    V sums[NV]{}, rounded[NV]{}, alpha[NV];
    __mmask16 others[NV];
    for (int v = 0; v < NV; ++v) alpha[v] = V{} + 1.0f, others[v] = 0xffff;
    const Whole whole{scores_, lanes};
    if (turn.in_steps) {
      if constexpr (!kFolds && NV > 1)
        weigh_rounded<NV>(turn, InSteps<Ahead>{*this, turn, ahead}, scores_of_step(), sums, rounded, alpha);
    } else if (!rows_.plain()) {
      V largest[NV];
      block.template shape<NV>(scores_, begin, n, largest);
      if (!kFolds && a.dropout == 0 && !block.hides() && block.moderate()) {
        weigh_rounded<NV>(turn, whole, scores_, sums, rounded, alpha);
      } else {
        raise<NV>(i, scores_, n, others, alpha);
        weigh<NV, true>(i, n, whole, sums, rounded);
      }
    } else if constexpr (!kFolds) {
      weigh_rounded<NV>(turn, whole, scores_, sums, rounded, alpha);
    } else if (!weighs_as_before<NV>(i, n, sums, rounded, others)) {
      raise<NV>(i, scores_, n, others, alpha);
      weigh<NV, false>(i, n, whole, sums, rounded);
    }
    for (int v = 0; v < NV; ++v) {
      total_[i][v] = total_[i][v] * alpha[v] + sums[v];
      if (kRounds) rounded_[i][v] = rounded_[i][v] * alpha[v] + rounded[v];
    }
    if (a.dropout > 0) {
      block.template drop<NV>(begin, n, [&](int64_t at, V keep) { store_vector(weights_ + at, load_vector(weights_ + at) * keep); });
      rows_.template put_all<NV>(n, weights_);
    } else if (splits()) {
      rows_.template put_split_zeros<NV>(n);
    } else {
      rows_.template put_zeros<NV>(n);
    }
    if (!kFolds && !turn.in_steps) ahead().multiply([] {});
    const auto rescale = [&](auto&& added) __attribute__((always_inline)) {
      for (int64_t x = 0; x < values; x += lanes)
        for (int v = 0; v < NV; ++v) store_vector(all + x + v * W, load_vector(all + x + v * W) * alpha[v] + added(x + v * W));
    };
    if (!started_[i]) {
      rows_.template add<NV, false>(begin, n, all);
      started_[i] = true;
    } else if constexpr (kFolds) {
      rows_.template add<NV, false>(begin, n, fresh_);
      rescale([&](int64_t at) __attribute__((always_inline)) { return load_vector(fresh_ + at); });
    } else {
      uint32_t moved = 0;
      for (int v = 0; v < NV; ++v) moved |= _mm512_cmp_ps_mask((__m512)alpha[v], _mm512_set1_ps(1), _CMP_NEQ_UQ);
      if (moved) rescale([](int64_t) { return V{}; });
      rows_.template add<NV>(begin, n, all);
    }
    if constexpr (!kFolds)
      if (splits()) rows_.template add_split<NV>(begin, n, all);
    if constexpr (kFolds) ahead();
  }

  static constexpr float kLeast = 0x1p-4f, kMost = 0x1p40f;  // of the sum of a chunk's weights

  // Weighs a chunk of bfloat16 by the base that is there, or by the highest score of its first step, `first`: where few keys are seen, its
  // weight of 1 is exact. If weights get out of bounds, which is seldom, all scores that did not stay are formed once more.
  template <int NV, class Scores>
  void weigh_rounded(const Turn& turn, const Scores& scores, const float* first, V (&sums)[NV], V (&rounded)[NV], V (&alpha)[NV]) {
    const int64_t i = turn.i;
    __mmask16 lanes[NV], any = 0;
    for (int v = 0; v < NV; ++v) {
      lanes[v] = _mm512_cmp_ps_mask((__m512)base_[i][v], _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
      any |= lanes[v];
    }
    if (any) raise<NV>(i, first, min(turn.n, kTileDepth), lanes, alpha);
    weigh<NV, false>(i, turn.n, scores, sums, rounded);
    any = 0;
    for (int v = 0; v < NV; ++v) lanes[v] = _mm512_cmp_ps_mask((__m512)sums[v], _mm512_set1_ps(kMost), _CMP_NLE_UQ), any |= lanes[v];
    if (!any) return;
    V less[NV];
    if constexpr (!std::is_same_v<Scores, Whole>) rows_.template products<NV>(turn.begin, turn.n, scores_, i);
    raise<NV>(i, scores_, turn.n, lanes, less);
    for (int v = 0; v < NV; ++v) alpha[v] *= less[v];
    weigh<NV, false>(i, turn.n, Whole{scores_, NV * W}, sums, rounded);
  }

  // Weighs a chunk of numbers in parts by the base that is there, at first 0, if that serves: weights are numbers of any size, and seldom does a
  // chunk have scores so much higher than those before, or the first scores so far from 0, that they get out of bounds: in some `others` of
  // the lanes.
  template <int NV>
  bool weighs_as_before(int64_t i, int64_t n, V (&sums)[NV], V (&rounded)[NV], __mmask16 (&others)[NV]) {
    __mmask16 first[NV], any = 0;
    for (int v = 0; v < NV; ++v) first[v] = _mm512_cmp_ps_mask((__m512)base_[i][v], _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
    weigh<NV, false>(i, n, Whole{scores_, NV * W}, sums, rounded);
    for (int v = 0; v < NV; ++v) {
      others[v] = _mm512_cmp_ps_mask((__m512)sums[v], _mm512_set1_ps(kMost), _CMP_NLE_UQ) |
                  (first[v] & _mm512_cmp_ps_mask((__m512)sums[v], _mm512_set1_ps(kLeast), _CMP_LT_OQ));
      base_[i][v] = (V)_mm512_mask_blend_ps(others[v], (__m512)rows_.base_of(base_[i][v]), (__m512)base_[i][v]), any |= others[v];
    }
    return !any;
  }

  // The base of each of these lanes becomes its highest of n scores, if that is higher; alpha: what it leaves of what was summed before.
  template <int NV>
  void raise(int64_t i, const float* scores, int64_t n, const __mmask16 (&lanes)[NV], V (&alpha)[NV]) {
    V most[NV];
    for (int v = 0; v < NV; ++v) most[v] = V{} - INFINITY;
    for (int64_t x = 0; x < n * NV * W; x += NV * W)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V score = load_vector(scores + x + v * W);
        most[v] = score > most[v] ? score : most[v];
      }
    for (int v = 0; v < NV; ++v) {
      const V before = base_[i][v], own = (V)_mm512_mask_blend_ps(lanes[v], (__m512)before, (__m512)most[v]);
      const V next = own > before ? own : before, from = rows_.base_of(next);
      alpha[v] = power_of_two<M, true>((before - from) * unit() + (rest_of(from) - rest_of(before))), base_[i][v] = next;
    }
  }

  // Scores become weights, operands of the product, and their sums, before and after they are rounded; with a dropout, numbers. Scores that a bias has put at the end of the range
  // are subtracted before they are multiplied.
  template <int NV, bool kZeroes, class Scores>
  void weigh(int64_t i, int64_t n, const Scores& scores, V (&sums)[NV], V (&rounded)[NV]) {
    if constexpr (std::is_same_v<Scores, Whole>)
      if (a.dropout > 0) return weigh<NV, kZeroes, true, true, false>(i, n, scores, sums, rounded);
    if constexpr (kRounds) {
      if (splits()) return weigh<NV, kZeroes, true, false, true>(i, n, scores, sums, rounded);
      if (!a.lse && !a.sinks) return weigh<NV, kZeroes, false, false, false>(i, n, scores, sums, rounded);
    }
    weigh<NV, kZeroes, true, false, false>(i, n, scores, sums, rounded);
  }
  // kExact: whether sums of the weights themselves are wanted
  template <int NV, bool kZeroes, bool kExact, bool kDrops, bool kSplits, class Scores>
  void weigh(int64_t i, int64_t n, const Scores& scores, V (&sums)[NV], V (&rounded)[NV]) {
    constexpr int64_t lanes = NV * W;
    const float factor = unit();
    V base[NV], power[NV], rest[NV], all[NV], of_rounded[NV];  // the sums in registers, since what is stored might be theirs elsewhere
    for (int v = 0; v < NV; ++v) {
      base[v] = rows_.base_of(base_[i][v]), all[v] = of_rounded[v] = V{};
      power[v] = base[v] * factor, rest[v] = rest_of(base[v]);
    }
    const auto weight = [&](const float* at, int v) __attribute__((always_inline)) {
      const V score = load_vector(at), exponent = kZeroes ? (score - base[v]) * factor + rest[v] : score * factor - power[v];
      const V w = power_of_two<M, kZeroes, kRounds && !kExact>(exponent);
      if constexpr (kDrops) store_vector(weights_ + (at - scores.scores), w);
      return w;
    };
    const auto put = [&](char* to, int v, V first, V second) __attribute__((always_inline)) {
      if constexpr (kExact) all[v] += first + second;
      if constexpr (kDrops)
        return;
      else if constexpr (kSplits)
        rows_.put_split(to, v, first, second);
      else if constexpr (kRounds)
        of_rounded[v] += rows_.template put_rounded<!kExact>(to, v, first, second);
      else
        rows_.put(to, v, first, second);
    };
    for (int64_t step = 0; step < n; step += kTileDepth) {
      const int64_t there = min(kTileDepth, n - step);
      const float* from = scores.of(step);
      char* to = rows_.pairs(step);
      scores(step, there / 2, [&](int64_t pairs) __attribute__((always_inline)) {
        for (; pairs > 0; --pairs, from += 2 * lanes, to += 64)
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) put(to, v, weight(from + v * W, v), weight(from + lanes + v * W, v));
      });
      if (there % 2)
        for (int v = 0; v < NV; ++v) put(to, v, weight(from + v * W, v), V{});
    }
    for (int v = 0; v < NV; ++v) {
      sums[v] = kExact ? all[v] : of_rounded[v];
      rounded[v] = kDrops || kSplits ? all[v] : of_rounded[v];
      if constexpr (kExact) rounded[v] = all[v] == all[v] ? rounded[v] : all[v];  // a NaN, whatever became of its bits
    }
  }
  // what rounding takes from the power of two of a base
  V rest_of(V base) const {
    const __m512 factor = _mm512_set1_ps(unit()), b = (__m512)base;
    const V rest = (V)_mm512_fmsub_ps(b, factor, _mm512_mul_ps(b, factor));
    return rest - rest == 0 ? rest : V{};  // beyond the range there is none
  }
  // of scores in a power of two
  float unit() const { return rows_.block.factor() * Lanes<float>::kLog2e; }

  template <int NV>
  void store(int64_t i) {
    V highest[NV], total[NV], rounded[NV];
    for (int v = 0; v < NV; ++v) highest[v] = base_[i][v], total[v] = total_[i][v], rounded[v] = kRounds ? rounded_[i][v] : total[v];
    rows_.template finish<NV>(highest, total, rounded);
    if (!started_[i]) __builtin_memset(sums_ + i * sums_size_, 0, sums_size_ * sizeof(float));
    if constexpr (kPartsOf<S> == 1)
      put_out<NV>(sums_ + i * sums_size_);
    else
      rows_.block.store(sums_ + i * sums_size_, a.value_features, rows_.factors(), a.out);
  }

  // Rows [feature][lane] times their factors as rows of bfloat16: rounded before they are transposed, two features as one number.
  template <int NV>
  void put_out(const float* from) const {
    const Block<S>& block = rows_.block;
    S* to = static_cast<S*>(a.out.data) + a.out.offset(a.cu_q ? 0 : block.b, block.h, block.s.first_q + block.first);
    const int64_t features = a.value_features;
    for (int64_t v = 0; v < NV; ++v) {
      const V factor = load_vector(rows_.factors() + v * W);
      const auto feature = [&](int64_t f) { return f < features ? load_vector(from + (f * NV + v) * W) * factor : V{}; };
      for (int64_t e = 0; e < features; e += kTileDepth) {
        Float square[W];
#pragma GCC unroll 16
        for (int64_t pair = 0; pair < W; ++pair)
          square[pair] = (Float)in_pairs(rounded_both(feature(e + 2 * pair), feature(e + 2 * pair + 1)));
        transpose<8, 16>(square);
        const uint32_t mask = features - e < kTileDepth ? (uint32_t(1) << (features - e)) - 1 : ~uint32_t(0);
        for (int64_t r = 0; r < min(W, block.count - v * W); ++r)
          _mm512_mask_storeu_epi16(to + (v * W + r) * a.out.t + e, mask, (__m512i)square[r]);
      }
    }
  }

  const Attention& a;
  const int64_t blocks_, keys_;  // of a task; of a chunk, which is to stay in the first-level cache with all that it meets
  TileProduct<S> rows_;
  const int64_t sums_size_;  // of a block
  float *scores_, *of_steps_, *weights_, *fresh_, *sums_;
  int64_t place_ = 0;  // of the two for the scores of a step, that of the step under way
  bool started_[kMostBlocks];  // whether a block has sums
  V base_[kMostBlocks][2], total_[kMostBlocks][2], rounded_[kMostBlocks][2];  // weights are e^(score - base)

 public:
  const int64_t used;
};

// The gradients that a part of the queries of a key head's query heads gives.
class TileBackward : public BackwardRows<bfloat16, TileProduct> {
  using S = bfloat16;
  static constexpr int64_t kLanes = 64;

 public:
  TileBackward(const AttentionBackward& given, Arena arena)
      : BackwardRows(given, arena),
        dout_features_(arena.take<char>(kMostVectors * blocks_of(Ev, kTileDepth) * kTileBytes)),
        out_features_(arena.take<char>(Multiplier::kVectors ? kMostVectors * blocks_of(Ev, kTileDepth) * kTileBytes : 0)),
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
    const int64_t group = a.heads / a.key_heads, lanes = a.right >= 0 ? Multiplier::kCausalLanes : kLanes, blocks = blocks_of(s.queries, lanes);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; ++h)
      for (int64_t block = blocks * p / parts; block < blocks * (p + 1) / parts; ++block) {
        const int64_t first = block * lanes;
        rows_.block.place(b, h, s, first, min(lanes, s.queries - first));
        behind_ = block + 1 < blocks * (p + 1) / parts ? min(lanes, s.queries - first - lanes) : 0;
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
    Extent ignored;
    if (g.dout.given()) pack_features(dout, g.dout.t, block.count, NV, Ev, dout_features_, ignored);
    if (g.dk.given()) pack_rows(queries, a.q.t, block.count, steps, E, query_pairs_);
    if (g.dv.given()) pack_rows(dout, g.dout.t, block.count, steps, Ev, dout_pairs_);
    if (g.dq.given()) keys_.start(rows_.row_of(a.k, 0), a.k.t, block.s.keys);
    Lse<NV> lse{{}, {}, Weigher<M, float, NV>(block.factor())};
    V delta[NV];
    if constexpr (Multiplier::kVectors)
      prepare<NV>(lse, delta, [&] { sum_pairs<NV>(delta); });
    else
      prepare<NV>(lse, delta);
    int64_t begin, end;
    block.keys(begin, end);
    alone_ = end - begin <= kChunk;
    if (g.dweights.given() && !alone_) look_at_weights<NV>(begin, end, lse, delta);
    for (int64_t j = begin; j < end; j += kChunk) {
      const int64_t n = min(kChunk, end - j);
      if (block.look(j, n) == Seen::kNone) continue;
      fetch_ahead(j - begin, n, end - begin);
      const auto multiply = [&](int64_t first, int64_t count) {
        rows_.template products<NV>(first, count, weights_);
        if (!rows_.plain()) {
          V largest[NV];
          block.template shape<NV>(weights_, first, count, largest, capped_);
        }
        if (g.dout.given())
          multiply_keys<NV>(rows_.row_of(a.v, first), a.v.t, count, Ev, dout_features_, gradients_, copy_);
        else
          __builtin_memset(gradients_, 0, count * lanes * sizeof(float));
      };
      if (plain()) {
        const int64_t step = rows_.plain() ? Multiplier::kStep : kChunk;
        for (int64_t first = 0; first < n; first += step) {
          const int64_t count = min(step, n - first);
          multiply(j + first, count);
          with_weights<NV>(lse, [&](const auto& weight_of) __attribute__((always_inline)) {
            round<NV>(first, count, [&](int64_t at, int v, V& weight, V& gradient) __attribute__((always_inline)) {
              weight = weight_of(load_vector(weights_ + at), v), gradient = weight * (load_vector(gradients_ + at) - delta[v]);
            });
          });
        }
      } else {
        multiply(j, n);
        if (direct()) {
          with_weights<NV>(lse, [&](const auto& weight_of) __attribute__((always_inline)) {
            for (int64_t x = 0; x < n * lanes; x += lanes)
#pragma GCC unroll 4
              for (int v = 0; v < NV; ++v) {
                const int64_t at = x + v * W;
                const V weight = weight_of(load_vector(weights_ + at), v);
                store_vector(weights_ + at, weight), store_vector(gradients_ + at, weight * (load_vector(gradients_ + at) - delta[v]));
              }
          });
        } else {
          weigh<NV>(n, lse);
          form_gradients<NV>(j, n, delta);
        }
        through_scores<NV>(j, n);
        round<NV>(0, n, [&](int64_t at, int, V& weight, V& gradient) __attribute__((always_inline)) {
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

  // delta, of dout and out, as the products of vectors sum it
  template <int NV>
  void sum_pairs([[maybe_unused]] V (&delta)[NV]) {
    if constexpr (Multiplier::kVectors) {
      const int64_t steps = blocks_of(Ev, kTileDepth);
      Extent ignored;
      pack_features(of_queries(g.out), g.out.t, rows_.block.count, NV, Ev, out_features_, ignored);
      for (int64_t pair = 0; pair < steps * kTileRows; ++pair)
        for (int v = 0; v < NV; ++v) {
          const int64_t at = v * steps * kTileBytes + pair * 64;
          delta[v] = (V)_mm512_dpbf16_ps((__m512)delta[v], (__m512bh)_mm512_load_si512(out_features_ + at),
                                         (__m512bh)_mm512_load_si512(dout_features_ + at));
        }
    }
  }

  // With the keys at `done` of `all`, n of them: what the block behind reads, a share of it.
  void fetch_ahead(int64_t done, int64_t n, int64_t all) const {
    if constexpr (!Multiplier::kVectors) return;
    const int64_t from = behind_ * done / all, to = behind_ * (done + n) / all, count = rows_.block.count;
    for (const auto& [rows, features] : {std::pair{&a.q, E}, std::pair{&g.dout, Ev}, std::pair{&g.out, Ev}})
      for (int64_t i = from; rows->given() && i < to; ++i) {
        const auto* row = reinterpret_cast<const char*>(of_queries(*rows) + (count + i) * rows->t);
        for (int64_t at = 0; at < features * 2; at += 64) __builtin_prefetch(row + at, 0, 2);
      }
  }

  // Weights and gradients of n keys from `first` of a chunk on, get(place, vector, weight, gradient), as operands: rows of lanes, and pairs of
  // keys; zeros up to a whole step of either. Places are those of n keys.
  template <int NV, class Get>
  void round(int64_t first, int64_t n, const Get& get) {
    constexpr int64_t lanes = NV * W;
    char *const weight_rows = weight_rows_ + first * kLanes * 2, *const gradient_rows = gradient_rows_ + first * kLanes * 2;
    char* const gradient_pairs = gradient_pairs_ + first / kTileDepth * kTileBytes;
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
          __builtin_memcpy(weight_rows + at, &weights, 64), __builtin_memcpy(gradient_rows + at, &gradients, 64);
        }
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Bits pairs = in_pairs(rounded_both(gradient[0][v], gradient[1][v]));
        __builtin_memcpy(gradient_pairs + (v * kChunk + key / kTileDepth * kTileDepth) / kTileDepth * kTileBytes + key % kTileDepth / 2 * 64,
                         &pairs, 64);
      }
    }
  }

  char *dout_features_, *out_features_, *query_pairs_, *dout_pairs_, *copy_, *weight_rows_, *gradient_rows_, *gradient_pairs_;
  Packed<S, true> keys_;
  float* sums_ = nullptr;
  int64_t behind_ = 0;  // queries of the next block, if there is one

 public:
  const int64_t used;
};
