// Attention of few rows for one instruction set; contracts stand in attention_few.h. Included by attention_few_<level>.cpp, which defines
// FASTSEQ_LEVEL, FASTSEQ_VECTOR_BYTES and FASTSEQ_VECTOR_REGISTERS, and for the kernels of bfloat16 by AMX FASTSEQ_TILES. With the flags of
// AVX512-BF16 there are kernels of bfloat16 alone.
//
// What bounds such a call is how fast keys and values come from memory: each is read once, where it lies, for all rows of its head.
// A vector of products with a key holds a group of rows, made up to a power of two, L, and W / L of their features each, so that adding
// up across lanes, of W / L keys together, costs little; scores, weights and maxima then lie as [key, L]. Weighted sums of values have
// features in their lanes.
// Where there are products of pairs of bfloat16, a lane is a pair of features.
// By tiles, 16 keys are multiplied as they lie with all rows of a group; what comes out has the same places. So are values, in pairs of
// keys side by side, once there are rows enough to pay for that.

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/portable.h"
#include "attention_few.h"

namespace fastseq::cpu::FASTSEQ_LEVEL {
namespace {

#include "vector.inl"
#include "transpose.inl"
#if defined(FASTSEQ_TILES)
#include "tiles.inl"
#endif

// What one load of features fills: a vector or, of bfloat16, two, of even and of odd features, which a shift and a mask tell apart.
template <class S, class A>
struct Chunk {
  using V = typename Lanes<A>::V;
  static constexpr int kVectors = 1;
  static constexpr int64_t kFeatures = sizeof(V) / sizeof(A);

  static FASTSEQ_HOST_DEVICE void load(const S* p, V* v) { v[0] = Memory<S, A>::load(p, kFeatures); }
  // the first n < kFeatures, beside zeros
  static FASTSEQ_HOST_DEVICE void load_some(const S* p, int64_t n, V* v) { v[0] = Memory<S, A>::load(p, n); }
  static FASTSEQ_HOST_DEVICE void store(S* p, int64_t n, const V* v) { Memory<S, A>::store(p, v[0], n); }
};

template <>
struct Chunk<bfloat16, float> {
  using V = Lanes<float>::V;
  using U = Lanes<float>::U;
  using H = Halves<bfloat16>::H;
  static constexpr int kVectors = 2;
  static constexpr int W = sizeof(V) / sizeof(float);
  static constexpr int64_t kFeatures = 2 * W;

  static FASTSEQ_HOST_DEVICE void load(const bfloat16* p, V* v) {
    U bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    parted(bits, v);
  }
  static FASTSEQ_HOST_DEVICE void load_some(const bfloat16* p, int64_t n, V* v) {
#if defined(__AVX512BW__)
    parted((U)_mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p), v);
#else
    uint16_t some[kFeatures] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i].bits;
    U bits;
    __builtin_memcpy(&bits, some, sizeof bits);
    parted(bits, v);
#endif
  }
  static FASTSEQ_HOST_DEVICE void store(bfloat16* p, int64_t n, const V* v) {
    const H even = Halves<bfloat16>::narrowed(v[0]), odd = Halves<bfloat16>::narrowed(v[1]);
    for (int64_t i = 0; i < n; ++i) p[i].bits = i & 1 ? odd[i / 2] : even[i / 2];
  }

 private:
  static FASTSEQ_HOST_DEVICE void parted(U bits, V* v) {
    v[0] = (V)(bits << 16);
    v[1] = (V)(bits & 0xffff0000u);
  }
};

// Adds up products across lanes. Given are vectors of P = W / L keys whose lanes are L rows, P features of each; what is made of them has
// lanes key L + row.
template <class A, int L>
struct Sums {
  using V = typename Lanes<A>::V;
  static constexpr int W = sizeof(V) / sizeof(A), P = W / L, kIn16 = 16 / sizeof(A);

  static FASTSEQ_HOST_DEVICE V added_up(V* keys) {
    halve<P>(keys);
    const V sum = keys[0];
    return [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      return __builtin_shufflevector(sum, sum, kOrder.lane[J]...);
    }(std::make_integer_sequence<int, W>());
  }

 private:
  // Neighbors are lanes within 16 bytes as long as there are, then 16 bytes. The even (or odd) ones of a vector, and of the next one (from W
  // on), are brought together: which lane comes to `lane` when `count` vectors are left.
  static constexpr int neighbor(int count, int lane, bool odd) {
    const bool across = P / count >= kIn16;
    const int unit = across ? kIn16 : 1, places = across ? W / kIn16 : kIn16;
    const int base = lane / (unit * places) * (unit * places), place = lane / unit % places;
    return (place < places / 2 ? 0 : W) + base + (place % (places / 2) * 2 + odd) * unit + lane % unit;
  }

  template <int Count>
  static FASTSEQ_HOST_DEVICE void halve(V* keys) {
    if constexpr (Count > 1) {
#pragma GCC unroll 8
      for (int i = 0; i < Count / 2; ++i) {
        const V a = keys[2 * i], b = keys[2 * i + 1];
        keys[i] = [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
          return __builtin_shufflevector(a, b, neighbor(Count, J, false)...) + __builtin_shufflevector(a, b, neighbor(Count, J, true)...);
        }(std::make_integer_sequence<int, W>());
      }
      halve<Count / 2>(keys);
    }
  }

  // Where halving brings what belongs into a lane.
  struct Order {
    int lane[W];
  };
  static constexpr Order order() {
    int key[P][W] = {}, row[W] = {};
    for (int k = 0; k < P; ++k)
      for (int lane = 0; lane < W; ++lane) key[k][lane] = k, row[lane] = lane / P;
    for (int count = P; count > 1; count /= 2) {
      int next[W] = {};
      for (int lane = 0; lane < W; ++lane) next[lane] = row[neighbor(count, lane, false) % W];
      for (int i = 0; i < count / 2; ++i) {
        int of[W] = {};
        for (int lane = 0; lane < W; ++lane) {
          const int from = neighbor(count, lane, false);
          of[lane] = key[2 * i + from / W][from % W];
        }
        for (int lane = 0; lane < W; ++lane) key[i][lane] = of[lane];
      }
      for (int lane = 0; lane < W; ++lane) row[lane] = next[lane];
    }
    Order order{};
    for (int lane = 0; lane < W; ++lane) order.lane[key[0][lane] * L + row[lane]] = lane;
    return order;
  }
  static constexpr Order kOrder = order();
};

constexpr int64_t kMostBlock = 128;  // keys
constexpr int64_t kTogether = 8;  // keys whose products are in registers at once
// Rows whose weighted sums of two vectors are in registers at once.
constexpr int64_t kMostSums = FASTSEQ_VECTOR_REGISTERS == 32 ? 8 : 4;

