// The recurrence over time for one instruction set: forward and backward, any cell. Included by recurrent_<level>.cpp, which defines
// FASTSEQ_LEVEL, FASTSEQ_VECTOR_BYTES, FASTSEQ_VECTOR_REGISTERS and, where bfloat16 is multiplied by AMX tiles, FASTSEQ_TILES, where it is
// in pairs, FASTSEQ_PAIRS; contracts stand in recurrent_kernel.h.
//
// Each step multiplies the state of the sequences with one tile of packed weights after the other, and finishes that tile's units (gates,
// state, outputs) while the sums are still in the first-level cache. A team meets once a step, when the new state is complete. What
// multiplies (product_fma.inl, product_pairs.inl, product_amx.inl) also says how states and weights lie; the rest is written once.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../recurrent/cells/coupled_lstm.h"
#include "../recurrent/cells/gru.h"
#include "../recurrent/cells/layer_norm_gru.h"
#include "../recurrent/cells/layer_norm_lstm.h"
#include "../recurrent/cells/lstm.h"
#include "../recurrent/cells/peephole_lstm.h"
#include "../recurrent/cells/rnn.h"
#include "../recurrent/cells/slstm.h"
#include "recurrent_kernel.h"

namespace fastseq::cpu::FASTSEQ_LEVEL {
namespace {

#include "vector.inl"
#include "activations.inl"
#include "transpose.inl"

// What sums start from: the first `vectors` of those of a row at rows + r * stride, the others from zero.
template <class A>
struct Start {
  const A* rows = nullptr;
  int64_t stride = 0;  // elements; 0: one row for all
  int64_t vectors = 0;
  Start of_row(int64_t r) const { return {rows + r * stride, stride, vectors}; }
};

#if defined(FASTSEQ_TILES)
#include "tiles.inl"
#include "short_products.inl"
#include "product_amx.inl"
#elif defined(FASTSEQ_PAIRS)
#include "short_products.inl"
#include "product_blocks.inl"
#include "product_pairs.inl"
#else
#include "product_blocks.inl"
#include "product_fma.inl"
#endif
#include "product_in_place.inl"

template <class T>
T* at(void* base, int64_t offset) {
  return base ? static_cast<T*>(base) + offset : nullptr;
}
template <class T>
const T* at(const void* base, int64_t offset) {
  return base ? static_cast<const T*>(base) + offset : nullptr;
}

FASTSEQ_HOST_DEVICE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Stores of whole lines past the caches.
template <class S, class A>
constexpr bool can_stream() {
#if defined(__AVX512F__)
  return sizeof(S) == 4 && sizeof(A) == 4;
#else
  return false;
#endif
}
template <class V>
FASTSEQ_HOST_DEVICE void stream([[maybe_unused]] float* to, [[maybe_unused]] V v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#endif
}

// Parts of a workspace or scratch, in turn; only their size where the memory is null.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  void* take(int64_t bytes) {
    char* part = memory_ ? memory_ + used_ : nullptr;
    used_ += blocks_of(bytes, 64) * 64;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Rows of plain vectors, a line further apart than they need: a power of two would put neighbors into one cache set.
template <class A>
int64_t padded(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(A);
  return blocks_of(columns, line) * line + line;
}

// A tile of plain columns: which it covers, and how many vectors (the last tile may have fewer).
template <class A>
struct Columns {
  static constexpr int64_t kWidth = Math<A>::kWidth;
  int64_t begin, blocks;
  Columns(int64_t tile, int64_t columns)
      : begin(tile * kTileVectors * kWidth), blocks(min(kTileVectors, blocks_of(columns - begin, kWidth))) {}
};

// Walks the tiles of a step, every other step backwards: what the last step left in the caches is used before it is displaced. (A
// repeated walk in one direction finds nothing of a set of weights larger than the cache; to and fro finds the cache's size of it.)
template <class F>
FASTSEQ_HOST_DEVICE void for_tiles(const int64_t tiles[2], int64_t step, F&& body) {
  const int64_t count = tiles[1] - tiles[0];
  for (int64_t i = 0; i < count; ++i) body(step & 1 ? tiles[1] - 1 - i : tiles[0] + i);
}

// The tile after one of a walk; the last one's is itself, with which the next walk begins.
inline int64_t tile_after(const int64_t tiles[2], int64_t step, int64_t tile) {
  return step & 1 ? max(tile - 1, tiles[0]) : min(tile + 1, tiles[1] - 1);
}

// Rows [begin, begin + count) of a step, multiplied with one tile of weights: sums [count][vectors][W].
template <class A>
struct Item {
  int64_t tile, begin, count, vectors;
  const A* sums;
};

// What an item's rows are multiplied with, and what their sums start from.
template <class Product>
struct Weights {
  const void* packed;  // of one tile; null: the sums are there already
  int64_t depth;
  Start<typename Product::A> start;
  const void* next = nullptr;  // the weights that the product after these takes, to be fetched ahead
  // a second product in the same sums: rows of the input, but for the last `own` vectors, which then stand behind the others
  const void* packed_input = nullptr;
  int64_t input_depth = 0;
  const typename Product::Matrix* inputs = nullptr;
  int64_t input_row = 0, own = 0;
};

// Work that waits for the next product to run beside it: the rows of an item, finished by finish(item, from, to), several at a time:
// the latencies of one pass during the operations of others.
template <class A, class Finish>
class Waiting {
 public:
  explicit Waiting(const Finish& finish) : finish_(finish) {}
  void set(const Item<A>& item) { item_ = item, next_ = 0; }
  void share(int64_t parts) { share_ = max(blocks_of(item_.count, parts), kLeastRows); }
  void operator()() { up_to(min(next_ + share_, item_.count)); }
  void rest() { up_to(item_.count); }

 private:
  static constexpr int64_t kLeastRows = 16;

  void up_to(int64_t end) {
    if (next_ < end) finish_(item_, next_, end);
    next_ = end;
  }

  const Finish& finish_;
  Item<A> item_{};
  int64_t next_ = 0, share_ = 0;
};

struct NothingWaits {
  void share(int64_t) {}
  void operator()() {}
  void rest() {}
};

// The products of one step: every tile of the range with the rows [0, active) of a matrix; finish(item, from, to) for all its rows, as soon
// as possible. prepare(item) comes first.
template <class Product, class A, class Prepare, class Finish>
FASTSEQ_HOST_DEVICE void multiply_step(const Product& product, const typename Product::Matrix& matrix, int64_t active,
                                       const int64_t tiles[2], int64_t step, A* sums, const Prepare& prepare, const Finish& finish) {
  constexpr int64_t kSums = Product::kMostRows * kTileVectors * Product::W;
  const int64_t block = active ? product.block(active) : 1;
  Waiting<A, Finish> waiting(finish);
  int64_t turn = 0;
  for_tiles(tiles, step, [&](int64_t tile) __attribute__((always_inline)) {
    for (int64_t begin = 0; begin < active; begin += block) {
      A* own = sums + (Product::kInterleaves ? turn++ & 1 : 0) * kSums;
      Item<A> item{tile, begin, min(block, active - begin), 0, own};
      const Weights<Product> weights = prepare(item);
      if (weights.packed_input)
        product.multiply_both(matrix, begin, weights, item.count, item.vectors - weights.own, own, waiting);
      else if (weights.packed)
        product.multiply(matrix, begin, item.count, weights.packed, item.vectors, weights.depth, weights.start, own,
                         begin + block < active ? weights.packed : weights.next, waiting);
      else
        waiting.rest();
      waiting.set(item);
      if (!Product::kInterleaves || !weights.packed) waiting.rest();
    }
  });
  waiting.rest();
}

// The same of few rows: the latencies of a row's gates have nothing to hide behind, so that tiles are multiplied one after the other, then
// finished together, finish(items, count). beside(first, second) comes before a run of weights, whose panels begin there; it says whether
// it has fetched the first half of it.
template <class Product, class A, class Prepare, class Beside, class Finish>
FASTSEQ_HOST_DEVICE void multiply_few(const Product& product, const typename Product::Matrix& matrix, int64_t active,
                                      const int64_t tiles[2], int64_t step, A* sums, const Prepare& prepare, const Beside& beside,
                                      const Finish& finish) {
  if (active == 0) return;
  Item<A> items[Product::kMostRows];
  const int64_t most = Product::kMostRows / active;
  int64_t count = 0;
  for_tiles(tiles, step, [&](int64_t tile) __attribute__((always_inline)) {
    A* own = sums + count * active * kTileVectors * Product::W;
    Item<A>& item = items[count++] = {tile, 0, active, 0, own};
    const Weights<Product> weights = prepare(item);
    if (weights.packed)
      product.multiply_few(matrix, active, weights.packed, item.vectors, weights.depth, weights.start, own, beside);
    if (count == most) finish(items, count), count = 0;
  });
  if (count) finish(items, count);
}

struct Steps {
  const Rows& rows;
  bool reverse;  // from the last step to the first

  int64_t time(int64_t step) const { return reverse ? rows.steps - 1 - step : step; }
  int64_t active(int64_t t) const { return rows.active ? rows.active[t] : rows.slots; }
  int64_t row_of(int64_t t) const { return rows.start ? rows.start[t] : t * rows.stride; }
  int64_t row(int64_t t, int64_t slot) const { return row_of(t) + rows.index[slot]; }
  int64_t length(int64_t slot) const { return rows.length ? rows.length[slot] : rows.steps; }

