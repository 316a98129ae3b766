// The recurrence over time for one instruction set: forward and backward, any cell. Included by recurrent_<level>.cpp, which defines
// FASTSEQ_LEVEL, FASTSEQ_VECTOR_BYTES and FASTSEQ_VECTOR_REGISTERS; contracts stand in recurrent_kernel.h.
//
// Each step multiplies the state of up to kMaxRows sequences with a tile of packed weights in registers, and finishes that tile's units
// (gates, state, outputs) while the sums are still in the first-level cache. A team meets once a step, when the new state is complete.

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../recurrent/cells/coupled_lstm.h"
#include "../recurrent/cells/gru.h"
#include "../recurrent/cells/lstm.h"
#include "../recurrent/cells/peephole_lstm.h"
#include "../recurrent/cells/rnn.h"
#include "../recurrent/cells/slstm.h"
#include "recurrent_kernel.h"

namespace fastseq::cpu::FASTSEQ_LEVEL {
namespace {

#include "vector.inl"

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// State rows are this far apart: a power of two would put the rows of a block into the same cache set.
template <class A>
int64_t padded(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(A);
  return blocks_of(columns, line) * line + line;
}

// Rows of a block for a tile of that many vectors. The sums fill the registers, but for what a product needs beside them: with 32
// registers a tile row and a broadcast value, with 16 one of either.
constexpr int64_t rows_of_block(int64_t vectors) {
  return FASTSEQ_VECTOR_REGISTERS == 32 ? min(kMaxRows, (32 - 2 - vectors) / vectors) : 12 / vectors;
}
static_assert(rows_of_block(4) == (FASTSEQ_VECTOR_REGISTERS == 32 ? 6 : 3));

// Products are summed in runs of this many, and the runs then added up: a sum of n terms loses about sqrt(n) roundings.
constexpr int64_t kRun = 128;

// sums[r][v] = rows[r] (depth values) times a tile (depth x NV vectors)
template <class A, int RB, int NV>
void multiply(const A* const* rows, const A* tile, int64_t depth, A* sums) {
  using V = typename Lanes<A>::V;
  constexpr int W = sizeof(V) / sizeof(A);
  // few sums would wait for one another: then two interleaved sets, over even and odd depths
  constexpr int SETS = RB * NV < 8 ? 2 : 1;
  const A* row[RB];
#pragma GCC unroll 8
  for (int r = 0; r < RB; ++r) row[r] = rows[r];
  for (int64_t begin = 0; begin < depth; begin += kRun) {
    const int64_t end = min(begin + kRun, depth);
    V sum[SETS][RB][NV];
#pragma GCC unroll 2
    for (int s = 0; s < SETS; ++s)
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[s][r][v] = V{};
    int64_t k = begin;
    for (; k + SETS <= end; k += SETS) {
#pragma GCC unroll 2
      for (int s = 0; s < SETS; ++s) {
        V weight[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) weight[v] = *(const V*)(tile + ((k + s) * NV + v) * W);
#pragma GCC unroll 8
        for (int r = 0; r < RB; ++r) {
          const V value = V{} + row[r][k + s];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) sum[s][r][v] += value * weight[v];
        }
      }
    }
    for (; k < end; ++k)
#pragma GCC unroll 8
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[0][r][v] += (V{} + row[r][k]) * *(const V*)(tile + (k * NV + v) * W);
#pragma GCC unroll 8
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        V* to = (V*)(sums + (r * NV + v) * W);
        if (SETS == 2) sum[0][r][v] += sum[SETS - 1][r][v];
        *to = begin ? *to + sum[0][r][v] : sum[0][r][v];
      }
  }
}

template <class A>
using Multiply = void (*)(const A* const*, const A*, int64_t, A*);

template <class A, int NV>
Multiply<A> multiply_rows(int64_t rows) {
  switch (rows) {
    case 1: return multiply<A, 1, NV>;
    case 2: return multiply<A, 2, NV>;
    case 3: return multiply<A, 3, NV>;
    case 4: return multiply<A, 4, NV>;
    case 5: return multiply<A, 5, NV>;
    case 6: return multiply<A, 6, NV>;
    case 7: return multiply<A, 7, NV>;
    default: return multiply<A, 8, NV>;
  }
}

template <class A>
Multiply<A> multiply_of(int64_t rows, int64_t vectors) {
  switch (vectors) {
    case 1: return multiply_rows<A, 1>(rows);
    case 2: return multiply_rows<A, 2>(rows);
    case 3: return multiply_rows<A, 3>(rows);
    default: return multiply_rows<A, 4>(rows);
  }
}