template <class S, class A>
class Few {
  using V = typename Lanes<A>::V;
  using M = Math<A>;
  using C = Chunk<S, A>;
  static constexpr int64_t W = M::kWidth;
  static constexpr int64_t kGroup = W < 8 ? W : 8;      // rows
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();
#if defined(FASTSEQ_TILES)
  static constexpr bool kTiles = true;
#else
  static constexpr bool kTiles = false;
#endif
#if defined(__AVX512BF16__)
  static constexpr int64_t kMostInPairs = kTiles ? 1 : kGroup;  // lanes of a group whose features are multiplied in pairs
#else
  static constexpr int64_t kMostInPairs = 0;
#endif
  // From how many lanes on weighted sums of values are products of pairs, too: what bringing pairs of keys together takes is then shared.
  static constexpr int64_t kLeastLanesOfPairs = kMostInPairs > 1 ? 4 : 2 * W;
  static constexpr bool kNarrows = kTiles || kMostInPairs > 1;
  // Of tiles: keys or rows, features of a key (and keys of weights), columns of sums under way.
  static constexpr int64_t kTile = 16, kDepth = 32, kColumns = 64;
  static constexpr int64_t kLeastRows = 3, kLeastKeys = 32;  // which are worth a configuration of the tiles

  // Of a row, what is not the same for all.
  struct Row {
    int64_t query, head;
    int64_t place;       // among the keys
    int64_t begin, end;  // of the keys that window and lengths leave
    const uint8_t* mask;
    const char* bias;
    A slope;
    const char* relative;                  // the entry for key 0, which need not exist
    int64_t relative_begin, relative_end;  // keys that have an entry
  };

  // Rows whose products share vectors.
  struct Group {
    int64_t row, rows;
    int64_t lanes;       // L
    int64_t begin, end;  // keys that none of its rows is denied
    A *queries;          // [padded E / P, L, P]; in pairs, of the type in memory, [padded E / 2 P, L, P, 2], P = 1 of tiles
    A *highest, *total;  // [W / L, L], highest the same for all keys; total the sums of its keys
  };

  // Rows of keys or values to be fetched while others are computed with: one now and then, evenly, since a core waits for a burst.
  struct Ahead {
    const S* const* rows;
    int64_t count, bytes;
    bool nearer;  // no further than the second-level cache