  // Zeroes what a padded tensor (elements of S, `columns` wide, rows `stride` apart) holds beyond the rows' lengths.
  template <class S>
  void clear(S* data, int64_t stride, int64_t columns) const {
    if (!data || !rows.active || rows.start) return;
    for (int64_t t = 0; t < rows.steps; ++t)
      for (int64_t slot = rows.active[t]; slot < rows.slots; ++slot)
        __builtin_memset(data + row(t, slot) * stride, 0, columns * sizeof(S));
  }
};

// Where a lane starts anew: before a step of the forward pass. A lane that goes backwards does at the last step before a segment's first.
struct Cuts {
  const Steps& steps;
  bool reverse;

  int64_t begin(int64_t t) const { return reverse ? t + 1 : t; }
  bool any(int64_t t) const {
    const Rows& rows = steps.rows;
    return rows.begins && begin(t) < rows.steps && rows.begins[begin(t)];
  }
  // of a step with any
  bool of(int64_t t, int64_t slot) const {
    return slot < steps.active(begin(t)) && steps.rows.resets[steps.row(begin(t), slot)];
  }
};

template <class C>
constexpr int64_t unit_blocks() {
  return C::kGates == 1 ? kTileVectors : 1;
}

// What the gates tensor holds of a unit: with zoneout at least the step's output before it.
template <class C, bool kZoned>
constexpr int saved_of() {
  return kZoned && C::kSaved == 0 ? 1 : C::kSaved;
}

// Whether a cell's steps look at all units of a row together: recurrent_normalized.inl.
template <class C>
constexpr bool kNormalized = requires { C::kNormalizesC; };
template <class C>
constexpr bool normalizes_c() {
  if constexpr (kNormalized<C>)
    return C::kNormalizesC;
  else
    return false;
}

// The mean of a row, and what its distances from it are multiplied by.
template <class A>
struct Statistics {
  A mean, scale;
  FASTSEQ_HOST_DEVICE typename Math<A>::V normal(typename Math<A>::V v) const { return (v - mean) * scale; }
};

// What zoneout keeps of the old value of a state, rows [.., n]: one or zero by a mask, or a proportion.
template <class A>
struct Keep {
  using V = typename Math<A>::V;
  const bool* hold;
  A proportion;

  Keep(const bool* hold, double proportion) : hold(hold), proportion(proportion) {}
  bool any() const { return hold || proportion > 0; }
  V load(int64_t offset, int64_t n) const { return hold ? Memory<bool, A>::load(hold + offset, n) : V{} + proportion; }

  // the state after zoneout; what is not kept may be infinite
  static V held(V keep, V before, V after) {
    const V mixed = keep * before + (A(1) - keep) * after;
    return keep == 1 ? before : keep == 0 ? after : mixed;
  }
};

// Where a participant's columns of a state begin and end, given its tiles.
struct Range {
  int64_t begin, end;
  Range(const int64_t tiles[2], int64_t tile, int64_t columns)
      : begin(min(tiles[0] * tile, columns)), end(min(tiles[1] * tile, columns)) {}
};

// The largest absolute value of what a step will multiply, as bits: those of infinity and of a NaN are larger than any number's.
class Watch {
  using V = Lanes<float>::V;
  using U = Lanes<float>::U;
  static constexpr int64_t W = Math<float>::kWidth;

 public:
  // the first n of v
  FASTSEQ_HOST_DEVICE void see(V v, int64_t n) {
    U bits = (U)v & 0x7fffffffu;
    if (n < W) {
      U lane;
      for (int64_t i = 0; i < W; ++i) lane[i] = i;
      bits = lane < (uint32_t)n ? bits : U{};
    }
    most_ = bits > most_ ? bits : most_;
  }
  void see(const float* values, int64_t n) {
    for (int64_t i = 0; i < n; i += W) see(Memory<float, float>::load(values + i, n - i), n - i);
  }
  uint32_t bits() const {
    uint32_t most = 0;
    for (int64_t i = 0; i < W; ++i) most = most_[i] > most ? most_[i] : most;
    return most;
  }
  // within what parts can hold, or all zero; begins anew
  bool ends_within(float least) {
    const uint32_t most = bits();
    most_ = U{};
    return most == 0 || (most >= __builtin_bit_cast(uint32_t, least) && most <= __builtin_bit_cast(uint32_t, kMostOfParts));
  }

 private:
  U most_{};
};

// The input of some steps, projected before them: their rows together serve each input weight fetched, and what is projected is
// read again before it leaves the second-level cache.
constexpr int64_t kLeastChunkRows = 32, kChunkBytes = 512 << 10;

// Whether calls of few rows have kernels of their own: where the activations of two vectors fit the registers, but for double.
template <class Product, class C>
constexpr bool has_few() {
  return Product::kHasFew && sizeof(typename Product::A) == 4 && !kNormalized<C>;
}

// kFew: at most Product::kFewRows sequences, recurrent_few.inl.
template <class Product, class S, template <class> class Cell, bool kZoned, bool kFew = false>
class ForwardKernel {
  using A = typename Product::A;
  using C = Cell<Math<A>>;
  using Matrix = typename Product::Matrix;
  using Activations = std::conditional_t<kFew, typename Product::FewActivations, typename Product::Activations>;
  using M = Math<A>;
  using V = typename M::V;
  static constexpr int64_t W = M::kWidth;
  static constexpr int G = C::kGates, K = C::kStates, kOwn = C::kOwnRecurrent;
  static constexpr int kSaved = saved_of<C, kZoned>();
  static constexpr int64_t UB = unit_blocks<C>(), NV = G * UB;
  static constexpr bool kStreams = can_stream<S, A>();

  struct Buffers {  // of a team, [slots, ..] each
    Matrix h[2];  // state before and after the step
    A* c;         // K states, each like a row
    Matrix m;     // what the projection sees
    A *r, *fresh, *o;  // with layer norm: R h of G gates, each like a row; the new c before zoneout; its output gate
    int64_t ldc, bytes;

    Buffers(const Shape& shape, int64_t slots, void* workspace) : ldc(padded<A>(shape.hidden)) {
      Carver carver(workspace);
      for (auto& state : h) state = Matrix(carver.take(Matrix::bytes(slots, shape.output)), shape.output);
      c = static_cast<A*>(carver.take(slots * K * ldc * sizeof(A)));
      m = Matrix(carver.take(shape.projected ? Matrix::bytes(slots, shape.hidden) : 0), shape.hidden);
      const int64_t row = slots * ldc * sizeof(A);
      r = static_cast<A*>(carver.take(kNormalized<C> ? G * row : 0));
      fresh = static_cast<A*>(carver.take(normalizes_c<C>() ? row : 0));
      o = static_cast<A*>(carver.take(normalizes_c<C>() ? row : 0));
      bytes = carver.used();
    }
  };

  struct Nothing {};
  struct Chunk {  // of a participant
    bool fused;  // with the steps: only the rows of x are copied
    int64_t rows, tile_size, bytes;
    Matrix x[1 + kFew];   // [rows, I]
    A* gates[1 + kFew];   // [own unit tiles][rows][vectors][W]
    A* bias;              // [own unit tiles][vectors][W]
    // there are two, one of them made while the other is read
    [[no_unique_address]] std::conditional_t<kFew, bool, Nothing> ahead{};

    Chunk(const Forward& a, const Work& w, void* scratch)
        : fused(!kNormalized<C> && (Product::kFusesAll || (kOwn == 0 && !w.rows.active)) && w.rows.slots >= Product::kFusedRows &&
                Product::tile_bytes(NV, a.input) + Product::tile_bytes(NV, a.shape.output) <=
                    Product::kFusedBytes / max(1, w.unit_tiles[1] - w.unit_tiles[0])) {
      const int64_t slots = max(w.rows.slots, 1), row = G * a.shape.hidden * sizeof(A);
      rows = max(slots, min(min(max(kChunkBytes / row, kLeastChunkRows), Product::kChunkRows), w.rows.steps * slots));
      // a product takes, and gives, whole blocks of rows
      const int64_t whole = (blocks_of(rows, 16) + 1) * 16, tiles = a.x ? w.unit_tiles[1] - w.unit_tiles[0] : 0;
      tile_size = whole * NV * W;
      if constexpr (kFew) ahead = a.x && rows < w.rows.steps && projects_ahead(a, w);
      Carver carver(scratch);
      x[0] = Matrix(carver.take(a.x ? Matrix::bytes(whole, a.input) : 0), a.input);
      gates[0] = static_cast<A*>(carver.take(fused ? 0 : tiles * tile_size * sizeof(A)));
      if constexpr (kFew) {
        x[1] = Matrix(carver.take(ahead ? Matrix::bytes(whole, a.input) : 0), a.input);
        gates[1] = static_cast<A*>(carver.take(ahead ? tiles * tile_size * sizeof(A) : 0));
      }
      bias = static_cast<A*>(carver.take(tiles * NV * W * sizeof(A)));
      bytes = carver.used();
    }
  };

 public:
  static int64_t workspace(const Shape& shape, int64_t slots) { return Buffers(shape, slots, nullptr).bytes; }
  static int64_t scratch(const Forward& a, const Work& w) { return Chunk(a, w, nullptr).bytes; }