// A tile of plain columns: which it covers, and how many vectors (the last tile may have fewer).
template <class A>
struct Columns {
  static constexpr int64_t kWidth = Math<A>::kWidth;
  int64_t begin, blocks;
  Columns(int64_t tile, int64_t columns)
      : begin(tile * kTileVectors * kWidth), blocks(min(kTileVectors, blocks_of(columns - begin, kWidth))) {}
};

FASTSEQ_HOST_DEVICE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

template <class T>
T* at(void* base, int64_t offset) {
  return base ? static_cast<T*>(base) + offset : nullptr;
}
template <class T>
const T* at(const void* base, int64_t offset) {
  return base ? static_cast<const T*>(base) + offset : nullptr;
}

// Walks the tiles of a step, every other step backwards: what the last step left in the caches is used before it is displaced. (A
// repeated walk in one direction finds nothing of a set of weights larger than the cache; to and fro finds the cache's size of it.)
template <class F>
FASTSEQ_HOST_DEVICE void for_tiles(const int64_t tiles[2], int64_t step, F&& body) {
  const int64_t count = tiles[1] - tiles[0];
  for (int64_t i = 0; i < count; ++i) body(step & 1 ? tiles[1] - 1 - i : tiles[0] + i);
}

// Walks the row blocks of a step: begin and count of each, sizes as even as possible.
template <class F>
FASTSEQ_HOST_DEVICE void for_row_blocks(int64_t rows, int64_t most, F&& body) {
  const int64_t count = blocks_of(rows, most);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t begin = rows * b / count;
    body(begin, rows * (b + 1) / count - begin);
  }
}

// After a meeting, half of a state or more lies in other cores' caches: fetch it all at once rather than line by line when multiplied.
template <class A>
FASTSEQ_HOST_DEVICE void gather(const A* state, int64_t stride, int64_t columns, int64_t slots) {
  for (int64_t s = 0; s < slots; ++s)
    for (int64_t j = 0; j < columns; j += 64 / sizeof(A)) prefetch(state + s * stride + j);
}

struct Steps {
  const Rows& rows;
  bool reverse;  // from the last step to the first

  int64_t time(int64_t step) const { return reverse ? rows.steps - 1 - step : step; }
  int64_t active(int64_t t) const { return rows.active ? rows.active[t] : rows.slots; }
  int64_t row(int64_t t, int64_t slot) const { return (rows.start ? rows.start[t] : t * rows.stride) + rows.index[slot]; }
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

template <class C, class A>
constexpr int64_t unit_blocks() {
  return C::kGates == 1 ? kTileVectors : 1;
}

// What the gates tensor holds of a unit: with zoneout at least the step's output before it.
template <class C, bool kZoned>
constexpr int saved_of() {
  return kZoned && C::kSaved == 0 ? 1 : C::kSaved;
}

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

template <class S, class A, class C, bool kZoned>
struct ForwardKernel {
  using M = Math<A>;
  using V = typename M::V;
  static constexpr int64_t W = M::kWidth;
  static constexpr int G = C::kGates, K = C::kStates;
  static constexpr int kSaved = saved_of<C, kZoned>();
  static constexpr int64_t UB = unit_blocks<C, A>();

  struct Buffers {  // of a team, [slots, ..] each
    int64_t ldh, ldc;
    A* h[2];  // state before and after the step
    A* c;     // K states, each like a row
    A* m;  // what the projection sees

    Buffers(const Shape& shape, int64_t slots, void* workspace)
        : ldh(padded<A>(shape.output)), ldc(padded<A>(shape.hidden)) {
      A* p = static_cast<A*>(workspace);
      h[0] = p, p += slots * ldh;
      h[1] = p, p += slots * ldh;
      c = p, p += slots * K * ldc;
      m = p, p += shape.projected ? slots * ldc : 0;
      size = p - static_cast<A*>(workspace);
    }
    int64_t size;
  };