    Ahead part(int64_t begin, int64_t end) const { return {rows + min(begin, count), min(end, count) - min(begin, count), bytes, nearer}; }
    Ahead share(int64_t i, int64_t shares) const { return part(count * i / shares, count * (i + 1) / shares); }
    // when `done` of `all` is computed
    FASTSEQ_HOST_DEVICE void fetch(int64_t done, int64_t all, int64_t& fetched) const {
      for (; fetched < count && fetched * all < done * count; ++fetched) {
        const char* const row = reinterpret_cast<const char*>(rows[fetched]);
        if (nearer)
          for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
        else
          for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 3);
      }
    }
  };

 public:
  static int64_t block(const Attention& a) {
    const int64_t bytes = max(a.features, a.value_features) * sizeof(S);
    return max(32, min(kMostBlock, 16384 / max(bytes, 1) / 16 * 16));
  }

  static int64_t partial(const Attention& a) {
    const int64_t rows = rows_of(a);
    return (states_of(rows) + rows * padded(a.value_features)) * sizeof(A);
  }

  static int64_t scratch(const Attention& a) {
    const int64_t rows = rows_of(a);
    return partial(a) + (groups_of(rows) * kGroup + kTogether) * padded(a.features) * sizeof(A) + 2 * kGroup * kMostBlock * sizeof(A) +
           lines_of(groups_of(rows) * sizeof(Group)) + lines_of(rows * sizeof(Row)) +
           (kNarrows ? kNarrow : 0) + (kTiles ? kPairs + kOfTiles + padded(a.value_features) * int64_t(sizeof(S)) : 0);
  }

  static void run(const Attention& a, const FewPart& part, void* scratch, void* partial_memory) {
    Few few(a, part, scratch, partial_memory);
    few.read_queries();
#if defined(FASTSEQ_TILES)
    if (few.tiled_) {
      constexpr int64_t R = kGroup;
      const TileConfiguration configuration({R, R, R, R, R, kTile, kTile, kTile}, {64, 64, 64, 64, 64, 64, 4 * R, 4 * R});
      few.walk();
    }
#endif
    if (!few.tiled_) few.walk();
    if (!partial_memory) few.finish();
  }

  static void merge(const Attention& a, const FewPart& part, const void* partials, int64_t count, void* scratch) {
    Few few(a, part, scratch, nullptr);
    const int64_t stride = partial(a) / sizeof(A), ldo = few.ldo_;
    const auto* const first = static_cast<const A*>(partials);
    for (int64_t g = 0; g < groups_of(part.rows); ++g) {
      const Group& group = few.groups_[g];
      const int64_t of_highest = group.highest - few.partial_, of_total = group.total - few.partial_;
      V highest = V{} + kLowest, total{};
      for (int64_t p = 0; p < count; ++p) {
        const V h = load(first + p * stride + of_highest);
        highest = h > highest ? h : highest;
      }
      for (int64_t p = 0; p < count; ++p) {
        const A* from = first + p * stride;
        const V share = shrink(load(from + of_highest), highest);
        total += load(from + of_total) * share;
        for (int64_t i = 0; i < group.rows; ++i) {
          const int64_t at = few.sums_ - few.partial_ + (group.row + i) * ldo;
          for (int64_t f = 0; f < ldo; f += W) store(few.partial_ + at + f, load(few.partial_ + at + f) + load(from + at + f) * share[i]);
        }
      }
      store(group.highest, highest), store(group.total, total);
    }
    few.finish();
  }

 private:
  Few(const Attention& a, const FewPart& part, void* scratch, void* partial_memory)
      : a_(a), part_(part), sequence_(a.sequence(part.batch)), group_(a.heads / a.key_heads), ldq_(padded(a.features)),
        ldo_(padded(a.value_features)) {
    const int64_t rows = rows_of(a), groups = groups_of(rows);
    auto* memory = static_cast<char*>(scratch);
    const auto take = [&]<class T>(T*& to, int64_t bytes) { to = reinterpret_cast<T*>(memory), memory += bytes; };
    A* queries;
    take(queries, groups * kGroup * ldq_ * sizeof(A));
    take(wide_, kTogether * ldq_ * sizeof(A));
    take(weights_, kGroup * kMostBlock * sizeof(A));
    take(added_, kGroup * kMostBlock * sizeof(A));
    take(groups_, lines_of(groups * sizeof(Group)));
    take(rows_, lines_of(rows * sizeof(Row)));
    if constexpr (kNarrows) take(narrow_, kNarrow);
    if constexpr (kTiles) {
      take(pairs_, kPairs), take(of_tiles_, kOfTiles);
      take(zeros_, padded(a.value_features) * sizeof(S));
      __builtin_memset((void*)zeros_, 0, padded(a.value_features) * sizeof(S));
    }
    partial_ = static_cast<A*>(partial_memory ? partial_memory : memory);
    sums_ = partial_ + states_of(rows);
    tiled_ = kTiles && part.rows >= kLeastRows && a.keys >= kLeastKeys;
    for (int64_t r = 0; r < part.rows; ++r) rows_[r] = row(part.first_row + r);
    for (int64_t g = 0; g < groups_of(part.rows); ++g) {
      Group& group = groups_[g];
      group = {g * kGroup, min(kGroup, part.rows - g * kGroup), 1, 0, part.end, queries + g * kGroup * ldq_,
               partial_ + 2 * g * W, partial_ + (2 * g + 1) * W};
      if (tiled_) group.lanes = kGroup;  // which the tiles are configured for
      while (group.lanes < group.rows) group.lanes *= 2;
      for (const Row* row = rows_ + group.row; row < rows_ + group.row + group.rows; ++row)
        group.begin = max(group.begin, row->begin), group.end = min(group.end, row->end);
      store(group.highest, V{} + kLowest), store(group.total, V{});
    }
    for (int64_t i = 0; i < part.rows * ldo_; i += W) store(sums_ + i, V{});
    adds_ = a.bias.given() || a.slopes || a.relative_bias || a.mask.given();
  }

  // bytes: weights [rows, keys] of the type in memory, four tiles, sums [rows, 64]
  static constexpr int64_t kNarrow = kGroup * kMostBlock * sizeof(S), kPairs = 4096, kOfTiles = kGroup * kColumns * sizeof(A);

  static int64_t rows_of(const Attention& a) { return min(kFewRows, a.heads / a.key_heads * a.queries); }
  static int64_t groups_of(int64_t rows) { return blocks_of(rows, kGroup); }
  // whole lines, so that what lies behind is aligned
  static int64_t padded(int64_t features) { return blocks_of(features, 64) * 64; }
  static int64_t lines_of(int64_t bytes) { return blocks_of(bytes, 64) * 64; }
  static int64_t states_of(int64_t rows) { return padded(2 * W * groups_of(rows)); }  // elements before the sums of a partial result

  static FASTSEQ_HOST_DEVICE V load(const A* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTSEQ_HOST_DEVICE void store(A* p, V v) { __builtin_memcpy(p, &v, sizeof v); }

  // e^x of x <= 0; zero where that is below the normal numbers
  static FASTSEQ_HOST_DEVICE V falling_exp(V x) {
    V scale, fraction;
    M::exp_parts(x, 1, scale, fraction);
    return x < -Lanes<A>::kLargest ? V{} : scale + scale * fraction;
  }
  // What was weighted against one maximum, in terms of another that is at least as high: -inf for neither.
  static FASTSEQ_HOST_DEVICE V shrink(V from, V to) { return falling_exp(from - (to == kLowest ? V{} : to)); }

  Row row(int64_t r) const {
    Row row{};
    row.query = r / group_, row.head = part_.key_head * group_ + r % group_;
    row.place = row.query + sequence_.shift;
    row.begin = a_.left >= 0 ? max(row.place - a_.left, 0) : 0;
    row.end = a_.right >= 0 ? min(row.place + a_.right + 1, sequence_.keys) : sequence_.keys;
    if (row.query >= sequence_.queries) row.end = 0;  // beyond the length
    row.end = min(row.end, part_.end);
    if (a_.mask.given()) row.mask = static_cast<const uint8_t*>(a_.mask.data) + pair(a_.mask, row);
    if (a_.bias.given()) row.bias = static_cast<const char*>(a_.bias.data) + pair(a_.bias, row) * size_of(a_.bias_type);
    if (a_.slopes) row.slope = static_cast<const A*>(a_.slopes)[part_.batch * a_.slopes_b + row.head];
    if (a_.relative_bias) {
      const int64_t zero = a_.relative_bias_zero - row.place;  // entry of key 0
      row.relative = static_cast<const char*>(a_.relative_bias) +
                     (row.head * a_.relative_bias_length + zero) * size_of(a_.relative_bias_type);
      row.relative_begin = -zero, row.relative_end = a_.relative_bias_length - zero;
    }
    return row;
  }
  int64_t pair(const Pairs& pairs, const Row& row) const {
    return part_.batch * pairs.b + row.head * pairs.h + row.query * pairs.i;
  }
  static int64_t size_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

  static FASTSEQ_HOST_DEVICE void load_chunk(const S* p, int64_t left, V* v) {
    left < C::kFeatures ? C::load_some(p, left, v) : C::load(p, v);
  }
  // A row as A, in the order of chunks, with zeros behind.
  void widen(const S* from, A* to) const {
    for (int64_t e = 0; e < a_.features; e += C::kFeatures) {
      V v[C::kVectors];
      load_chunk(from + e, a_.features - e, v);
      for (int i = 0; i < C::kVectors; ++i) store(to + e + i * W, v[i]);
    }
  }

  const S* query_of(const Row& row) const {
    return static_cast<const S*>(a_.q.data) + a_.q.offset(part_.batch, row.head, sequence_.first_q + row.query);
  }

  // whether features are multiplied in pairs
  bool in_pairs(const Group& group) const { return tiled_ || group.lanes <= kMostInPairs; }
  void read_pairs(const Group& group) {
    auto* const to = reinterpret_cast<S*>(group.queries);
    __builtin_memset((void*)to, 0, group.lanes * blocks_of(a_.features, kDepth) * kDepth * sizeof(S));
    const int64_t P = tiled_ ? 1 : W / group.lanes;
    for (int64_t i = 0; i < group.rows; ++i) {
      const S* const from = query_of(rows_[group.row + i]);
      for (int64_t pair = 0; 2 * pair < a_.features; ++pair)
        __builtin_memcpy((void*)(to + ((pair / P * group.lanes + i) * P + pair % P) * 2), from + 2 * pair,
                         min(2, a_.features - 2 * pair) * sizeof(S));
    }
  }

  void read_queries() {
    const int64_t features = blocks_of(a_.features, C::kFeatures) * C::kFeatures;
    for (int64_t g = 0; g < groups_of(part_.rows); ++g) {
      const Group& group = groups_[g];
      if (in_pairs(group)) {
        read_pairs(group);
        continue;
      }
      const int64_t L = group.lanes, P = W / L;
      for (int64_t i = 0; i < L; ++i) {
        if (i < group.rows) {
          widen(query_of(rows_[group.row + i]), L == 1 ? group.queries : wide_);
        }
        if (L > 1) {
          A* to = group.queries + i * P;
          for (int64_t e = 0; e < features; e += P, to += W)
            for (int64_t f = 0; f < P; ++f) to[f] = i < group.rows ? wide_[e + f] : 0;
        }
      }
    }
  }

  // Where keys or values begin .. begin + count lie; behind them the last one again.
  void find(const ConstRows& given, int64_t begin, int64_t count, const S** rows) const {
    const auto* data = static_cast<const S*>(given.data) + part_.key_head * given.h;
    if (!a_.block_table) {
      data += part_.batch * given.b + (sequence_.first_k + begin) * given.t;
      for (int64_t j = 0; j < count; ++j) rows[j] = data + j * given.t;
    } else {
      const int32_t* table = a_.block_table + part_.batch * a_.block_table_b;
      for (int64_t j = 0; j < count;) {
        const int64_t page = (begin + j) / a_.page_size, first = (begin + j) % a_.page_size;
        const S* from = data + max(0, min(table[page], a_.pages - 1)) * given.b;
        const int64_t end = min(count, j + a_.page_size - first);
        for (int64_t i = first; j < end; ++i, ++j) rows[j] = from + i * given.t;
      }
    }
    for (int64_t j = count; j % kScored<1>; ++j) rows[j] = rows[count - 1];
  }

  // AMD's first-level caches wait for 24 lines at a time, which bounds what comes from memory; the second-level caches wait for more.
  static bool fetches_nearer() {
#if defined(__x86_64__) && !defined(FASTSEQ_TILES)
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
  }

  void walk() {
    const int64_t size = block(a_);
    const bool nearer = fetches_nearer();
    const S *keys[2][kMostBlock], *values[kMostBlock + kDepth];
    if (part_.begin < part_.end) find(a_.k, part_.begin, min(size, part_.end - part_.begin), keys[0]);
    int now = 0;
    for (int64_t j = part_.begin; j < part_.end; j += size, now ^= 1) {
      const int64_t count = min(size, part_.end - j), next = min(size, part_.end - j - count);
      find(a_.v, j, count, values);
      if (tiled_)
        for (int64_t i = count; i % kDepth; ++i) values[i] = zeros_;
      if (next) find(a_.k, j + count, next, keys[now ^ 1]);
      Ahead fetch_values{values, count, a_.value_features * int64_t(sizeof(S)), nearer};
      Ahead fetch_keys{keys[now ^ 1], next, a_.features * int64_t(sizeof(S)), nearer};
      for (int64_t g = 0; g < groups_of(part_.rows); ++g) {
        const Group& group = groups_[g];
        A shrinks[W];
        if (adds_) add_up(group, j, count);
#if defined(FASTSEQ_TILES)
        if (tiled_) {
          score_by_tiles(group, j, count, keys[now], fetch_values);
          weigh<kGroup>(group, count, shrinks);
          sum_by_tiles(group, count, values, shrinks, fetch_keys);
          fetch_keys.count = fetch_values.count = 0;
          continue;
        }
#endif
        with_lanes<kGroup>(group.lanes, [&]<int L>() __attribute__((always_inline)) {
          score<L>(group, j, count, keys[now], fetch_values);
          weigh<L>(group, count, shrinks);
          if constexpr (L >= kLeastLanesOfPairs) pair_weights<L>(count);
        });
        if (kMostInPairs && group.lanes >= kLeastLanesOfPairs) {
          with_rows<kGroup>(group.rows, [&]<int R>() __attribute__((always_inline)) { sum_by_pairs<R>(group, count, values, shrinks, fetch_keys); });
          fetch_keys.count = fetch_values.count = 0;
          continue;
        }
        for (int64_t i = 0; i < group.rows; i += kMostSums) {
          with_rows<kMostSums>(min(kMostSums, group.rows - i), [&]<int R>() __attribute__((always_inline)) {
            sum<R>(group, i, count, values, shrinks + i, fetch_keys);
          });
          fetch_keys.count = 0;
        }
        fetch_values.count = 0;
      }
    }
  }

  template <int L, class F>
  static FASTSEQ_HOST_DEVICE void with_lanes(int64_t lanes, F&& body) {
    if constexpr (L > 1)
      if (lanes != L) return with_lanes<L / 2>(lanes, body);
    body.template operator()<L>();
  }
  template <int R, class F>
  static FASTSEQ_HOST_DEVICE void with_rows(int64_t rows, F&& body) {
    if constexpr (R > 1)
      if (rows != R) return with_rows<R - 1>(rows, body);
    body.template operator()<R>();
  }

  // P values again and again
  template <int P>
  static FASTSEQ_HOST_DEVICE V repeated(const A* p) {
    constexpr int kBytes = P * sizeof(A);
    if constexpr (P == W) {
      return load(p);
    } else if constexpr (P == 1) {
      return V{} + *p;
    } else if constexpr (kBytes == 8) {
      int64_t bits;
      __builtin_memcpy(&bits, p, sizeof bits);
      return (V)(typename Lanes<double>::I{} + bits);
    } else {
#if defined(__AVX512F__)
      if constexpr (kBytes == 16)
        return (V)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps((const float*)p));
      else
        return (V)_mm512_maskz_broadcast_f64x4(0xff, _mm256_loadu_pd((const double*)p));
#elif defined(__AVX2__)
      return (V)_mm256_broadcast_ps((const __m128*)p);
#endif
    }
  }

  // Keys that are scored at a time, the last ones of a block in vain.
  template <int L>
  static constexpr int64_t kScored = W / L > kTogether ? W / L : kTogether;

  // Scores of a group and a block of keys, into the weights, [keys, L].
  template <int L>
  __attribute__((noinline)) void score(const Group& group, int64_t j, int64_t count, const S* const* keys, const Ahead& ahead) {
    constexpr int P = W / L;
    constexpr int64_t N = kTogether, G = kScored<L>;
    const A* const q = group.queries;
    const A scale = a_.scale;
    for (int64_t first = 0; first < count; first += G) {
      V products[G];
#pragma GCC unroll 1
      for (int64_t n = 0; n < G; n += N) {
        V sum[N] = {};
        if constexpr (L <= kMostInPairs)
          multiply_pairs<L>(reinterpret_cast<const S*>(q), keys + first + n, ahead.part(first + n, first + n + N), sum);
        else if constexpr (L == 1)
          multiply_rows(q, keys + first + n, ahead.part(first + n, first + n + N), sum);
        else
          multiply_pieces<L>(q, keys + first + n, ahead.part(first + n, first + n + N), sum);
#pragma GCC unroll 8
        for (int64_t i = 0; i < N; ++i) products[n + i] = sum[i];
      }
#pragma GCC unroll 8
      for (int64_t t = 0; t < G; t += P) {
        const V s = Sums<A, L>::added_up(products + t) * scale;
        store(weights_ + (first + t) * L, shaped<L>(s, group, j, first + t));
      }
    }
  }

  // Of scaled products with the P keys from `at` of a block on, what the softmax is of.
  template <int L>
  FASTSEQ_HOST_DEVICE V shaped(V s, const Group& group, int64_t j, int64_t at) const {
    if (a_.softcap != 0) s = A(a_.softcap) * M::tanh(s / A(a_.softcap));
    if (adds_) s = with_added<L>(s, at);
    return j + at < group.begin || j + at + W / L > group.end ? within<L>(s, group, j + at) : s;
  }