  ForwardKernel(const Forward& a, const Work& w)
      : a(a), w(w), H(a.shape.hidden), P(a.shape.output), D(a.shape.lanes), d(w.lane), B(a.batch), GH(G * H), I(a.input),
        projected(K == 1 && a.shape.projected), steps{w.rows, w.reverse}, cuts{steps, w.reverse},
        buf(a.shape, w.rows.slots, w.workspace),
        chunk(a, w, w.scratch), units(w.unit_tiles, UB * W, H), outputs(w.output_tiles, kTileVectors * W, P),
        own_h(projected ? outputs : units), keep_h(at<bool>(a.zoneout.hold_h, d * P), a.zoneout.h),
        keep_c(at<bool>(a.zoneout.hold_c, d * H), a.zoneout.c) {}

  // whether all that was multiplied lay within the product's range
  bool run() {
    begin();
    if (w.barrier) w.barrier->wait(w.weight);
    for (int64_t step = 0, turn = 0; step < w.rows.steps && (within || w.barrier); ++turn) {
      const int64_t end = x && !takes_x ? end_of_chunk(step) : w.rows.steps;
      if (x && !takes_x) project_steps(step, end, turn);
      const Product product(w.rows.slots, a.two_parts);
      for (const int64_t start = step; step < end; ++step) {
        t = steps.time(step);
        chunk_row = !x ? 0 : takes_x ? steps.row(t, 0) : chunk_start[half()][step - start];
        old_h = &buf.h[step & 1], new_h = &buf.h[1 - (step & 1)];
        if constexpr (Product::kTakesRows)
          if (takes_y && step) last_y = Matrix(y + steps.row(steps.time(step - 1), 0) * D * P, P, D * P), old_h = &last_y;
        walk(product, step);
        if constexpr (Product::kWatched) within &= watch.ends_within(a.least_h);
      }
    }
    finish();
#if defined(__AVX512F__)
    if (streams) _mm_sfence();
#endif
    return within;
  }

 private:
  // What a long call saves for the backward pass is larger than the caches: stores past them neither fetch its lines nor displace the
  // weights (LSTM of 256 units, 32 sequences, 128 steps: 26 and 21 ms).
  static constexpr int64_t kStreamedBytes = 8 << 20;
  bool streams_saved() const {
    const int64_t rows = w.rows.steps * w.rows.slots;
    const auto odd = reinterpret_cast<uintptr_t>(gates) | reinterpret_cast<uintptr_t>(c_all) | H * sizeof(A);
    return kStreams && gates && odd % 64 == 0 && rows * (kSaved * sizeof(S) + K * sizeof(A)) * H > kStreamedBytes;
  }

  // Narrower elements do not fill a line at once: their lines are fetched while the product before is at work (6.8 and 5.9 ms in bfloat16).
  bool fetches_saved() const {
    return sizeof(S) == 2 && gates && w.rows.steps * w.rows.slots * (kSaved * sizeof(S) + K * sizeof(A)) * H > kStreamedBytes;
  }
  void fetch_saved(const Item<A>& item, int64_t u) const {
    for (int64_t r = 0; r < item.count; ++r) {
      const int64_t row = steps.row(t, item.begin + r) * D;
      for (int g = 0; g < kSaved; ++g) __builtin_prefetch(gates + (row * kSaved + g) * H + u, 1, 3);
      for (int k = 0; k < K; ++k) __builtin_prefetch(c_all + (row * K + k) * H + u, 1, 3);
    }
  }

  // Whether rows [.., columns] of every step, `stride` elements apart, are operands as they lie.
  bool takes(const S* rows, int64_t columns, int64_t stride) const {
    if constexpr (Product::kTakesRows) {
      const int64_t slots = w.rows.slots, first = slots ? w.rows.index[0] : 0;
      for (int64_t s = 0; s < slots; ++s)
        if (w.rows.index[s] != first + s) return false;
      return !kNormalized<C> && rows && !w.rows.active && !w.rows.start && Product::takes(rows, columns, stride, slots);
    }
    return false;
  }
  Matrix rows_of_input() const {
    if constexpr (Product::kTakesRows)
      if (takes_x) return Matrix(x, I, I);
    return {};
  }
  // The x of the next step, a share with every tile.
  void fetch_input(int64_t tile) const {
    const int64_t next = w.reverse ? t - 1 : t + 1, tiles = w.unit_tiles[1] - w.unit_tiles[0], i = tile - w.unit_tiles[0];
    if (next < 0 || next >= w.rows.steps) return;
    constexpr int64_t line = 64 / sizeof(S);
    const int64_t lines = blocks_of(w.rows.slots * I, line);
    const S* row = x + steps.row(next, 0) * I;
    for (int64_t j = lines * i / tiles; j < lines * (i + 1) / tiles; ++j) prefetch(row + j * line);
  }

  const void* unit_tile(const void* packed, int64_t tile, int64_t depth) const {
    return at<char>(packed, (d * blocks_of(H, UB * W) + tile) * Product::tile_bytes(NV, depth));
  }

  const void* output_tile(int64_t tile) const {
    return at<char>(a.projection, (d * blocks_of(P, kTileVectors * W) + tile) * Product::tile_bytes(kTileVectors, H));
  }

  // own columns of a slot's state: h0 [D, B, P], c0 [D, B, K*H] or null
  void set_state(int64_t s, const void* h0, const void* c0, std::initializer_list<const Matrix*> states) {
    const int64_t place = d * B + w.rows.index[s];
    for (int64_t j = own_h.begin; j < own_h.end; j += W) {
      const V h = h0 ? Memory<S, A>::load(at<S>(h0, place * P) + j, P - j) : V{};
      if constexpr (Product::kWatched) watch.see(h, P - j);
      for (const Matrix* state : states) state->template store<S>(s, j, h, P - j);
    }
    for (int k = 0; k < K; ++k)
      for (int64_t j = units.begin; j < units.end; j += W)
        *(V*)(buf.c + (s * K + k) * buf.ldc + j) = c0 ? Memory<A, A>::load(at<A>(c0, (place * K + k) * H) + j, H - j) : V{};
  }

  // own columns of the states that step `at_time` starts from, where it starts anew
  void cut(int64_t at_time, const Matrix& state) {
    if (!cuts.any(at_time)) return;
    for (int64_t s = 0; s < steps.active(at_time); ++s)
      if (cuts.of(at_time, s)) set_state(s, a.reset_h, a.reset_c, {&state});
  }

  // own columns of the first state; both h buffers hold it until a slot's first step has passed
  void begin() {
    for (int64_t s = 0; s < w.rows.slots; ++s) set_state(s, a.h0, a.c0, {&buf.h[0], &buf.h[1]});
    cut(steps.time(0), buf.h[0]);
    if constexpr (Product::kWatched) within = watch.ends_within(a.least_h);
    if (x)
      for (int64_t tile = w.unit_tiles[0]; tile < w.unit_tiles[1]; ++tile) {
        const int64_t u0 = tile * UB * W, blocks = min(UB, blocks_of(H - u0, W));
        A* to = chunk.bias + (tile - w.unit_tiles[0]) * NV * W;
        for (int g = 0; g < G; ++g)
          for (int64_t b = 0; b < blocks; ++b, to += W)
            *(V*)to = bias ? Memory<S, A>::load(bias + g * H + u0 + b * W, H - u0 - b * W) : V{};
      }
    if (w.first) {
      for (auto& state : buf.h) state.clear_rest(w.rows.slots, P);
      if (projected) buf.m.clear_rest(w.rows.slots, H);
      steps.clear(y, D * P, P);
      steps.clear(c_all, D * K * H, K * H);
      steps.clear(gates, D * kSaved * H, kSaved * H);
    }
  }

  // steps whose rows fit in a chunk, at least one
  int64_t end_of_chunk(int64_t step) const {
    int64_t rows = 0, end = step;
    do {
      rows += steps.active(steps.time(end++));
    } while (end < min(step + Product::kChunkRows, w.rows.steps) && rows + steps.active(steps.time(end)) <= chunk.rows);
    return end;
  }

  // x of the steps [begin, end) -> chunk.x[to]; how many rows it is
  FASTSEQ_HOST_DEVICE int64_t gather_input(int64_t begin, int64_t end, int64_t to) {
    int64_t rows = 0;
    for (int64_t step = begin; step < end; ++step) {
      const int64_t at_time = steps.time(step), active = steps.active(at_time);
      chunk_start[to][step - begin] = rows;
      for (int64_t slot = 0; slot < active; ++slot) {
        const S* row = x + steps.row(at_time, slot) * I;
        chunk.x[to].put(rows++, row, I);
        if constexpr (Product::kWatched) watch.see(row, I);
      }
    }
    if constexpr (Product::kWatched) within &= watch.ends_within(a.least_x);
    if (rows) chunk.x[to].clear_rest(rows, I);
    return rows;
  }

  // x of the steps [begin, end) -> chunk.gates
  FASTSEQ_HOST_DEVICE void project_steps(int64_t begin, int64_t end, int64_t turn) {
    if constexpr (kFew)
      if (chunk.ahead) return begin_ahead(begin, end, turn);
    project_input(begin, end, turn);
  }