  static void run(const Forward& a, const Work& w) {
    const int64_t H = a.shape.hidden, P = a.shape.output, D = a.shape.lanes, d = w.lane, B = a.batch;
    const int64_t GH = G * H;
    const bool projected = K == 1 && a.shape.projected;
    const Steps steps{w.rows, w.reverse};
    const Buffers buf(a.shape, w.rows.slots, w.workspace);
    const Range units(w.unit_tiles, UB * W, H), outputs(w.output_tiles, kTileVectors * W, P);

    const int64_t I = a.input;
    const S* x_gates = at<S>(a.x_gates, d * GH);
    const A* x_all = static_cast<const A*>(a.x);
    const A* input_weights = at<A>(a.input_weights, d * blocks_of(H, UB * W) * UB * G * W * I);
    const S* input_bias = at<S>(a.input_bias, d * GH);
    const A* h_gates = at<A>(a.h_gates, d * B * GH);
    const S* vectors = at<S>(a.vectors, d * C::kVectors * H);
    const A* weights = at<A>(a.weights, d * blocks_of(H, UB * W) * UB * G * W * P);
    const A* projection = at<A>(a.projection, d * blocks_of(P, W) * W * H);
    S* y = at<S>(a.y, d * P);
    A* c_all = at<A>(a.c, d * K * H);
    S* gates = at<S>(a.gates, d * kSaved * H);
    const Keep<A> keep_h(at<bool>(a.zoneout.hold_h, d * P), a.zoneout.h), keep_c(at<bool>(a.zoneout.hold_c, d * H), a.zoneout.c);

    // own columns of the first state; both h buffers hold it until a slot's first step has passed
    const Range own_h = projected ? outputs : units;
    for (int64_t s = 0; s < w.rows.slots; ++s) {
      const int64_t place = d * B + w.rows.index[s];
      for (int64_t j = own_h.begin; j < own_h.end; ++j)
        buf.h[0][s * buf.ldh + j] = buf.h[1][s * buf.ldh + j] = a.h0 ? Memory<S, A>::value(at<S>(a.h0, place * P)[j]) : A(0);
      for (int k = 0; k < K; ++k)
        for (int64_t j = units.begin; j < units.end; ++j)
          buf.c[(s * K + k) * buf.ldc + j] = a.c0 ? at<A>(a.c0, (place * K + k) * H)[j] : A(0);
    }
    if (w.first) {
      steps.clear(y, D * P, P);
      steps.clear(c_all, D * K * H, K * H);
      steps.clear(gates, D * kSaved * H, kSaved * H);
    }
    if (w.barrier) w.barrier->wait(w.weight);

    constexpr int64_t NV = G * UB;
    alignas(64) A sums[kMaxRows * kTileVectors * W], x_sums[kMaxRows * kTileVectors * W];
    const A *rows[kMaxRows], *x_rows[kMaxRows];
    for (int64_t step = 0; step < w.rows.steps; ++step) {
      const int64_t t = steps.time(step), active = steps.active(t);
      const A* h_old = buf.h[step & 1];
      A* h_new = buf.h[1 - (step & 1)];
      if (w.barrier) gather(h_old, buf.ldh, P, active);
      for_tiles(w.unit_tiles, step, [&](int64_t tile) __attribute__((always_inline)) {
        const int64_t u0 = tile * UB * W, blocks = min(UB, blocks_of(H - u0, W)), registers = G * blocks;
        const A* packed = weights ? weights + tile * UB * G * W * P : nullptr;
        for_row_blocks(active, rows_of_block(NV), [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
          for (int64_t r = 0; r < count; ++r) {
            rows[r] = h_old + (begin + r) * buf.ldh;
            const int64_t row = steps.row(t, begin + r);
            if (x_all)
              x_rows[r] = x_all + row * I;
            else
              for (int g = 0; g < G; ++g) prefetch(x_gates + row * D * GH + g * H + u0);
          }
          if (x_all) multiply_of<A>(count, registers)(x_rows, input_weights + tile * UB * G * W * I, I, x_sums);
          if (packed) {
            multiply_of<A>(count, registers)(rows, packed, P, sums);
          } else {  // the single step of this call: R h was computed outside
            for (int64_t r = 0; r < count; ++r)
              for (int g = 0; g < G; ++g)
                for (int64_t b = 0; b < blocks; ++b) {
                  const A* given = h_gates + w.rows.index[begin + r] * GH + g * H + u0 + b * W;
                  *(V*)(sums + (r * registers + g * blocks + b) * W) = Memory<A, A>::load(given, H - u0 - b * W);
                }
          }
          for (int64_t r = 0; r < count; ++r) {
            const int64_t slot = begin + r, row = steps.row(t, slot);
            for (int64_t b = 0; b < blocks; ++b) {
              const int64_t u = u0 + b * W, n = H - u;
              V x[G], rh[G], inner[C::kVectors + 1], saved[kSaved + 1], h, c[K + 1], h_next, c_next[K + 1];
#pragma GCC unroll 4
              for (int g = 0; g < G; ++g) {
                if (x_all)
                  x[g] = *(const V*)(x_sums + (r * registers + g * blocks + b) * W) +
                         (input_bias ? Memory<S, A>::load(input_bias + g * H + u, n) : V{});
                else
                  x[g] = Memory<S, A>::load(x_gates + row * D * GH + g * H + u, n);
                rh[g] = *(const V*)(sums + (r * registers + g * blocks + b) * W);
              }
#pragma GCC unroll 4
              for (int k = 0; k < K; ++k) c[k] = *(const V*)(buf.c + (slot * K + k) * buf.ldc + u);
#pragma GCC unroll 4
              for (int v = 0; v < C::kVectors; ++v) inner[v] = vectors ? Memory<S, A>::load(vectors + v * H + u, n) : V{};
              // the cells that read h (GRU) have no projection, so that P = H
              h = projected ? V{} : *(const V*)(h_old + slot * buf.ldh + u);
              C::forward(x, rh, inner, h, c, saved, h_next, c_next);
              if constexpr (kZoned) {
                if (!C::kSaved) saved[0] = h_next;
                if (!projected)
                  h_next = keep_h.held(keep_h.load(row * D * P + u, n), h, Memory<S, A>::rounded(h_next));
                if (K == 1) c_next[0] = keep_c.held(keep_c.load(row * D * H + u, n), c[0], c_next[0]);
              }
#pragma GCC unroll 4
              for (int k = 0; k < K; ++k) {
                *(V*)(buf.c + (slot * K + k) * buf.ldc + u) = c_next[k];
                if (c_all) Memory<A, A>::store(c_all + (row * D * K + k) * H + u, c_next[k], n);
              }
              if (gates)
#pragma GCC unroll 8
                for (int g = 0; g < kSaved; ++g) Memory<S, A>::store(gates + (row * D * kSaved + g) * H + u, saved[g], n);
              if (projected) {
                *(V*)(buf.m + slot * buf.ldc + u) = h_next;
              } else {
                *(V*)(h_new + slot * buf.ldh + u) = Memory<S, A>::rounded(h_next);
                Memory<S, A>::store(y + row * D * P + u, h_next, n);
              }
            }
          }
        });
      });
      if (projected) {
        if (w.barrier) w.barrier->wait(w.weight);
        for (int64_t tile = w.output_tiles[0]; tile < w.output_tiles[1]; ++tile) {
          const Columns<A> columns(tile, P);
          for_row_blocks(active, rows_of_block(kTileVectors), [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
            for (int64_t r = 0; r < count; ++r) rows[r] = buf.m + (begin + r) * buf.ldc;
            multiply_of<A>(count, columns.blocks)(rows, projection + columns.begin * H, H, sums);
            for (int64_t r = 0; r < count; ++r)
              for (int64_t b = 0; b < columns.blocks; ++b) {
                const int64_t j = columns.begin + b * W;
                V h = *(const V*)(sums + (r * columns.blocks + b) * W);
                if constexpr (kZoned) {
                  const V before = *(const V*)(h_old + (begin + r) * buf.ldh + j);
                  const V keep = keep_h.load(steps.row(t, begin + r) * D * P + j, P - j);
                  h = keep_h.held(keep, before, Memory<S, A>::rounded(h));
                }
                *(V*)(h_new + (begin + r) * buf.ldh + j) = Memory<S, A>::rounded(h);
                Memory<S, A>::store(y + steps.row(t, begin + r) * D * P + j, h, P - j);
              }
          });
        }
      }
      if (w.barrier) w.barrier->wait(w.weight);
    }

    for (int64_t s = 0; s < w.rows.slots; ++s) {
      const int64_t place = d * B + w.rows.index[s], length = steps.length(s);
      const int64_t last = w.reverse ? 0 : length - 1;
      const S* h = length ? y + steps.row(last, s) * D * P : at<S>(a.h0, place * P);
      S* h_n = at<S>(a.h_n, place * P) + own_h.begin;
      if (h)
        __builtin_memcpy(h_n, h + own_h.begin, (own_h.end - own_h.begin) * sizeof(S));
      else
        __builtin_memset(h_n, 0, (own_h.end - own_h.begin) * sizeof(S));
      for (int k = 0; k < K; ++k)
        __builtin_memcpy(at<A>(a.c_n, (place * K + k) * H) + units.begin, buf.c + (s * K + k) * buf.ldc + units.begin,
                         (units.end - units.begin) * sizeof(A));
    }
  }
};

template <class S, class A, class C, bool kZoned>
struct BackwardKernel {
  using M = Math<A>;
  using V = typename M::V;
  static constexpr int64_t W = M::kWidth;
  static constexpr int G = C::kGates, K = C::kStates, kOwn = C::kOwnRecurrent;
  static constexpr int kSaved = saved_of<C, kZoned>();
  static constexpr int64_t UB = kTileVectors;  // unit blocks of a tile