#if defined(__AVX512BF16__)
  // up to 32, zeros behind
  static FASTSEQ_HOST_DEVICE __m512i features_of(const S* p, int64_t n) {
    return n < kDepth ? _mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p) : _mm512_loadu_si512(p);
  }
#endif

#if defined(FASTSEQ_TILES)
  // Whether the 16 keys from j on lie at one distance from each other.
  bool evenly(int64_t j) const { return !a_.block_table || j % a_.page_size + kTile <= a_.page_size; }

  // The same as `score`. Tile 5 holds keys, 7 the rows' pairs of features, 6 their products [keys, L].
  __attribute__((noinline)) void score_by_tiles(const Group& group, int64_t j, int64_t count, const S* const* keys, const Ahead& ahead) {
    constexpr int L = kGroup;
    const int64_t tiles = blocks_of(a_.features, kDepth), whole = a_.features / kDepth, all = blocks_of(count, kTile) * tiles;
    const S* const q = reinterpret_cast<const S*>(group.queries);
    int64_t fetched = 0, done = 0;
    for (int64_t first = 0; first < count; first += kTile) {
      const int64_t there = min(kTile, count - first), in_place = there == kTile && evenly(j + first) ? whole : 0;
      tile_zero<6>();
      for (int64_t t = 0; t < tiles; ++t) {
        ahead.fetch(++done, all, fetched);
        if (t < in_place) {
          tile_load<5>(keys[first] + t * kDepth, a_.k.t * sizeof(S));
        } else {
          const int64_t features = min(kDepth, a_.features - t * kDepth);
          auto* const copy = reinterpret_cast<__m512i*>(wide_);
          for (int64_t i = 0; i < there; ++i)  // what is behind gives scores of no key
            copy[i] = features_of(keys[first + i] + t * kDepth, features);
          tile_load<5>(copy, sizeof(__m512i));
        }
        tile_load<7>(q + t * kDepth * L, 4 * L);
        tile_multiply<6, 5, 7>();
      }
      tile_store<6>(weights_ + first * L, 4 * L);
    }
    const A scale = a_.scale;
    for (int64_t at = 0; at < blocks_of(count, kScored<L>) * kScored<L>; at += W / L)
      store(weights_ + at * L, shaped<L>(load(weights_ + at * L) * scale, group, j, at));
  }

  // The weights of a block as a left-hand matrix, [rows, keys].
  void narrow_weights(int64_t count) {
    static_assert(kGroup * 2 == W);
    using Quads = Lanes<double>::I;
    alignas(64) static constexpr auto kOrder = [] {  // of words: four keys of a row beside one another
      struct {
        uint16_t word[32];
      } order{};
      for (int i = 0; i < 32; ++i) order.word[i] = i % 4 * 8 + i / 4;
      return order;
    }();
    const __m512i order = _mm512_load_si512(&kOrder);
    for (int64_t at = blocks_of(count, kGroup) * kGroup; at % kDepth; at += 2) store(weights_ + at * kGroup, V{});
    for (int64_t at = 0; at < count; at += kDepth) {
      Quads square[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const V first = load(weights_ + (at + 4 * i) * kGroup), second = load(weights_ + (at + 4 * i + 2) * kGroup);
        square[i] = (Quads)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
      }
      transpose<4, 8>(square);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) __builtin_memcpy(narrow_ + i * kMostBlock + at, square + i, sizeof(Quads));
    }
  }

  // 32 values, two and two beside one another: features of `units` times two tiles, of which the first has four of every eight.
  static void pair_values(const S* const* values, int64_t f, int64_t left, int64_t units, char* to) {
    for (int64_t u = 0; u < units; ++u, f += kDepth, left -= kDepth, to += 2 * 1024) {
#pragma GCC unroll 4
      for (int64_t p = 0; p < kTile; ++p) {
        const __m512i a = features_of(values[2 * p] + f, left), b = features_of(values[2 * p + 1] + f, left);
        _mm512_store_si512(to + p * 64, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(to + 1024 + p * 64, _mm512_unpackhi_epi16(a, b));
      }
    }
  }

  // The same as `sum` for all rows of a group. Tile 4 holds weights [rows, keys], 5 values, 0 to 3 sums [rows, features].
  __attribute__((noinline)) void sum_by_tiles(const Group& group, int64_t count, const S* const* values, const A* shrinks,
                                              const Ahead& ahead) {
    narrow_weights(count);
    const int64_t all = blocks_of(count, kDepth) * blocks_of(a_.value_features, kColumns);
    int64_t fetched = 0, done = 0;
    for (int64_t f = 0; f < a_.value_features; f += kColumns) {
      const int64_t left = a_.value_features - f, units = left > kDepth ? 2 : 1;
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int64_t at = 0; at < count; at += kDepth) {
        ahead.fetch(++done, all, fetched);
        pair_values(values + at, f, left, units, pairs_);
        tile_load<4>(narrow_ + at, kMostBlock * sizeof(S));
        tile_load<5>(pairs_, 64), tile_multiply<0, 4, 5>();
        tile_load<5>(pairs_ + 1024, 64), tile_multiply<1, 4, 5>();
        if (units == 1) continue;
        tile_load<5>(pairs_ + 2048, 64), tile_multiply<2, 4, 5>();
        tile_load<5>(pairs_ + 3072, 64), tile_multiply<3, 4, 5>();
      }
      constexpr int64_t kBytes = kColumns * sizeof(A);
      tile_store<0>(of_tiles_, kBytes), tile_store<1>(of_tiles_ + W, kBytes);
      if (units == 2) tile_store<2>(of_tiles_ + 2 * W, kBytes), tile_store<3>(of_tiles_ + 3 * W, kBytes);
      for (int64_t i = 0; i < group.rows; ++i)
        for (int64_t u = 0; u < units; ++u) {
          const A* const from = of_tiles_ + i * kColumns + 2 * u * W;
          add_sums(group.row + i, f + u * kDepth, load(from), load(from + W), shrinks[i]);
        }
    }
  }