  void project_input(int64_t begin, int64_t end, int64_t turn) {
    const int64_t rows = gather_input(begin, end, 0);
    if (rows == 0 || chunk.fused) return;
    const Product product(rows, a.two_parts);
    const int64_t block = product.block(rows);
    for_tiles(w.unit_tiles, turn, [&](int64_t tile) {
      const int64_t vectors = G * min(UB, blocks_of(H - tile * UB * W, W));
      const Start<A> start{chunk.bias + (tile - w.unit_tiles[0]) * NV * W, 0, vectors};
      A* to = chunk.gates[0] + (tile - w.unit_tiles[0]) * chunk.tile_size;
      for (int64_t r = 0; r < rows; r += block)
        product.multiply(chunk.x[0], r, min(block, rows - r), unit_tile(a.input_weights, tile, I), vectors, I, start, to + r * vectors * W,
                         unit_tile(a.input_weights, r + block < rows ? tile : tile_after(w.unit_tiles, turn, tile), I), NothingWaits());
    });
  }

  void walk(const Product& product, int64_t step) {
    const int64_t active = steps.active(t);
    if (w.barrier) old_h->prefetch(active);
    const auto prepare = [&](Item<A>& item) __attribute__((always_inline)) -> Weights<Product> {
      const int64_t u0 = item.tile * UB * W;
      item.vectors = G * min(UB, blocks_of(H - u0, W));
      if (fetches) fetch_saved(item, u0);
      if (x && chunk.fused) {
        const A* start = chunk.bias + (item.tile - w.unit_tiles[0]) * NV * W;
        const int64_t own = item.vectors / G * kOwn;
        item.vectors += own;
        const void* next = unit_tile(a.input_weights, tile_after(w.unit_tiles, step, item.tile), I);
        if (takes_x && !item.begin) fetch_input(item.tile);
        return {unit_tile(a.weights, item.tile, P), P, {start, 0, NV}, next, unit_tile(a.input_weights, item.tile, I), I,
                takes_x ? &x_rows : &chunk.x[0], chunk_row, own};
      }
      const void* next = unit_tile(a.weights, tile_after(w.unit_tiles, step, item.tile), P);
      if (x)
        return {unit_tile(a.weights, item.tile, P), P, {projected_input(item, 0), item.vectors * W, item.vectors / G * (G - kOwn)}, next};
      for (int64_t r = 0; r < item.count; ++r)
        for (int g = 0; g < G; ++g) prefetch(place_of_gates(steps.row(t, item.begin + r) * D * GH + g * H + u0));
      if (in_place) multiply_in_place(item);
      return {unit_tile(a.weights, item.tile, P), P, {}, next};
    };
    [[maybe_unused]] const auto finish = [this](const Item<A>& item, int64_t from, int64_t to) __attribute__((always_inline)) {
      if constexpr (kNormalized<C>)
        keep_product(item, from, to);
      else
        finish_rows(item, from, to);
    };
    if constexpr (kFew)
      multiply_few<Product, A>(product, *old_h, active, w.unit_tiles, step, sums, prepare, Beside{*this},
                               [&](const Item<A>* items, int64_t count) { finish_items(items, count, active); });
    else
      multiply_step<Product, A>(product, *old_h, active, w.unit_tiles, step, sums, prepare, finish);
    if constexpr (kNormalized<C>) finish_normalized(active);
    if (projected) {
      if (w.barrier) w.barrier->wait(w.weight);
      const auto columns = [&](Item<A>& item) __attribute__((always_inline)) -> Weights<Product> {
        item.vectors = Columns<A>(item.tile, P).blocks;
        return {output_tile(item.tile), H, {}, output_tile(tile_after(w.output_tiles, step, item.tile))};
      };
      const auto project = [this](const Item<A>& item, int64_t from, int64_t to) __attribute__((always_inline)) {
        for (int64_t r = from; r < to; ++r) project_row(item, r);
      };
      multiply_step<Product, A>(product, buf.m, active, w.output_tiles, step, sums, columns, project);
    }
    if (step + 1 < w.rows.steps) cut(steps.time(step + 1), *new_h);
    if (w.barrier) w.barrier->wait(w.weight);
  }

  // R h of a short call, or with weights that are never packed
  void multiply_in_place(const Item<A>& item) const {
    using X = std::remove_cvref_t<decltype(*old_h->row(0))>;
    const int64_t u0 = item.tile * UB * W, blocks = item.vectors / G;
    A* sums = const_cast<A*>(item.sums);
    for (int64_t v = 0; v < item.vectors; ++v) {
      const int64_t u = u0 + v % blocks * W, first = v / blocks * H;  // lanes beyond the units repeat the last
      with_stored<S>(a.stored, [&]<class T>() {
        InPlace<A>::template multiply<X, T>(
            old_h->row(item.begin), old_h->stride(), item.count, P,
            [&](int64_t lane) { return static_cast<const T*>(in_place) + (first + min(u + lane, H - 1)) * P; },
            [&](int64_t r, int64_t lane, int64_t count, const A* values) __attribute__((always_inline)) {
              __builtin_memcpy(sums + (r * item.vectors + v) * W + lane, values, count * sizeof(A));
            });
      });
      if (a.scales) {
        const V scale = Memory<A, A>::load(static_cast<const A*>(a.scales[d]) + first + u, H - u);
        for (int64_t r = 0; r < item.count; ++r) *(V*)(sums + (r * item.vectors + v) * W) *= scale;
      }
    }
  }

  // [vectors][W] of a row of an item
  const A* projected_input(const Item<A>& item, int64_t r) const {
    return chunk.gates[half()] + (item.tile - w.unit_tiles[0]) * chunk.tile_size + (chunk_row + item.begin + r) * item.vectors * W;
  }

  // the units of a tile, of some sequences
  __attribute__((noinline)) void finish_rows(const Item<A>& item, int64_t from, int64_t to) {
    const int64_t blocks = item.vectors / G;
    for (int64_t b = 0; b < blocks; ++b) {
      // whole vectors without a test at every access
      const int64_t u = (item.tile * UB + b) * W;
      if (!kZoned && H - u >= W)
        finish_units<true>(item, from, to, b, u);
      else
        finish_units<false>(item, from, to, b, u);
    }
  }

  template <bool kWhole>
  FASTSEQ_HOST_DEVICE void finish_units(const Item<A>& item, int64_t from, int64_t to, int64_t b, int64_t u) {
    const int64_t stride = item.vectors * W;
    const bool apart = x && !chunk.fused;  // the input's part of gates that do not add it, in sums elsewhere
    const A* sums_of = item.sums + b * W;
    const A* x_sums = !kOwn ? nullptr : apart ? projected_input(item, 0) + b * W : sums_of + kOwn * W;
    const RowsOfItem rows{sums_of, x_sums, stride, apart ? item.vectors * W : stride, w.rows.index + item.begin};
    finish_vectors<kWhole>(item.begin, u, [&](const auto& finish) __attribute__((always_inline)) {
      int64_t r = from;
      if constexpr (!kZoned && kWhole && FASTSEQ_VECTOR_REGISTERS == 32)
        for (; r + 2 <= to; r += 2) finish.template operator()<TwoRows<A, Activations>>(rows, r);
      for (; r < to; ++r) finish.template operator()<OneRow<A, Activations>>(rows, r);
    });
  }

  // One vector of units of some rows of an item: where row r has its gates, and those of the input that do not add them.
  struct RowsOfItem {
    const A *sums_of, *x_sums_of;
    int64_t stride, x_stride;
    const int64_t* index;  // its place within a step

    const A* sums(int64_t r) const { return sums_of + r * stride; }
    const A* x_sums(int64_t r) const { return x_sums_of + r * x_stride; }
    int64_t place(int64_t r) const { return index[r]; }
    int64_t slot(int64_t r) const { return r; }  // less the item's first
    int64_t unit(int64_t) const { return 0; }    // less the vector's first
  };

  // The projected input at a place counted from the direction's first.
  FASTSEQ_HOST_DEVICE V given_gates(int64_t place, int64_t n) const {
    if constexpr (!std::is_same_v<S, A>)
      if (wide_x_gates) return Memory<A, A>::load(wide_x_gates + place, n);
    return Memory<S, A>::load(x_gates + place, n);
  }
  const void* place_of_gates(int64_t place) const {
    return wide_x_gates ? static_cast<const void*>(wide_x_gates + place) : x_gates + place;
  }