  struct Buffers {  // of a team, [slots, ..] each
    int64_t ldg, ldh, ldp;
    A* dgates[2];  // gradient of R h, of the step before (in the walk) and of this one
    A* dh;         // what reached h other than through R h; before a slot's first step, its dh_n
    A* dc;         // K states, each like a row
    A* dp;  // gradient of the projected output

    Buffers(const Shape& shape, int64_t slots, void* workspace)
        : ldg(padded<A>(G * shape.hidden)), ldh(padded<A>(shape.output)), ldp(padded<A>(shape.hidden)) {
      A* p = static_cast<A*>(workspace);
      dgates[0] = p, p += slots * ldg;
      dgates[1] = p, p += slots * ldg;
      dh = p, p += slots * ldh;
      dc = p, p += slots * K * ldp;
      dp = p, p += shape.projected ? slots * ldh : 0;
      size = p - static_cast<A*>(workspace);
    }
    int64_t size;
  };

  static void run(const Backward& a, const Work& w) {
    const int64_t H = a.shape.hidden, P = a.shape.output, D = a.shape.lanes, d = w.lane, B = a.batch;
    const int64_t GH = G * H;
    const bool projected = K == 1 && a.shape.projected;
    const Steps steps{w.rows, !w.reverse};  // against the direction of the forward pass
    const Buffers buf(a.shape, w.rows.slots, w.workspace);
    const Range units(w.unit_tiles, UB * W, H), outputs(w.output_tiles, UB * W, P);
    const Range own_h = projected ? outputs : units;

    const S* dy = at<S>(a.dy, d * P);
    const A* dc_all = at<A>(a.dc, d * K * H);
    const S* vectors = at<S>(a.vectors, d * C::kVectors * H);
    const S* y = at<S>(a.y, d * P);
    const A* c_all = at<A>(a.c, d * K * H);
    const S* gates = at<S>(a.gates, d * kSaved * H);
    const A* weights = at<A>(a.weights, d * blocks_of(P, W) * W * GH);
    const A* projection = at<A>(a.projection, d * blocks_of(H, W) * W * P);
    S* dgates = at<S>(a.dgates, d * GH);
    S* drecurrent = kOwn ? at<S>(a.drecurrent, d * kOwn * H) : nullptr;
    S* doutput = projected ? at<S>(a.doutput, d * P) : nullptr;
    const Keep<A> keep_h(at<bool>(a.zoneout.hold_h, d * P), a.zoneout.h), keep_c(at<bool>(a.zoneout.hold_c, d * H), a.zoneout.c);

    for (int64_t s = 0; s < w.rows.slots; ++s) {
      const int64_t place = d * B + w.rows.index[s];
      for (int64_t j = own_h.begin; j < own_h.end; ++j)
        buf.dh[s * buf.ldh + j] = a.dh_n ? Memory<S, A>::value(at<S>(a.dh_n, place * P)[j]) : A(0);
      for (int64_t g = 0; g < G; ++g)
        for (int64_t j = units.begin; j < units.end; ++j)
          buf.dgates[0][s * buf.ldg + g * H + j] = buf.dgates[1][s * buf.ldg + g * H + j] = A(0);
      for (int k = 0; k < K; ++k)
        for (int64_t j = units.begin; j < units.end; ++j)
          buf.dc[(s * K + k) * buf.ldp + j] = a.dc_n ? at<A>(a.dc_n, (place * K + k) * H)[j] : A(0);
    }
    if (w.first) {
      steps.clear(dgates, D * GH, GH);
      steps.clear(drecurrent, D * kOwn * H, kOwn * H);
      steps.clear(doutput, D * P, P);
    }
    if (w.barrier) w.barrier->wait(w.weight);

    alignas(64) A sums[kMaxRows * kTileVectors * W];
    const A* rows[kMaxRows];

    // sums = what reached h through R h of the following step: [count, columns.blocks vectors]; rows are set
    const auto through_weights = [&](const Columns<A>& columns, int64_t count, bool any) __attribute__((always_inline)) {
      if (weights && any) {
        multiply_of<A>(count, columns.blocks)(rows, weights + columns.begin * GH, GH, sums);
      } else {
        for (int64_t i = 0; i < count * columns.blocks * W; ++i) sums[i] = A(0);
      }
    };
    // one block of units of one slot, given the gradient of what the step computed (before the projection), and what zoneout kept
    const auto finish = [&](int64_t t, int64_t slot, int64_t row, int64_t u, V dh, V dh_kept, A* dgates_new)
                            __attribute__((always_inline)) {
      const int64_t n = H - u;
      // the forward pass came from this step, if the slot was active in it
      const int64_t before = w.reverse ? t + 1 : t - 1;
      const bool inside = before >= 0 && before < w.rows.steps && slot < steps.active(before);
      const int64_t before_row = inside ? steps.row(before, slot) : 0, place = d * B + w.rows.index[slot];
      V saved[kSaved + 1], inner[C::kVectors + 1], h{}, c[K + 1], h_new{}, c_new[K + 1], dc[K + 1];
      V dx[G], dr[G], dh_direct{}, dc_prev[K + 1], dc_kept{};
#pragma GCC unroll 8
      for (int g = 0; g < kSaved; ++g) saved[g] = Memory<S, A>::load(gates + (row * D * kSaved + g) * H + u, n);
#pragma GCC unroll 4
      for (int v = 0; v < C::kVectors; ++v) inner[v] = vectors ? Memory<S, A>::load(vectors + v * H + u, n) : V{};
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        c_new[k] = Memory<A, A>::load(c_all + (row * D * K + k) * H + u, n);
        c[k] = V{};
        if (inside)
          c[k] = Memory<A, A>::load(c_all + (before_row * D * K + k) * H + u, n);
        else if (a.c0)
          c[k] = Memory<A, A>::load(at<A>(a.c0, (place * K + k) * H) + u, n);
        dc[k] = *(const V*)(buf.dc + (slot * K + k) * buf.ldp + u);
        if (dc_all) dc[k] += Memory<A, A>::load(dc_all + (row * D * K + k) * H + u, n);
      }
      if (!K && C::kSaved) {
        if (inside)
          h = Memory<S, A>::load(y + before_row * D * P + u, n);
        else if (a.h0)
          h = Memory<S, A>::load(at<S>(a.h0, place * P) + u, n);
      } else if (!K) {
        h_new = kZoned ? saved[0] : Memory<S, A>::load(y + row * D * P + u, n);
      }
      if constexpr (kZoned && K == 1) {
        if (keep_c.any()) {
          const V keep = keep_c.load(row * D * H + u, n);
          dc_kept = keep * dc[0];
          dc[0] = (A(1) - keep) * dc[0];
          c_new[0] = C::candidate(saved, c[0]);
        }
      }
      C::backward(dh, dc, saved, inner, h, c, h_new, c_new, dx, dr, dh_direct, dc_prev);
      if constexpr (kZoned && K == 1) dc_prev[0] += dc_kept;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        Memory<S, A>::store(dgates + row * D * GH + g * H + u, dx[g], n);
        Memory<A, A>::store(dgates_new + slot * buf.ldg + g * H + u, Memory<S, A>::rounded(dr[g]), n);
      }
#pragma GCC unroll 4
      for (int g = 0; g < kOwn; ++g) Memory<S, A>::store(drecurrent + (row * D * kOwn + g) * H + u, dr[G - kOwn + g], n);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) *(V*)(buf.dc + (slot * K + k) * buf.ldp + u) = dc_prev[k];
      if (!projected) *(V*)(buf.dh + slot * buf.ldh + u) = kZoned ? dh_direct + dh_kept : dh_direct;
    };
    const auto fetch = [&](int64_t t, int64_t slot, int64_t u0, int64_t blocks) __attribute__((always_inline)) {
      const int64_t row = steps.row(t, slot);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t u = u0 + b * W;
        for (int g = 0; g < kSaved; ++g) prefetch(gates + (row * D * kSaved + g) * H + u);
        for (int k = 0; k < K; ++k) prefetch(c_all + (row * D * K + k) * H + u);
        if (dy) prefetch(dy + row * D * P + u);
      }
    };

    for (int64_t step = 0; step < w.rows.steps; ++step) {
      const int64_t t = steps.time(step), active = steps.active(t);
      const A* dgates_old = buf.dgates[step & 1];
      A* dgates_new = buf.dgates[1 - (step & 1)];
      if (w.barrier && weights) gather(dgates_old, buf.ldg, GH, active);
      const int64_t* tiles = projected ? w.output_tiles : w.unit_tiles;
      for_tiles(tiles, step, [&](int64_t tile) __attribute__((always_inline)) {
        const Columns<A> columns(tile, P);
        for_row_blocks(active, rows_of_block(kTileVectors), [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
          for (int64_t r = 0; r < count; ++r) {
            rows[r] = dgates_old + (begin + r) * buf.ldg;
            if (!projected) fetch(t, begin + r, columns.begin, columns.blocks);
          }
          through_weights(columns, count, step > 0);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t slot = begin + r, row = steps.row(t, slot);
            for (int64_t b = 0; b < columns.blocks; ++b) {
              const int64_t u = columns.begin + b * W;
              V dh = *(const V*)(sums + (r * columns.blocks + b) * W) + *(const V*)(buf.dh + slot * buf.ldh + u);
              if (dy) dh += Memory<S, A>::load(dy + row * D * P + u, P - u);
              V kept{};
              if constexpr (kZoned) {
                const V keep = keep_h.load(row * D * P + u, P - u);
                kept = keep * dh;
                dh = (A(1) - keep) * dh;
              }
              if (projected) {
                *(V*)(buf.dp + slot * buf.ldh + u) = dh;
                *(V*)(buf.dh + slot * buf.ldh + u) = kept;
                Memory<S, A>::store(doutput + row * D * P + u, dh, P - u);
              } else {
                finish(t, slot, row, u, dh, kept, dgates_new);
              }
            }
          }
        });
      });
      if (projected) {
        if (w.barrier) w.barrier->wait(w.weight);
        for (int64_t tile = w.unit_tiles[0]; tile < w.unit_tiles[1]; ++tile) {
          const Columns<A> columns(tile, H);
          for_row_blocks(active, rows_of_block(kTileVectors), [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
            for (int64_t r = 0; r < count; ++r) {
              rows[r] = buf.dp + (begin + r) * buf.ldh;
              fetch(t, begin + r, columns.begin, columns.blocks);
            }
            multiply_of<A>(count, columns.blocks)(rows, projection + columns.begin * P, P, sums);
            for (int64_t r = 0; r < count; ++r)
              for (int64_t b = 0; b < columns.blocks; ++b)
                finish(t, begin + r, steps.row(t, begin + r), columns.begin + b * W,
                       *(const V*)(sums + (r * columns.blocks + b) * W), V{}, dgates_new);
          });
        }
      }
      if (w.barrier) w.barrier->wait(w.weight);
    }

    // what remains has reached the first state; a slot's last dgates lie in the buffer of its last step
    const int64_t* tiles = projected ? w.output_tiles : w.unit_tiles;
    for (int64_t tile = tiles[0]; tile < tiles[1]; ++tile) {
      const Columns<A> columns(tile, P);
      for_row_blocks(w.rows.slots, rows_of_block(kTileVectors), [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t walked = w.reverse ? steps.length(begin + r) : w.rows.steps;
          rows[r] = buf.dgates[walked & 1] + (begin + r) * buf.ldg;
        }
        through_weights(columns, count, true);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t b = 0; b < columns.blocks; ++b) {
            const int64_t u = columns.begin + b * W, slot = begin + r;
            const V dh = *(const V*)(sums + (r * columns.blocks + b) * W) + *(const V*)(buf.dh + slot * buf.ldh + u);
            Memory<S, A>::store(at<S>(a.dh0, (d * B + w.rows.index[slot]) * P) + u, dh, P - u);
          }
      });
    }
    for (int64_t s = 0; s < w.rows.slots; ++s)
      for (int k = 0; k < K; ++k)
        __builtin_memcpy(at<A>(a.dc0, ((d * B + w.rows.index[s]) * K + k) * H) + units.begin,
                         buf.dc + (s * K + k) * buf.ldp + units.begin, (units.end - units.begin) * sizeof(A));
  }
};