#endif

#if defined(__AVX512BF16__)
  // Adds to the sums of a row 32 features from f on: `low` has four of every eight, `high` the others.
  FASTSEQ_HOST_DEVICE void add_sums(int64_t row, int64_t f, V low, V high, A shrink) const {
    A* const to = sums_ + row * ldo_ + f;
    [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      const V even = __builtin_shufflevector(low, high, ((J % 4 < 2 ? 0 : W) + J / 4 * 4 + J % 2 * 2)...);
      const V odd = __builtin_shufflevector(low, high, ((J % 4 < 2 ? 0 : W) + J / 4 * 4 + J % 2 * 2 + 1)...);
      store(to, load(to) * shrink + even), store(to + W, load(to + W) * shrink + odd);
    }(std::make_integer_sequence<int, W>());
  }
#endif

  // The weights of a block in the type in memory, those of two keys side by side: [pairs of keys, L, 2].
  template <int L>
  void pair_weights([[maybe_unused]] int64_t count) {
#if defined(__AVX512BF16__)
    alignas(64) static constexpr auto kOrder = [] {
      struct {
        uint16_t word[32];
      } order{};
      for (int i = 0; i < 32; ++i) order.word[i] = (i / 2 / L * 2 + i % 2) * L + i / 2 % L;
      return order;
    }();
    const __m512i order = _mm512_load_si512(&kOrder);
    for (int64_t x = 0; x < count * L; x += 2 * W) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(weights_ + x + W), (__m512)load(weights_ + x));
      _mm512_store_si512(narrow_ + x, _mm512_permutexvar_epi16(order, (__m512i)both));
    }