  // Units of some sequences, finish(at, i): the i-th and, of two rows, the one after it, of which `at` tells as RowsOfItem does, slots and
  // units counted from these.
  template <bool kWhole, class Walk>
  FASTSEQ_HOST_DEVICE void finish_vectors(int64_t begin, int64_t u, const Walk& walk) {
    Watch seen = watch;
    // what the loop needs of the members, which stores in it might otherwise change
    const int64_t units = H, n = kWhole ? W : units - u, ldc = buf.ldc;
    const int64_t first_row = steps.row_of(t), gates_stride = D * GH, c_stride = D * K * units, saved_stride = D * kSaved * units;
    const int64_t y_stride = D * P;
    const bool x_of = !x;
    const S* inner_of = vectors ? vectors + u : nullptr;
    A* c_of = buf.c + begin * K * ldc + u;
    A* c_to = c_all ? c_all + u : nullptr;
    S* saved_to = gates ? gates + u : nullptr;
    S* y_to = y + u;
    const Matrix before = *old_h, after = *new_h, m = buf.m;
    const bool through_m = projected, takes_rows_of_y = takes_y;

    const bool past_caches = kWhole && streams;
    const auto keep = [&]<class E>(E* to, V v) __attribute__((always_inline)) {
      if constexpr (kWhole && kStreams)
        if (past_caches) return stream(to, v);
      Memory<E, A>::store(to, v, n);
    };

    const auto finish = [&]<class Rows>(const auto& at, int64_t first) __attribute__((always_inline)) {
      using R = typename Rows::V;
      int64_t row[Rows::kRows];
#pragma GCC unroll 2
      for (int64_t i = 0; i < Rows::kRows; ++i) row[i] = first_row + at.place(first + i);
      R gx[G], gr[G], inner[C::kVectors + 1], saved[kSaved + 1], c[K + 1], h_next, c_next[K + 1];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        gx[g] = Rows::gather([](int64_t) { return -V{}; });  // what is added to -0 stays as it is: the compiler leaves the sum out
        // with x itself, of the input too
        gr[g] = Rows::gather([&](int64_t i) { return *(const V*)(at.sums(first + i) + g * W); });
        const auto given = [&](int64_t i) { return given_gates(u + at.unit(first + i) + row[i] * gates_stride + g * units, n); };
        if (g < G - kOwn) {
          if (x_of) gr[g] = gr[g] + Rows::gather(given);
        } else if (x_of) {
          gx[g] = Rows::gather(given);
        } else {
          gx[g] = Rows::gather([&](int64_t i) { return *(const V*)(at.x_sums(first + i) + g * W); });
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
        c[k] = Rows::gather(
            [&](int64_t i) { return *(const V*)(c_of + at.unit(first + i) + (at.slot(first + i) * K + k) * ldc); });
#pragma GCC unroll 4
      for (int v = 0; v < C::kVectors; ++v)
        inner[v] = Rows::gather([&](int64_t i) { return inner_of ? Memory<S, A>::load(inner_of + at.unit(first + i) + v * units, n) : V{}; });
      // the cells that read h (GRU) have no projection, so that P = H
      const R h = through_m ? R{} : Rows::gather([&](int64_t i) { return before.load(begin + at.slot(first + i), u + at.unit(first + i)); });
      bool done = false;
      if constexpr (requires { Cell<Rows>::forward_alone(gx, gr, c, h_next, c_next); } && !kZoned)
        if (!saved_to) Cell<Rows>::forward_alone(gx, gr, c, h_next, c_next), done = true;
      if (!done) Cell<Rows>::forward(gx, gr, inner, h, c, saved, h_next, c_next);
      if constexpr (kZoned) {
        if (!C::kSaved) saved[0] = h_next;
        if (!through_m) h_next = keep_h.held(keep_h.load(row[0] * D * P + u, n), h, Memory<S, A>::rounded(h_next));
        if (K == 1) c_next[0] = keep_c.held(keep_c.load(row[0] * D * units + u, n), c[0], c_next[0]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
        Rows::scatter(c_next[k], [&](int64_t i, V v) {
          *(V*)(c_of + at.unit(first + i) + (at.slot(first + i) * K + k) * ldc) = v;
          if (c_to) keep(c_to + at.unit(first + i) + row[i] * c_stride + k * units, v);
        });
      if (saved_to)
#pragma GCC unroll 8
        for (int g = 0; g < kSaved; ++g)
          Rows::scatter(saved[g], [&](int64_t i, V v) { keep(saved_to + at.unit(first + i) + row[i] * saved_stride + g * units, v); });
      Rows::scatter(h_next, [&](int64_t i, V v) {
        if (through_m) {
          m.template store<A>(begin + at.slot(first + i), u + at.unit(first + i), v, n);
        } else {
          if constexpr (Product::kWatched) seen.see(v, n);
          if (!takes_rows_of_y) after.template store<S>(begin + at.slot(first + i), u + at.unit(first + i), v, n);
          Memory<S, A>::store(y_to + at.unit(first + i) + row[i] * y_stride, v, n);
        }
      });
    };
    walk(finish);
    watch = seen;
  }

  // recurrent_few.inl
  static bool projects_ahead(const Forward& a, const Work& w);
  void begin_ahead(int64_t begin, int64_t end, int64_t turn);
  void plan_ahead(int64_t begin, int64_t end, int64_t to);
  void project_ahead(const void* first, const void* second);
  void next_piece(const void* first, const void* second);
  void finish_items(const Item<A>* items, int64_t count, int64_t active);
  struct Beside {
    ForwardKernel& kernel;
    FASTSEQ_HOST_DEVICE bool operator()(const void* first, const void* second) const {
      if (kernel.few.left) kernel.project_ahead(first, second);
      return kernel.chunk.ahead;
    }
  };
  // of the chunk that is read
  int64_t half() const {
    if constexpr (kFew) return few.half;
    return 0;
  }

  // recurrent_normalized.inl
  void keep_product(const Item<A>& item, int64_t from, int64_t to) const;
  void finish_normalized(int64_t active);
  void finish_gates(int64_t slot);
  void finish_cell(int64_t slot);
  void keep_output(int64_t slot, int64_t row, int64_t u, V h);

  // the outputs of a tile, of one sequence
  void project_row(const Item<A>& item, int64_t r) const {
    const int64_t slot = item.begin + r, row = steps.row(t, slot);
    for (int64_t b = 0; b < item.vectors; ++b) {
      const int64_t j = (item.tile * kTileVectors + b) * W;
      V h = *(const V*)(item.sums + (r * item.vectors + b) * W);
      if constexpr (kZoned)
        h = keep_h.held(keep_h.load(row * D * P + j, P - j), old_h->load(slot, j), Memory<S, A>::rounded(h));
      new_h->template store<S>(slot, j, h, P - j);
      Memory<S, A>::store(y + row * D * P + j, h, P - j);
    }
  }

  void finish() const {
    for (int64_t s = 0; s < w.rows.slots; ++s) {
      const int64_t place = d * B + w.rows.index[s], length = steps.length(s);
      const int64_t last = w.reverse ? 0 : length - 1;
      const S* h = length ? y + steps.row(last, s) * D * P : at<S>(a.h0, place * P);
      S* h_n = at<S>(a.h_n, place * P) + own_h.begin;
      if (h)
        __builtin_memcpy(h_n, h + own_h.begin, (own_h.end - own_h.begin) * sizeof(S));
      else
        __builtin_memset((void*)h_n, 0, (own_h.end - own_h.begin) * sizeof(S));
      for (int k = 0; k < K; ++k)
        __builtin_memcpy(at<A>(a.c_n, (place * K + k) * H) + units.begin, buf.c + (s * K + k) * buf.ldc + units.begin,
                         (units.end - units.begin) * sizeof(A));
    }
  }

  const Forward& a;
  const Work& w;
  const int64_t H, P, D, d, B, GH, I;
  const bool projected;
  const Steps steps;
  const Cuts cuts;
  const Buffers buf;
  const Chunk chunk;
  const Range units, outputs, own_h;
  const Keep<A> keep_h, keep_c;
  const S* x = static_cast<const S*>(a.x);
  const S* x_gates = at<S>(a.x_gates, d * GH);  // unless they are wider
  const A* wide_x_gates = a.wide_x_gates ? at<A>(a.x_gates, d * GH) : nullptr;
  const S* bias = at<S>(a.input_bias, d * GH);
  const void* in_place = a.in_place ? a.in_place[d] : nullptr;
  const S* vectors = at<S>(a.vectors, d * C::kVectors * H);
  S* y = at<S>(a.y, d * P);
  A* c_all = at<A>(a.c, d * K * H);
  S* gates = at<S>(a.gates, d * kSaved * H);
  const bool streams = streams_saved(), fetches = fetches_saved();
  // whether x and, as the state before a step, y serve as operands themselves
  const bool takes_x = chunk.fused && takes(x, I, I), takes_y = !projected && !w.rows.resets && takes(y, P, D * P);
  const Matrix x_rows = rows_of_input();
  Matrix last_y;
  // of the step at hand
  int64_t t = 0, chunk_row = 0;
  const Matrix *old_h = nullptr, *new_h = nullptr;
  Watch watch;  // of a product that is watched
  bool within = true;
  int64_t chunk_start[1 + kFew][Product::kChunkRows];
  struct Ahead {
    int64_t half = 0;                      // of the chunk that is read
    int64_t to = 0, rows = 0;              // of the one that is made
    int64_t tile = 0, piece = 0, row = 0;  // what is next
    int64_t of_chunk = 0, left = 0;        // pieces
    int64_t runs = 0, credit = 0;          // during which they are made; of_chunk for each of them, less `runs` for every piece
  };
  [[no_unique_address]] std::conditional_t<kFew, Ahead, Nothing> few;
  alignas(64) A sums[(Product::kInterleaves ? 2 : 1) * Product::kMostRows * kTileVectors * W];
};

template <class Product, class S, template <class> class Cell, bool kZoned>
class BackwardKernel {
  using A = typename Product::A;
  using C = Cell<Math<A>>;
  using Matrix = typename Product::Matrix;
  using M = Math<A>;
  using V = typename M::V;
  static constexpr int64_t W = M::kWidth;
  static constexpr int G = C::kGates, K = C::kStates, kOwn = C::kOwnRecurrent;
  static constexpr int kSaved = saved_of<C, kZoned>();
  static constexpr int64_t UB = kTileVectors;  // unit blocks of a tile

  struct Buffers {  // of a team, [slots, ..] each
    Matrix dgates[2];  // gradient of R h, of the step before (in the walk) and of this one
    A* dh;             // what reached h other than through R h; before a slot's first step, its dh_n
    A* dc;             // K states, each like a row
    Matrix dp;         // gradient of the projected output
    // with layer norm: gradients of a step's output, of N(c), of N(R h) for G gates, each like a row
    A *dm, *dnormal_c, *dnormal;
    Statistics<A>* statistics;  // [unit tiles, slots]: each member's own, at its first tile
    int64_t ldh, ldp, bytes;

    Buffers(const Shape& shape, int64_t slots, void* workspace) : ldh(padded<A>(shape.output)), ldp(padded<A>(shape.hidden)) {
      Carver carver(workspace);
      for (auto& grads : dgates) grads = Matrix(carver.take(Matrix::bytes(slots, G * shape.hidden)), G * shape.hidden);
      dh = static_cast<A*>(carver.take(slots * ldh * sizeof(A)));
      dc = static_cast<A*>(carver.take(slots * K * ldp * sizeof(A)));
      dp = Matrix(carver.take(shape.projected ? Matrix::bytes(slots, shape.output) : 0), shape.output);
      const int64_t row = slots * ldp * sizeof(A), tiles = blocks_of(shape.hidden, UB * W);
      dm = static_cast<A*>(carver.take(kNormalized<C> ? row : 0));
      dnormal_c = static_cast<A*>(carver.take(normalizes_c<C>() ? row : 0));
      dnormal = static_cast<A*>(carver.take(kNormalized<C> ? G * row : 0));
      statistics = static_cast<Statistics<A>*>(carver.take(kNormalized<C> ? tiles * slots * sizeof(Statistics<A>) : 0));
      bytes = carver.used();
    }
  };

 public:
  static int64_t workspace(const Shape& shape, int64_t slots) { return Buffers(shape, slots, nullptr).bytes; }

  BackwardKernel(const Backward& a, const Work& w)
      : a(a), w(w), H(a.shape.hidden), P(a.shape.output), D(a.shape.lanes), d(w.lane), B(a.batch), GH(G * H),
        projected(K == 1 && a.shape.projected), steps{w.rows, !w.reverse}, cuts{steps, w.reverse},
        buf(a.shape, w.rows.slots, w.workspace),
        units(w.unit_tiles, UB * W, H), outputs(w.output_tiles, UB * W, P), own_h(projected ? outputs : units),
        keep_h(at<bool>(a.zoneout.hold_h, d * P), a.zoneout.h), keep_c(at<bool>(a.zoneout.hold_c, d * H), a.zoneout.c) {}

  // whether all that was multiplied lay within the product's range
  bool run() {
    begin();
    if (w.barrier) w.barrier->wait(w.weight);
    const Product product(w.rows.slots, a.two_parts);
    for (int64_t step = 0; step < w.rows.steps && (within || w.barrier); ++step) {
      t = steps.time(step);
      old_dgates = &buf.dgates[step & 1], new_dgates = &buf.dgates[1 - (step & 1)];
      anew = cuts.any(t);
      walk(product, step);
      came_from = t, came_anew = anew;
      if constexpr (Product::kWatched) within &= watch.ends_within(a.least);
    }
    finish(product);
    return within;
  }

 private:
  void begin() {
    for (int64_t s = 0; s < w.rows.slots; ++s) {
      const int64_t place = d * B + w.rows.index[s];
      for (int64_t j = own_h.begin; j < own_h.end; j += W)
        *(V*)(buf.dh + s * buf.ldh + j) = a.dh_n ? Memory<S, A>::load(at<S>(a.dh_n, place * P) + j, P - j) : V{};
      for (int64_t g = 0; g < G; ++g)
        for (int64_t j = units.begin; j < units.end; j += W)
          for (auto& grads : buf.dgates) grads.template store<A>(s, g * H + j, V{}, H - j);
      for (int k = 0; k < K; ++k)
        for (int64_t j = units.begin; j < units.end; j += W)
          *(V*)(buf.dc + (s * K + k) * buf.ldp + j) = a.dc_n ? Memory<A, A>::load(at<A>(a.dc_n, (place * K + k) * H) + j, H - j) : V{};
    }
    if (w.first) {
      for (auto& grads : buf.dgates) grads.clear_rest(w.rows.slots, GH);
      if (projected) buf.dp.clear_rest(w.rows.slots, P);
      steps.clear(dgates, D * GH, GH);
      steps.clear(drecurrent, D * kOwn * H, kOwn * H);
      steps.clear(doutput, D * P, P);
    }
  }

  const void* recurrent_tile(int64_t tile) const {
    return at<char>(a.weights, (d * blocks_of(P, UB * W) + tile) * Product::tile_bytes(UB, GH));
  }

  const void* projection_tile(int64_t tile) const {
    return at<char>(a.projection, (d * blocks_of(H, UB * W) + tile) * Product::tile_bytes(UB, P));
  }

  void no_sums(const Item<A>& item) {
    __builtin_memset(const_cast<A*>(item.sums), 0, item.count * item.vectors * W * sizeof(A));
  }

  void walk(const Product& product, int64_t step) {
    const int64_t active = steps.active(t);
    const bool through = a.weights && step > 0;
    const int64_t* own = projected ? w.output_tiles : w.unit_tiles;
    if (w.barrier && through) old_dgates->prefetch(active);
    const auto prepare = [&](Item<A>& item) __attribute__((always_inline)) -> Weights<Product> {
      item.vectors = Columns<A>(item.tile, P).blocks;
      if (!projected) fetch(item);
      if (through) return {recurrent_tile(item.tile), GH, {}, recurrent_tile(tile_after(own, step, item.tile))};
      no_sums(item);
      return {};
    };
    const auto finish = [this](const Item<A>& item, int64_t from, int64_t to) __attribute__((always_inline)) {
      finish_rows(item, from, to);
    };
    multiply_step<Product, A>(product, *old_dgates, active, own, step, sums, prepare, finish);
    if (projected) {
      if (w.barrier) w.barrier->wait(w.weight);
      const auto columns = [&](Item<A>& item) __attribute__((always_inline)) -> Weights<Product> {
        item.vectors = Columns<A>(item.tile, H).blocks;
        fetch(item);
        return {projection_tile(item.tile), P, {}, projection_tile(tile_after(w.unit_tiles, step, item.tile))};
      };
      const auto through_projection = [this](const Item<A>& item, int64_t from, int64_t to) __attribute__((always_inline)) {
        for (int64_t r = from; r < to; ++r) {
          const int64_t slot = item.begin + r, row = steps.row(t, slot);
          for (int64_t b = 0; b < item.vectors; ++b)
            finish_units(slot, row, (item.tile * UB + b) * W, *(const V*)(item.sums + (r * item.vectors + b) * W), V{});
        }
      };
      multiply_step<Product, A>(product, buf.dp, active, w.unit_tiles, step, sums, columns, through_projection);
    }
    if constexpr (kNormalized<C>) finish_normalized(active);
    if (anew && K)
      for (int64_t s = 0; s < active; ++s)
        if (cuts.of(t, s)) cut_c(s);
    if (w.barrier) w.barrier->wait(w.weight);
  }

  // What reached the c that a slot started anew from; nothing goes on to the step before.
  void cut_c(int64_t s) const {
    for (int k = 0; k < K; ++k)
      for (int64_t u = units.begin; u < units.end; u += W) {
        V& dc = *(V*)(buf.dc + (s * K + k) * buf.ldp + u);
        add_to(at<A>(a.dreset_c, ((d * B + w.rows.index[s]) * K + k) * H + u), dc, H - u);
        dc = V{};
      }
  }
  static void add_to(A* sums, V v, int64_t n) {
    if (sums) Memory<A, A>::store(sums, Memory<A, A>::load(sums, n) + v, n);
  }

  // What goes on of the gradient of h, from unit u on, that the step walked before gave: nothing where that started anew.
  FASTSEQ_HOST_DEVICE V passed(int64_t slot, int64_t u, V dh) const {
    if (!came_anew || !cuts.of(came_from, slot)) return dh;
    add_to(at<A>(a.dreset_h, (d * B + w.rows.index[slot]) * P + u), dh, P - u);
    return V{};
  }

  void fetch(const Item<A>& item) const {
    for (int64_t r = 0; r < item.count; ++r) {
      const int64_t row = steps.row(t, item.begin + r);
      for (int64_t b = 0; b < item.vectors; ++b) {
        const int64_t u = (item.tile * UB + b) * W;
        for (int g = 0; g < kSaved; ++g) prefetch(gates + (row * D * kSaved + g) * H + u);
        for (int k = 0; k < K; ++k) prefetch(c_all + (row * D * K + k) * H + u);
        if (dy) prefetch(dy + row * D * P + u);
      }
    }
  }

  // the columns of a tile of h's gradient, of some sequences
  __attribute__((noinline)) void finish_rows(const Item<A>& item, int64_t from, int64_t to) {
    for (int64_t r = from; r < to; ++r) finish_row(item, r);
  }

  FASTSEQ_HOST_DEVICE void finish_row(const Item<A>& item, int64_t r) {
    const int64_t slot = item.begin + r, row = steps.row(t, slot);
    for (int64_t b = 0; b < item.vectors; ++b) {
      const int64_t u = (item.tile * UB + b) * W;
      V dh = passed(slot, u, *(const V*)(item.sums + (r * item.vectors + b) * W) + *(const V*)(buf.dh + slot * buf.ldh + u));
      if (dy) dh += Memory<S, A>::load(dy + row * D * P + u, P - u);
      V kept{};
      if constexpr (kZoned) {
        const V keep = keep_h.load(row * D * P + u, P - u);
        kept = keep * dh;
        dh = (A(1) - keep) * dh;
      }
      if (projected) {
        buf.dp.template store<A>(slot, u, dh, P - u);
        *(V*)(buf.dh + slot * buf.ldh + u) = kept;
        Memory<S, A>::store(doutput + row * D * P + u, dh, P - u);
      } else {
        finish_units(slot, row, u, dh, kept);
      }
    }
  }

  // one block of units of one slot, given the gradient of what the step computed (before the projection), and what zoneout kept
  FASTSEQ_HOST_DEVICE void finish_units(int64_t slot, int64_t row, int64_t u, V dh, V dh_kept) {
    if constexpr (kNormalized<C>) {
      *(V*)(buf.dm + slot * buf.ldp + u) = dh;
      if (projected) return;
      *(V*)(buf.dh + slot * buf.ldh + u) = dh_kept;
      Memory<S, A>::store(doutput + row * D * P + u, dh, P - u);
    } else {
      // whole vectors without a test at every access
      if (!kZoned && H - u >= W)
        finish_units_of<true>(slot, row, u, dh, dh_kept);
      else
        finish_units_of<false>(slot, row, u, dh, dh_kept);
    }
  }

  // Where the states before this step lie: the forward pass came from another step, if the slot was active in it, or started anew.
  struct Before {
    const BackwardKernel& of;
    const bool anew;
    bool inside;
    int64_t row, place;

    Before(const BackwardKernel& of, int64_t slot) : of(of), anew(of.anew && of.cuts.of(of.t, slot)) {
      const int64_t t = of.w.reverse ? of.t + 1 : of.t - 1;
      inside = !anew && t >= 0 && t < of.w.rows.steps && slot < of.steps.active(t);
      row = inside ? of.steps.row(t, slot) : 0, place = of.d * of.B + of.w.rows.index[slot];
    }
    // from unit u on; null: zeros
    const A* c(int64_t u) const {
      const int64_t width = K * of.H;
      return inside ? of.c_all + row * of.D * width + u : at<A>(anew ? of.a.reset_c : of.a.c0, place * width + u);
    }
    const S* h(int64_t u) const {
      return inside ? of.y + row * of.D * of.P + u : at<S>(anew ? of.a.reset_h : of.a.h0, place * of.P + u);
    }
  };

  // The c that a step proposed, before zoneout, of a cell that normalizes it.
  struct Proposed {
    const BackwardKernel& of;
    const int64_t row;
    const Before before;

    Proposed(const BackwardKernel& of, int64_t slot, int64_t row) : of(of), row(row), before(of, slot) {}
    V operator()(int, int64_t u) const {
      const int64_t n = of.H - u;
      if (!kZoned || !of.keep_c.any()) return Memory<A, A>::load(of.c_all + row * of.D * of.H + u, n);
      V saved[G];
      for (int g = 0; g < G; ++g) saved[g] = Memory<S, A>::load(of.gates + (row * of.D * kSaved + g) * of.H + u, n);
      const A* c = before.c(u);
      return C::candidate(saved, c ? Memory<A, A>::load(c, n) : V{});
    }
  };

  // recurrent_normalized.inl
  void finish_normalized(int64_t active);
  void through_output(int64_t slot) const;
  void through_gates(int64_t slot) const;
  void through_product_norm(int64_t slot);

  template <bool kWhole>
  FASTSEQ_HOST_DEVICE void finish_units_of(int64_t slot, int64_t row, int64_t u, V dh, V dh_kept) {
    const int64_t units = H, n = kWhole ? W : units - u, ldp = buf.ldp;
    const Before before(*this, slot);
    const S* saved_of = gates + row * D * kSaved * units + u;
    const A* c_of = c_all + row * D * K * units + u;
    const A* c_before = before.c(u);
    const A* dc_of = dc_all ? dc_all + row * D * K * units + u : nullptr;
    A* dc_sum = buf.dc + slot * K * ldp + u;
    S* dgates_to = dgates + row * D * GH + u;
    S* drecurrent_to = kOwn ? drecurrent + row * D * kOwn * units + u : nullptr;
    V saved[kSaved + 1], inner[C::kVectors + 1], h{}, c[K + 1], h_new{}, c_new[K + 1], dc[K + 1];
    V dx[G], dr[G], dh_direct{}, dc_prev[K + 1], dc_kept{};
#pragma GCC unroll 8
    for (int g = 0; g < kSaved; ++g) saved[g] = Memory<S, A>::load(saved_of + g * units, n);
#pragma GCC unroll 4
    for (int v = 0; v < C::kVectors; ++v) inner[v] = vectors ? Memory<S, A>::load(vectors + v * units + u, n) : V{};
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      c_new[k] = Memory<A, A>::load(c_of + k * units, n);
      c[k] = c_before ? Memory<A, A>::load(c_before + k * units, n) : V{};
      dc[k] = *(const V*)(dc_sum + k * ldp);
      if (dc_of) dc[k] += Memory<A, A>::load(dc_of + k * units, n);
    }
    if (!K && C::kSaved) {
      if (const S* h_before = before.h(u)) h = Memory<S, A>::load(h_before, n);
    } else if (!K) {
      h_new = kZoned ? saved[0] : Memory<S, A>::load(y + row * D * P + u, n);
    }
    if constexpr (kZoned && K == 1) {
      if (keep_c.any()) {
        const V keep = keep_c.load(row * D * units + u, n);
        dc_kept = keep * dc[0];
        dc[0] = (A(1) - keep) * dc[0];
        c_new[0] = C::candidate(saved, c[0]);
      }
    }
    C::backward(dh, dc, saved, inner, h, c, h_new, c_new, dx, dr, dh_direct, dc_prev);
    if constexpr (kZoned && K == 1) dc_prev[0] += dc_kept;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Memory<S, A>::store(dgates_to + g * units, dx[g], n);
      new_dgates->template store<S>(slot, g * units + u, dr[g], n);
      if constexpr (Product::kWatched) watch.see(dr[g], n);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kOwn; ++g) Memory<S, A>::store(drecurrent_to + g * units, dr[G - kOwn + g], n);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) *(V*)(dc_sum + k * ldp) = dc_prev[k];
    if (!projected) *(V*)(buf.dh + slot * buf.ldh + u) = kZoned ? dh_direct + dh_kept : dh_direct;
  }