// Calls body.template operator()<S, A, C>() for the types and the cell of a shape.
template <class S, class A, class F>
auto with_cell(Cell cell, F&& body) {
  switch (cell) {
    case Cell::kRnnTanh: return body.template operator()<S, A, RnnTanh<Math<A>>>();
    case Cell::kRnnRelu: return body.template operator()<S, A, RnnRelu<Math<A>>>();
    case Cell::kLstm: return body.template operator()<S, A, Lstm<Math<A>>>();
    case Cell::kGru: return body.template operator()<S, A, Gru<Math<A>>>();
    case Cell::kCoupledLstm: return body.template operator()<S, A, CoupledLstm<Math<A>>>();
    case Cell::kPeepholeLstm: return body.template operator()<S, A, PeepholeLstm<Math<A>>>();
    case Cell::kSlstm: break;
  }
  return body.template operator()<S, A, Slstm<Math<A>>>();
}

template <class F>
auto with_types(Cell cell, Type type, F&& body) {
  switch (type) {
    case Type::kFloat: return with_cell<float, float>(cell, body);
    case Type::kDouble: return with_cell<double, double>(cell, body);
    default: return with_cell<bfloat16, float>(cell, body);
  }
}

// Transposes a W x W square in registers: exchanges its off-diagonal quarters of S x S, then those of each quarter, and so on.
template <int S, int W, class V>
FASTSEQ_HOST_DEVICE void transpose(V* square) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      const V a = square[i], b = square[i + S];
      [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
        square[i] = __builtin_shufflevector(a, b, (J & S ? W + J - S : J)...);
        square[i + S] = __builtin_shufflevector(a, b, (J & S ? W + J : J + S)...);
      }(std::make_integer_sequence<int, W>());
    }
    transpose<S / 2, W>(square);
  }
}