#endif
  }

  // The same as `sum` for all rows of a group, the values of two keys at once.
  template <int R>
  __attribute__((noinline)) void sum_by_pairs([[maybe_unused]] const Group& group, [[maybe_unused]] int64_t count,
                                              [[maybe_unused]] const S* const* values, [[maybe_unused]] const A* shrinks,
                                              [[maybe_unused]] const Ahead& ahead) {
#if defined(__AVX512BF16__)
    const int64_t L = group.lanes, passes = blocks_of(a_.value_features, kDepth);
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t f = pass * kDepth, left = a_.value_features - f;
      const Ahead share = ahead.share(pass, passes);
      const S* weights = narrow_;
      int64_t fetched = 0, j = 0;
      V low[R], high[R];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) low[i] = high[i] = V{};
      const auto add = [&](__m512i first, __m512i second) __attribute__((always_inline)) {
        const auto a = (__m512bh)_mm512_unpacklo_epi16(first, second), b = (__m512bh)_mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          int32_t pair;
          __builtin_memcpy(&pair, weights + 2 * i, sizeof pair);
          const auto weight = (__m512bh)_mm512_set1_epi32(pair);
          low[i] = (V)_mm512_dpbf16_ps((__m512)low[i], weight, a), high[i] = (V)_mm512_dpbf16_ps((__m512)high[i], weight, b);
        }
        weights += 2 * L;
      };
      if (left >= kDepth) {
        for (; j + 2 <= count; j += 2) {
          share.fetch(j + 2, count, fetched);
          add(_mm512_loadu_si512(values[j] + f), _mm512_loadu_si512(values[j + 1] + f));
        }
      } else {
        for (; j + 2 <= count; j += 2) add(features_of(values[j] + f, left), features_of(values[j + 1] + f, left));
      }
      if (j < count) add(features_of(values[j] + f, left), _mm512_setzero_si512());
      share.fetch(count, count, fetched);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) add_sums(group.row + i, f, low[i], high[i], shrinks[i]);
    }