  // what remains has reached the first state; a slot's last dgates lie in the buffer of its last step
  void finish(const Product& product) {
    const Matrix& last = buf.dgates[w.rows.steps & 1];
    if (w.reverse && w.rows.length) {
      if (w.first)
        for (int64_t s = 0; s < w.rows.slots; ++s)
          if ((steps.length(s) ^ w.rows.steps) & 1) last.copy(s, buf.dgates[steps.length(s) & 1], GH);
      if (w.barrier) w.barrier->wait(w.weight);
    }
    const int64_t* own = projected ? w.output_tiles : w.unit_tiles;
    const auto prepare = [&](Item<A>& item) __attribute__((always_inline)) -> Weights<Product> {
      item.vectors = Columns<A>(item.tile, P).blocks;
      if (a.weights) return {recurrent_tile(item.tile), GH, {}, recurrent_tile(tile_after(own, w.rows.steps, item.tile))};
      no_sums(item);
      return {};
    };
    const auto first_state = [this](const Item<A>& item, int64_t from, int64_t to) __attribute__((always_inline)) {
      for (int64_t r = from; r < to; ++r) {
        const int64_t slot = item.begin + r;
        for (int64_t b = 0; b < item.vectors; ++b) {
          const int64_t u = (item.tile * UB + b) * W;
          const V dh = *(const V*)(item.sums + (r * item.vectors + b) * W) + *(const V*)(buf.dh + slot * buf.ldh + u);
          Memory<S, A>::store(at<S>(a.dh0, (d * B + w.rows.index[slot]) * P) + u, passed(slot, u, dh), P - u);
        }
      }
    };
    multiply_step<Product, A>(product, last, w.rows.slots, own, w.rows.steps, sums, prepare, first_state);
    for (int64_t s = 0; s < w.rows.slots; ++s)
      for (int k = 0; k < K; ++k)
        __builtin_memcpy(at<A>(a.dc0, ((d * B + w.rows.index[s]) * K + k) * H) + units.begin,
                         buf.dc + (s * K + k) * buf.ldp + units.begin, (units.end - units.begin) * sizeof(A));
  }