Tiling tiling(Cell cell, Type type) {
  return with_types(cell, type, []<class S, class A, class C>() {
    return Tiling{C::kGates, C::kSaved, C::kStates, C::kVectors, C::kOwnRecurrent, Math<A>::kWidth, unit_blocks<C, A>()};
  });
}

void pack_forward(Cell cell, Type type, const void* weight, int64_t H, int64_t P, int64_t tile, void* packed) {
  with_types(cell, type, [&]<class S, class A, class C>() {
    constexpr int64_t W = Math<A>::kWidth, UB = unit_blocks<C, A>(), G = C::kGates;
    const int64_t u0 = tile * UB * W, blocks = min(UB, blocks_of(H - u0, W)), vectors = G * blocks;
    const S* from = static_cast<const S*>(weight);
    A* to = static_cast<A*>(packed) + tile * UB * G * W * P;
    for (int64_t k0 = 0; k0 < P; k0 += W) {  // W x W squares: whole cache lines on either side
      const int64_t depth = min(W, P - k0);
      for (int64_t g = 0; g < G; ++g)
        for (int64_t b = 0; b < blocks; ++b) {
          typename Math<A>::V square[W];
          for (int64_t j = 0; j < W; ++j) {
            const int64_t u = u0 + b * W + j;
            square[j] = u < H ? Memory<S, A>::load(from + (g * H + u) * P + k0, depth) : typename Math<A>::V{};
          }
          transpose<W / 2, W>(square);
          for (int64_t k = 0; k < depth; ++k) *(typename Math<A>::V*)(to + ((k0 + k) * vectors + g * blocks + b) * W) = square[k];
        }
    }
  });
}