#endif
  }

  // Adds products of L rows, those of a pair of features at once.
  template <int L>
  FASTSEQ_HOST_DEVICE void multiply_pairs([[maybe_unused]] const S* q, [[maybe_unused]] const S* const* keys,
                                          [[maybe_unused]] const Ahead& ahead, [[maybe_unused]] V* sum) const {
#if defined(__AVX512BF16__)
    constexpr int64_t P = W / L, kFeatures = 2 * P;
    const int64_t whole = a_.features / kFeatures * kFeatures;
    int64_t fetched = 0, e = 0;
    const auto multiply = [&](auto&& pairs_of) __attribute__((always_inline)) {
      const auto query = (__m512bh)_mm512_loadu_si512(q + e * L);
#pragma GCC unroll 8
      for (int64_t n = 0; n < kTogether; ++n) sum[n] = (V)_mm512_dpbf16_ps((__m512)sum[n], query, (__m512bh)pairs_of(keys[n] + e));
    };
    while (e < whole) {  // a few times, so that the registers of addresses suffice for the keys in between
      const int64_t end = min(e + 8 * kFeatures, whole);
      ahead.fetch(end, a_.features, fetched);
      for (; e < end; e += kFeatures)
        multiply([](const S* p) __attribute__((always_inline)) { return repeated<P>(reinterpret_cast<const A*>(p)); });
    }
    if (e < a_.features)
      multiply([&](const S* p) __attribute__((always_inline)) {
        _mm512_store_si512(wide_, features_of(p, a_.features - e));
        return repeated<P>(wide_);
      });
#endif
  }

  // Adds products of one row.
  FASTSEQ_HOST_DEVICE void multiply_rows(const A* q, const S* const* keys, const Ahead& ahead, V* sum) const {
    constexpr int64_t N = kTogether / (FASTSEQ_VECTOR_REGISTERS == 16 && C::kVectors > 1 ? 2 : 1);
    const int64_t whole = a_.features / C::kFeatures * C::kFeatures, rest = a_.features - whole;
    int64_t fetched = 0;
#pragma GCC unroll 2
    for (int64_t first = 0; first < kTogether; first += N) {
      int64_t e = 0;
      const auto multiply = [&](auto&& load_key) __attribute__((always_inline)) {
        V query[C::kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < C::kVectors; ++v) query[v] = load(q + e + v * W);
#pragma GCC unroll 8
        for (int64_t n = 0; n < N; ++n) {
          V key[C::kVectors];
          load_key(keys[first + n] + e, key);
#pragma GCC unroll 2
          for (int v = 0; v < C::kVectors; ++v) sum[first + n] += query[v] * key[v];
        }
      };
      for (; e < whole; e += C::kFeatures) {
        ahead.fetch((first + N) * (e + C::kFeatures), kTogether * a_.features, fetched);
        multiply([](const S* p, V* v) __attribute__((always_inline)) { C::load(p, v); });
      }
      if (rest) multiply([rest](const S* p, V* v) __attribute__((always_inline)) { C::load_some(p, rest, v); });
    }
  }

  // Adds products of L rows: each piece of a key serves all of them. Keys of 16 bits, and ends of rows, are brought into this form first.
  template <int L>
  FASTSEQ_HOST_DEVICE void multiply_pieces(const A* q, const S* const* keys, const Ahead& ahead, V* sum) const {
    constexpr int P = W / L;
    constexpr int64_t N = kTogether;
    const A* of[N];
    int64_t features = a_.features;
    if (sizeof(S) != sizeof(A) || features % P) {
      features = blocks_of(features, C::kFeatures) * C::kFeatures;
      for (int64_t n = 0; n < N; ++n) widen(keys[n], wide_ + n * ldq_), of[n] = wide_ + n * ldq_;
    } else {
      for (int64_t n = 0; n < N; ++n) of[n] = reinterpret_cast<const A*>(keys[n]);
    }
    int64_t e = 0, fetched = 0;
    if constexpr (FASTSEQ_VECTOR_REGISTERS == 32) {  // more sums under way than there are keys, for the sake of their latency
      V other[N] = {};
      for (; e + 2 * P <= features; e += 2 * P, q += 2 * W) {
        ahead.fetch(e + 2 * P, features, fetched);
        const V query = load(q), next = load(q + W);
#pragma GCC unroll 8
        for (int64_t n = 0; n < N; ++n) sum[n] += query * repeated<P>(of[n] + e), other[n] += next * repeated<P>(of[n] + e + P);
      }
#pragma GCC unroll 8
      for (int64_t n = 0; n < N; ++n) sum[n] += other[n];
    }
    for (; e < features; e += P, q += W) {
      ahead.fetch(e + P, features, fetched);
      const V query = load(q);
#pragma GCC unroll 8
      for (int64_t n = 0; n < N; ++n) sum[n] += query * repeated<P>(of[n] + e);
    }
  }

  // What is added to the scores of a group, [row, key], into `added`; -inf where the mask hides a key.
  void add_up(const Group& group, int64_t j, int64_t count) const {
    for (int64_t i = 0; i < group.rows; ++i)
      for (int64_t at = 0; at < count; at += W)
        store(added_ + i * kMostBlock + at, added_to(rows_[group.row + i], j + at, min(W, count - at)));
  }

  template <int L>
  FASTSEQ_HOST_DEVICE V with_added(V s, int64_t at) const {
    V added;
    if constexpr (L == 1)
      added = load(added_ + at);
    else
      for (int64_t l = 0; l < W; ++l) added[l] = added_[l % L * kMostBlock + at + l / L];
    if (!a_.mask.given()) return s + added;
    return added == kLowest ? added : s + added;
  }

  // -inf where window or lengths hide one of the keys from j on
  template <int L>
  static __attribute__((noinline)) V within(V s, const Row* rows, int64_t count, int64_t j) {
    for (int64_t l = 0; l < W; ++l) {
      const int64_t key = j + l / L;
      if (l % L < count && (key < rows[l % L].begin || key >= rows[l % L].end)) s[l] = kLowest;
    }
    return s;
  }
  template <int L>
  FASTSEQ_HOST_DEVICE V within(V s, const Group& group, int64_t j) const {
    return within<L>(s, rows_ + group.row, group.rows, j);
  }

  // n values of a type, `stride` elements apart; the lanes beyond them are not to be used
  static V numbers(Type type, const char* p, int64_t stride, int64_t n) {
    const auto of = [&]<class T>(const T* from) __attribute__((always_inline)) {
      if (stride == 1) return Memory<T, A>::load(from, n);
      V v{};
      for (int64_t i = 0; i < n; ++i) v[i] = Memory<T, A>::load(from + i * stride, 1)[0];
      return v;
    };
    if constexpr (sizeof(A) == 8) {
      return of(reinterpret_cast<const double*>(p));
    } else {
      if (type == Type::kBfloat16) return of(reinterpret_cast<const bfloat16*>(p));
      if (type == Type::kHalf) return of(reinterpret_cast<const float16*>(p));
      return of(reinterpret_cast<const float*>(p));
    }
  }

  // for keys j .. j + n of a row
  V added_to(const Row& row, int64_t j, int64_t n) const {
    V s{};
    if (row.bias) s = numbers(a_.bias_type, row.bias + j * a_.bias.j * size_of(a_.bias_type), a_.bias.j, n);
    if (a_.slopes) {
      V distance;
      for (int64_t i = 0; i < W; ++i) distance[i] = j + i < row.place ? row.place - j - i : j + i - row.place;
      s -= row.slope * distance;
    }
    if (row.relative) {
      const int64_t first = max(row.relative_begin - j, 0), last = min(row.relative_end - j, n), size = size_of(a_.relative_bias_type);
      if (first == 0 && last == n)
        s += numbers(a_.relative_bias_type, row.relative + j * size, 1, n);
      else
        for (int64_t i = first; i < last; ++i) s[i] += numbers(a_.relative_bias_type, row.relative + (j + i) * size, 1, 1)[0];
    }
    if (row.mask && a_.mask.j == 1) {
      const V shown = Memory<bool, A>::load(reinterpret_cast<const bool*>(row.mask + j), n);
      s = shown != 0 ? s : V{} + kLowest;
    } else if (row.mask) {
      for (int64_t i = 0; i < n; ++i)
        if (!row.mask[(j + i) * a_.mask.j]) s[i] = kLowest;
    }
    return s;
  }

  // The highest of the lanes of each row, in all of them.
  template <int L>
  static FASTSEQ_HOST_DEVICE V highest_of_rows(V v) {
    if constexpr (L < W) {
      const V other = [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
        return __builtin_shufflevector(v, v, (J ^ L)...);
      }(std::make_integer_sequence<int, W>());
      return highest_of_rows<2 * L>(v > other ? v : other);
    }
    return v;
  }

  // Weights from the scores of a block, and by how much what was summed before shrinks.
  template <int L>
  __attribute__((noinline)) void weigh(const Group& group, int64_t count, A* shrinks) {
    const int64_t size = blocks_of(count, kScored<L>) * kScored<L> * L;
    V block = load(weights_);
    for (int64_t i = W; i < size; i += W) {
      const V s = load(weights_ + i);
      block = s > block ? s : block;
    }
    // A NaN need not be the highest: as a weight it makes its row NaN.
    block = highest_of_rows<L>(block);
    const V before = load(group.highest), highest = block > before ? block : before, base = highest == kLowest ? V{} : highest;
    const V shrunk = falling_exp(before - base);
    V total{};
    for (int64_t i = 0; i < size; i += W) {
      const V e = falling_exp(load(weights_ + i) - base);
      store(weights_ + i, e);
      total += e;
    }
    store(group.highest, highest), store(group.total, load(group.total) * shrunk + total), store(shrinks, shrunk);
  }

  // What the weights of a block make of its values, each block summed from zero, for rows i .. i + R of a group.
  template <int R>
  void sum(const Group& group, int64_t i, int64_t count, const S* const* values, const A* shrinks, Ahead ahead) {
    constexpr int kMost = (FASTSEQ_VECTOR_REGISTERS == 32 ? 16 : 8) / R;
    constexpr int F = kMost >= 8 ? 8 : kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
    int64_t f = 0;
    sum_columns<R, (F > C::kVectors ? F : C::kVectors)>(group, i, count, values, shrinks, ahead, f);
    if (f < a_.value_features) columns<R, C::kVectors, true>(group, i, count, values, shrinks, ahead.part(0, 0), f);
  }

  // As many whole chunks as there are, F vectors at a time, then fewer.
  template <int R, int F>
  FASTSEQ_HOST_DEVICE void sum_columns(const Group& group, int64_t i, int64_t count, const S* const* values, const A* shrinks,
                                       Ahead ahead, int64_t& f) {
    const int64_t passes = (a_.value_features - f) / (F * W);
    for (int64_t pass = 0; pass < passes; ++pass, f += F * W)
      columns<R, F, false>(group, i, count, values, shrinks, ahead.share(pass, passes), f);
    if (passes) ahead.count = 0;
    if constexpr (F > C::kVectors) sum_columns<R, F / 2>(group, i, count, values, shrinks, ahead, f);
  }

  template <int R, int F, bool kSome>
  __attribute__((noinline)) void columns(const Group& group, int64_t row, int64_t count, const S* const* values, const A* shrinks,
                                         const Ahead& ahead, int64_t f) {
    const A* w = weights_ + row;
    const int64_t L = group.lanes, rest = a_.value_features - f;
    // neighbors are summed apart where there are few sums, for the sake of their latency
    constexpr int64_t kApart = FASTSEQ_VECTOR_REGISTERS == 32 && R * F <= 8 ? 2 : 1;
    V sum[kApart][R][F];
#pragma GCC unroll 16
    for (int i = 0; i < kApart * R * F; ++i) sum[i / (R * F)][i / F % R][i % F] = V{};
    const auto weigh_value = [&](int64_t j, V(&sum)[R][F]) __attribute__((always_inline)) {
      V value[F];
#pragma GCC unroll 8
      for (int c = 0; c < F; c += C::kVectors) {
        if constexpr (kSome)
          C::load_some(values[j] + f, rest, value);
        else
          C::load(values[j] + f + c * W, value + c);
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const A weight = w[j * L + i];
#pragma GCC unroll 8
        for (int c = 0; c < F; ++c) sum[i][c] += weight * value[c];
      }
    };
    constexpr int64_t kStep = 4;
    int64_t fetched = 0, j = 0;
    for (; j + kStep <= count; j += kStep) {
      ahead.fetch(j + kStep, count, fetched);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kStep; ++i) weigh_value(j + i, sum[i % kApart]);
    }
    ahead.fetch(count, count, fetched);
    for (; j < count; ++j) weigh_value(j, sum[0]);