  const Backward& a;
  const Work& w;
  const int64_t H, P, D, d, B, GH;
  const bool projected;
  const Steps steps;  // against the direction of the forward pass
  const Cuts cuts;
  const Buffers buf;
  const Range units, outputs, own_h;
  const Keep<A> keep_h, keep_c;
  const S* dy = at<S>(a.dy, d * P);
  const A* dc_all = at<A>(a.dc, d * K * H);
  const S* vectors = at<S>(a.vectors, d * C::kVectors * H);
  const S* y = at<S>(a.y, d * P);
  const A* c_all = at<A>(a.c, d * K * H);
  const S* gates = at<S>(a.gates, d * kSaved * H);
  S* dgates = at<S>(a.dgates, d * GH);
  S* drecurrent = kOwn ? at<S>(a.drecurrent, d * kOwn * H) : nullptr;
  S* doutput = projected || kNormalized<C> ? at<S>(a.doutput, d * P) : nullptr;
  Statistics<A>* of_slot = kNormalized<C> ? buf.statistics + w.unit_tiles[0] * w.rows.slots : nullptr;
  // of the step at hand, and of the one walked before
  int64_t t = 0, came_from = 0;
  bool anew = false, came_anew = false;  // whether any row starts anew before it
  const Matrix *old_dgates = nullptr, *new_dgates = nullptr;
  Watch watch;  // of a product that is watched
  bool within = true;
  alignas(64) A sums[(Product::kInterleaves ? 2 : 1) * Product::kMostRows * kTileVectors * W];
};

#include "recurrent_few.inl"
#include "recurrent_normalized.inl"

// Calls body.template operator()<Product, S, Cell>() for the types and the cell of a shape.
template <class Product, class S, class F>
auto with_cell(Cell cell, F&& body) {
  switch (cell) {
#define FASTSEQ_CELL(Name, name) \
  case Cell::k##Name: return body.template operator()<Product, S, Name>();
    FASTSEQ_CPU_CELLS(FASTSEQ_CELL)
#undef FASTSEQ_CELL
  }
  __builtin_unreachable();
}

// Calls body.template operator()<Product, S>() for the types of a shape.
template <class F>
auto with_types([[maybe_unused]] Type type, F&& body) {
#if defined(FASTSEQ_TILES)
  if (type == Type::kFloat) return body.template operator()<TileProduct<float>, float>();
  return body.template operator()<TileProduct<bfloat16>, bfloat16>();
#elif defined(FASTSEQ_PAIRS)
  return body.template operator()<MultiplyPairs, bfloat16>();
#else
  switch (type) {
    case Type::kFloat: return body.template operator()<MultiplyAdd<float>, float>();
    case Type::kDouble: return body.template operator()<MultiplyAdd<double>, double>();
    case Type::kHalf: return body.template operator()<MultiplyAdd<float>, float16>();
    default: return body.template operator()<MultiplyAdd<float>, bfloat16>();
  }
#endif
}

template <class F>
auto with_shape(const Shape& shape, F&& body) {
  return with_types(shape.type, [&]<class Product, class S>() { return with_cell<Product, S>(shape.cell, body); });
}

Tiling tiling(const Shape& shape) {
  return with_shape(shape, []<class Product, class S, template <class> class Cell>() {
    using C = Cell<Math<typename Product::A>>;
    return Tiling{C::kGates, C::kSaved, C::kStates, C::kVectors, C::kOwnRecurrent, Product::W, unit_blocks<C>(), kNormalized<C>};
  });
}

int64_t unit_tile_bytes(const Shape& shape, int64_t depth) {
  return with_shape(shape, [&]<class Product, class S, template <class> class Cell>() {
    using C = Cell<Math<typename Product::A>>;
    return Product::tile_bytes(C::kGates * unit_blocks<C>(), depth);
  });
}

int64_t column_tile_bytes(const Shape& shape, int64_t depth) {
  return with_types(shape.type, [&]<class Product, class S>() { return Product::tile_bytes(kTileVectors, depth); });
}

void pack_units(const Shape& shape, const void* weight, int64_t depth, int64_t tile, void* packed) {
  with_shape(shape, [&]<class Product, class S, template <class> class Cell>() {
    using C = Cell<Math<typename Product::A>>;
    constexpr int64_t W = Product::W, UB = unit_blocks<C>(), G = C::kGates;
    const int64_t H = shape.hidden, u0 = tile * UB * W, blocks = min(UB, blocks_of(H - u0, W));
    Product::template pack_transposed<S>(G * blocks, depth, packed, [&](int64_t vector, int64_t lane) {
      const int64_t u = u0 + vector % blocks * W + lane;
      return u < H ? static_cast<const S*>(weight) + (vector / blocks * H + u) * depth : nullptr;
    });
  });
}

void pack_columns(const Shape& shape, const void* weight, int64_t columns, int64_t depth, int64_t tile, void* packed) {
  with_types(shape.type, [&]<class Product, class S>() {
    const Columns<typename Product::A> part(tile, columns);
    Product::template pack_transposed<S>(part.blocks, depth, packed, [&](int64_t vector, int64_t lane) {
      const int64_t j = part.begin + vector * Product::W + lane;
      return j < columns ? static_cast<const S*>(weight) + j * depth : nullptr;
    });
  });
}

void pack_rows(const Shape& shape, const void* weight, int64_t depth, int64_t columns, int64_t tile, void* packed) {
  with_types(shape.type, [&]<class Product, class S>() {
    const Columns<typename Product::A> part(tile, columns);
    Product::template pack<S>(part.blocks, depth, columns - part.begin, columns, static_cast<const S*>(weight) + part.begin, packed);
  });
}

void project(const Shape& shape, const Projection& p, int64_t begin, int64_t end) {
  with_types(shape.type, [&]<class Product, class S>() {
    using A = typename Product::A;
    using V = typename Math<A>::V;
    constexpr int64_t W = Product::W, kRows = 64;
    alignas(64) A sums[kRows][W];
    const S *x = static_cast<const S*>(p.x), *bias = static_cast<const S*>(p.bias);
    for (int64_t j = begin; j < end; j += W) {
      const V added = bias ? Memory<S, A>::load(bias + j, end - j) : V{};
      const V scale = p.scales ? Memory<A, A>::load(static_cast<const A*>(p.scales) + j, end - j) : V{} + 1;
      for (int64_t first = 0; first < p.rows; first += kRows) {
        const int64_t count = min(kRows, p.rows - first);
        with_stored<S>(p.stored, [&]<class T>() {
          InPlace<A>::template multiply<S, T>(
              x + first * p.input, p.input, count, p.input,
              [&](int64_t lane) { return static_cast<const T*>(p.weights) + min(j + lane, end - 1) * p.input; },
              [&](int64_t r, int64_t lane, int64_t n, const A* values) __attribute__((always_inline)) {
                __builtin_memcpy(sums[r] + lane, values, n * sizeof(A));
              });
        });
        for (int64_t r = 0; r < count; ++r) {
          const V gates = *(const V*)sums[r] * scale + added;
          const int64_t to = (first + r) * p.stride + j;
          if (p.wide)
            Memory<A, A>::store(static_cast<A*>(p.gates) + to, gates, end - j);
          else
            Memory<S, A>::store(static_cast<S*>(p.gates) + to, gates, end - j);
        }
      }
    }
  });
}

int64_t forward_workspace(const Shape& shape, int64_t slots) {
  return with_shape(shape, [&]<class Product, class S, template <class> class Cell>() {
    return ForwardKernel<Product, S, Cell, false>::workspace(shape, slots);
  });
}

int64_t backward_workspace(const Shape& shape, int64_t slots) {
  return with_shape(shape, [&]<class Product, class S, template <class> class Cell>() {
    return BackwardKernel<Product, S, Cell, false>::workspace(shape, slots);
  });
}

// Calls body.template operator()<Kernel>() for the forward kernel of a call.
template <class F>
auto with_forward(const Forward& arguments, const Work& work, F&& body) {
  return with_shape(arguments.shape, [&]<class Product, class S, template <class> class Cell>() {
    if constexpr (!Product::kWatched)
      if (arguments.shape.zoned) return body.template operator()<ForwardKernel<Product, S, Cell, true>>();
    if constexpr (has_few<Product, Cell<Math<typename Product::A>>>())
      if (work.rows.slots <= Product::kFewRows) return body.template operator()<ForwardKernel<Product, S, Cell, false, true>>();
    return body.template operator()<ForwardKernel<Product, S, Cell, false>>();
  });
}

int64_t forward_scratch(const Forward& arguments, const Work& work) {
  return with_forward(arguments, work, [&]<class Kernel>() { return Kernel::scratch(arguments, work); });
}

bool forward(const Forward& arguments, const Work& work) {
  return with_forward(arguments, work, [&]<class Kernel>() { return Kernel(arguments, work).run(); });
}

bool backward(const Backward& arguments, const Work& work) {
  return with_shape(arguments.shape, [&]<class Product, class S, template <class> class Cell>() {
    if constexpr (!Product::kWatched)
      if (arguments.shape.zoned) return BackwardKernel<Product, S, Cell, true>(arguments, work).run();
    return BackwardKernel<Product, S, Cell, false>(arguments, work).run();
  });
}

uint32_t largest(const float* values, int64_t n) {
  Watch watch;
  watch.see(values, n);
  return watch.bits();
}

}  // namespace

constexpr Kernels kKernels{FASTSEQ_LEVEL_NAME, tiling,     unit_tile_bytes,   column_tile_bytes,  pack_units,      pack_columns,
                           pack_rows,          project,    forward_workspace, backward_workspace, forward_scratch, forward, backward,
                           largest};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