template <class F>
void with_storage(Type type, F&& body) {
  switch (type) {
    case Type::kFloat: return body.template operator()<float, float>();
    case Type::kDouble: return body.template operator()<double, double>();
    default: return body.template operator()<bfloat16, float>();
  }
}

void pack_columns(Type type, const void* weight, int64_t columns, int64_t depth, int64_t tile, void* packed) {
  with_storage(type, [&]<class S, class A>() {
    constexpr int64_t W = Math<A>::kWidth;
    const Columns<A> part(tile, columns);
    const S* from = static_cast<const S*>(weight);
    A* to = static_cast<A*>(packed) + part.begin * depth;
    for (int64_t j = 0; j < part.blocks * W; ++j)
      for (int64_t k = 0; k < depth; ++k)
        to[k * part.blocks * W + j] = part.begin + j < columns ? Memory<S, A>::value(from[(part.begin + j) * depth + k]) : A(0);
  });
}

void pack_rows(Type type, const void* weight, int64_t depth, int64_t columns, int64_t tile, void* packed) {
  with_storage(type, [&]<class S, class A>() {
    constexpr int64_t W = Math<A>::kWidth;
    const Columns<A> part(tile, columns);
    const S* from = static_cast<const S*>(weight) + part.begin;
    A* to = static_cast<A*>(packed) + part.begin * depth;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t b = 0; b < part.blocks; ++b)
        *(typename Lanes<A>::V*)(to + (k * part.blocks + b) * W) =
            Memory<S, A>::load(from + k * columns + b * W, columns - part.begin - b * W);
  });
}