#pragma GCC unroll 16
    for (int i = 0; i < (kApart - 1) * R * F; ++i) sum[0][i / F][i % F] += sum[kApart - 1][i / F][i % F];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      A* const to = sums_ + (group.row + row + i) * ldo_ + f;
#pragma GCC unroll 8
      for (int c = 0; c < F; ++c) store(to + c * W, load(to + c * W) * shrinks[i] + sum[0][i][c]);
    }
  }

  void finish() {
    auto* out = static_cast<S*>(a_.out.data);
    for (int64_t r = 0; r < part_.rows; ++r) {
      const Row& row = rows_[r];
      const Group& group = groups_[r / kGroup];
      A highest = group.highest[r % kGroup], total = 0, share = 1;
      for (int64_t i = r % kGroup; i < W; i += group.lanes) total += group.total[i];
      if (a_.sinks) {
        const A sink = numbers(a_.sinks_type, static_cast<const char*>(a_.sinks) + row.head * size_of(a_.sinks_type), 1, 1)[0];
        const A with_sink = sink > highest ? sink : highest;
        share = shrink(V{} + highest, V{} + with_sink)[0];
        total = total * share + shrink(V{} + sink, V{} + with_sink)[0];
        highest = with_sink;
      }
      const bool dead = total == 0 && highest == kLowest;
      const A factor = dead ? A(0) : share / total;
      S* to = out + a_.out.offset(part_.batch, row.head, sequence_.first_q + row.query);
      for (int64_t f = 0; f < a_.value_features; f += C::kFeatures) {
        V v[C::kVectors];
        for (int i = 0; i < C::kVectors; ++i) v[i] = load(sums_ + r * ldo_ + f + i * W) * factor;
        C::store(to + f, min(C::kFeatures, a_.value_features - f), v);
      }
      if (a_.lse) {
        A* lse = static_cast<A*>(a_.lse) + (a_.cu_q ? 0 : part_.batch * a_.lse_b) + row.head * a_.lse_h + sequence_.first_q + row.query;
        if constexpr (sizeof(A) == 8)
          *lse = dead ? kLowest : highest + __builtin_log(total);
        else
          *lse = dead ? kLowest : highest + __builtin_logf(total);
      }
    }
  }

  const Attention& a_;
  const FewPart& part_;
  const Attention::Sequence sequence_;
  const int64_t group_, ldq_, ldo_;
  bool adds_, tiled_;
  A *wide_, *weights_, *added_, *partial_, *sums_;
  // by tiles
  S *narrow_, *zeros_;
  char* pairs_;
  A* of_tiles_;
  Group* groups_;
  Row* rows_;
};

// body.template operator()<kernels>() for a call's type
template <class F>
auto with_type([[maybe_unused]] Type type, F&& body) {
#if defined(__AVX512BF16__)
  return body.template operator()<Few<bfloat16, float>>();
#else
  switch (type) {
    case Type::kDouble: return body.template operator()<Few<double, double>>();
    case Type::kBfloat16: return body.template operator()<Few<bfloat16, float>>();
    case Type::kHalf: return body.template operator()<Few<float16, float>>();
    default: return body.template operator()<Few<float, float>>();
  }
#endif
}

constexpr FewKernels kFewKernels = {
    [](const Attention& a) { return with_type(a.type, [&]<class K>() { return K::block(a); }); },
    [](const Attention& a) { return with_type(a.type, [&]<class K>() { return K::scratch(a); }); },
    [](const Attention& a) { return with_type(a.type, [&]<class K>() { return K::partial(a); }); },
    [](const Attention& a, const FewPart& part, void* scratch, void* partial) {
      with_type(a.type, [&]<class K>() { K::run(a, part, scratch, partial); });
    },
    [](const Attention& a, const FewPart& rows, const void* partials, int64_t count, void* scratch) {
      with_type(a.type, [&]<class K>() { K::merge(a, rows, partials, count, scratch); });
    },
};

}  // namespace
}  // namespace fastseq::cpu::FASTSEQ_LEVEL