int64_t forward_workspace(const Shape& shape, int64_t slots) {
  return with_types(shape.cell, shape.type, [&]<class S, class A, class C>() {
    return typename ForwardKernel<S, A, C, false>::Buffers(shape, slots, nullptr).size;
  });
}

int64_t backward_workspace(const Shape& shape, int64_t slots) {
  return with_types(shape.cell, shape.type, [&]<class S, class A, class C>() {
    return typename BackwardKernel<S, A, C, false>::Buffers(shape, slots, nullptr).size;
  });
}

void forward(const Forward& arguments, const Work& work) {
  with_types(arguments.shape.cell, arguments.shape.type, [&]<class S, class A, class C>() {
    if (arguments.shape.zoned)
      ForwardKernel<S, A, C, true>::run(arguments, work);
    else
      ForwardKernel<S, A, C, false>::run(arguments, work);
  });
}

void backward(const Backward& arguments, const Work& work) {
  with_types(arguments.shape.cell, arguments.shape.type, [&]<class S, class A, class C>() {
    if (arguments.shape.zoned)
      BackwardKernel<S, A, C, true>::run(arguments, work);
    else
      BackwardKernel<S, A, C, false>::run(arguments, work);
  });
}

}  // namespace

constexpr Kernels kKernels{FASTSEQ_LEVEL_NAME, tiling,   pack_forward, pack_columns, pack_rows, forward_workspace,
                           backward_workspace, forward, backward};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
