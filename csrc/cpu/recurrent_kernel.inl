// The recurrence over time for one instruction set: forward and backward, any cell. Included by recurrent_<level>.cpp, which defines
// FASTSEQ_LEVEL, FASTSEQ_VECTOR_BYTES and FASTSEQ_VECTOR_REGISTERS; contracts stand in recurrent_kernel.h.
//
// Each step multiplies the state of up to kMaxRows sequences with a tile of packed weights in registers, and finishes that tile's units
// (gates, state, outputs) while the sums are still in the first-level cache. A team meets once a step, when the new state is complete.

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../recurrent/cells/gru.h"
#include "../recurrent/cells/lstm.h"
#include "../recurrent/cells/rnn.h"
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

// Where a participant's columns of a state begin and end, given its tiles.
struct Range {
  int64_t begin, end;
  Range(const int64_t tiles[2], int64_t tile, int64_t columns)
      : begin(min(tiles[0] * tile, columns)), end(min(tiles[1] * tile, columns)) {}
};

template <class S, class A, class C>
struct ForwardKernel {
  using M = Math<A>;
  using V = typename M::V;
  static constexpr int64_t W = M::kWidth;
  static constexpr int G = C::kGates;
  static constexpr int64_t UB = unit_blocks<C, A>();

  struct Buffers {  // of a team, [slots, ..] each
    int64_t ldh, ldc;
    A* h[2];  // state before and after the step
    A* c;
    A* m;  // what the projection sees

    Buffers(const Shape& shape, int64_t slots, void* workspace)
        : ldh(padded<A>(shape.output)), ldc(padded<A>(shape.hidden)) {
      A* p = static_cast<A*>(workspace);
      h[0] = p, p += slots * ldh;
      h[1] = p, p += slots * ldh;
      c = p, p += C::kHasC ? slots * ldc : 0;
      m = p, p += shape.projected ? slots * ldc : 0;
      size = p - static_cast<A*>(workspace);
    }
    int64_t size;
  };

  static void run(const Forward& a, const Work& w) {
    const int64_t H = a.shape.hidden, P = a.shape.output, D = a.shape.lanes, d = w.lane, B = a.batch;
    const int64_t GH = G * H;
    const Steps steps{w.rows, w.reverse};
    const Buffers buf(a.shape, w.rows.slots, w.workspace);
    const Range units(w.unit_tiles, UB * W, H), outputs(w.output_tiles, kTileVectors * W, P);

    const int64_t I = a.input;
    const S* x_gates = at<S>(a.x_gates, d * GH);
    const A* x_all = static_cast<const A*>(a.x);
    const A* input_weights = at<A>(a.input_weights, d * blocks_of(H, UB * W) * UB * G * W * I);
    const S* input_bias = at<S>(a.input_bias, d * GH);
    const A* h_gates = at<A>(a.h_gates, d * B * GH);
    const S* bias = at<S>(a.bias, d * H);
    const A* weights = at<A>(a.weights, d * blocks_of(H, UB * W) * UB * G * W * P);
    const A* projection = at<A>(a.projection, d * blocks_of(P, W) * W * H);
    S* y = at<S>(a.y, d * P);
    A* c_all = at<A>(a.c, d * H);
    S* gates = at<S>(a.gates, d * C::kSaved * H);

    // own columns of the first state; both h buffers hold it until a slot's first step has passed
    const Range own_h = a.shape.projected ? outputs : units;
    for (int64_t s = 0; s < w.rows.slots; ++s) {
      const int64_t place = d * B + w.rows.index[s];
      for (int64_t j = own_h.begin; j < own_h.end; ++j)
        buf.h[0][s * buf.ldh + j] = buf.h[1][s * buf.ldh + j] = a.h0 ? Memory<S, A>::value(at<S>(a.h0, place * P)[j]) : A(0);
      if (C::kHasC)
        for (int64_t j = units.begin; j < units.end; ++j) buf.c[s * buf.ldc + j] = a.c0 ? at<A>(a.c0, place * H)[j] : A(0);
    }
    if (w.first) {
      steps.clear(y, D * P, P);
      steps.clear(c_all, D * H, H);
      steps.clear(gates, D * C::kSaved * H, C::kSaved * H);
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
        const int64_t u0 = tile * UB * W, blocks = min(UB, blocks_of(H - u0, W)), vectors = G * blocks;
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
          if (x_all) multiply_of<A>(count, vectors)(x_rows, input_weights + tile * UB * G * W * I, I, x_sums);
          if (packed) {
            multiply_of<A>(count, vectors)(rows, packed, P, sums);
          } else {  // the single step of this call: R h was computed outside
            for (int64_t r = 0; r < count; ++r)
              for (int g = 0; g < G; ++g)
                for (int64_t b = 0; b < blocks; ++b) {
                  const A* given = h_gates + w.rows.index[begin + r] * GH + g * H + u0 + b * W;
                  *(V*)(sums + (r * vectors + g * blocks + b) * W) = Memory<A, A>::load(given, H - u0 - b * W);
                }
          }
          for (int64_t r = 0; r < count; ++r) {
            const int64_t slot = begin + r, row = steps.row(t, slot);
            for (int64_t b = 0; b < blocks; ++b) {
              const int64_t u = u0 + b * W, n = H - u;
              V x[G], rh[G], saved[C::kSaved + 1], h, c{}, h_next, c_next{};
#pragma GCC unroll 4
              for (int g = 0; g < G; ++g) {
                if (x_all)
                  x[g] = *(const V*)(x_sums + (r * vectors + g * blocks + b) * W) +
                         (input_bias ? Memory<S, A>::load(input_bias + g * H + u, n) : V{});
                else
                  x[g] = Memory<S, A>::load(x_gates + row * D * GH + g * H + u, n);
                rh[g] = *(const V*)(sums + (r * vectors + g * blocks + b) * W);
              }
              if (C::kHasC) c = *(const V*)(buf.c + slot * buf.ldc + u);
              // the cells that read h (GRU) have no projection, so that P = H
              h = a.shape.projected ? V{} : *(const V*)(h_old + slot * buf.ldh + u);
              const V inside = C::kHasRecurrentBias && bias ? Memory<S, A>::load(bias + u, n) : V{};
              C::forward(x, rh, inside, h, c, saved, h_next, c_next);
              if (C::kHasC) {
                *(V*)(buf.c + slot * buf.ldc + u) = c_next;
                if (c_all) Memory<A, A>::store(c_all + row * D * H + u, c_next, n);
              }
              if (gates)
#pragma GCC unroll 4
                for (int g = 0; g < C::kSaved; ++g)
                  Memory<S, A>::store(gates + row * D * C::kSaved * H + g * H + u, saved[g], n);
              if (a.shape.projected) {
                *(V*)(buf.m + slot * buf.ldc + u) = h_next;
              } else {
                *(V*)(h_new + slot * buf.ldh + u) = Memory<S, A>::rounded(h_next);
                Memory<S, A>::store(y + row * D * P + u, h_next, n);
              }
            }
          }
        });
      });
      if (a.shape.projected) {
        if (w.barrier) w.barrier->wait(w.weight);
        for (int64_t tile = w.output_tiles[0]; tile < w.output_tiles[1]; ++tile) {
          const Columns<A> columns(tile, P);
          for_row_blocks(active, rows_of_block(kTileVectors), [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
            for (int64_t r = 0; r < count; ++r) rows[r] = buf.m + (begin + r) * buf.ldc;
            multiply_of<A>(count, columns.blocks)(rows, projection + columns.begin * H, H, sums);
            for (int64_t r = 0; r < count; ++r)
              for (int64_t b = 0; b < columns.blocks; ++b) {
                const int64_t j = columns.begin + b * W;
                const V h = *(const V*)(sums + (r * columns.blocks + b) * W);
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
      if (C::kHasC)
        __builtin_memcpy(at<A>(a.c_n, place * H) + units.begin, buf.c + s * buf.ldc + units.begin,
                         (units.end - units.begin) * sizeof(A));
    }
  }
};

template <class S, class A, class C>
struct BackwardKernel {
  using M = Math<A>;
  using V = typename M::V;
  static constexpr int64_t W = M::kWidth;
  static constexpr int G = C::kGates;
  static constexpr int64_t UB = kTileVectors;  // unit blocks of a tile

  struct Buffers {  // of a team, [slots, ..] each
    int64_t ldg, ldh, ldp;
    A* dgates[2];  // gradient of R h, of the step before (in the walk) and of this one
    A* dh;         // what reached h other than through R h; before a slot's first step, its dh_n
    A* dc;
    A* dp;  // gradient of the projected output

    Buffers(const Shape& shape, int64_t slots, void* workspace)
        : ldg(padded<A>(G * shape.hidden)), ldh(padded<A>(shape.output)), ldp(padded<A>(shape.hidden)) {
      A* p = static_cast<A*>(workspace);
      dgates[0] = p, p += slots * ldg;
      dgates[1] = p, p += slots * ldg;
      dh = p, p += slots * ldh;
      dc = p, p += C::kHasC ? slots * ldp : 0;
      dp = p, p += shape.projected ? slots * ldh : 0;
      size = p - static_cast<A*>(workspace);
    }
    int64_t size;
  };

  static void run(const Backward& a, const Work& w) {
    const int64_t H = a.shape.hidden, P = a.shape.output, D = a.shape.lanes, d = w.lane, B = a.batch;
    const int64_t GH = G * H;
    const bool projected = a.shape.projected;
    const Steps steps{w.rows, !w.reverse};  // against the direction of the forward pass
    const Buffers buf(a.shape, w.rows.slots, w.workspace);
    const Range units(w.unit_tiles, UB * W, H), outputs(w.output_tiles, UB * W, P);
    const Range own_h = projected ? outputs : units;

    const S* dy = at<S>(a.dy, d * P);
    const A* dc_all = at<A>(a.dc, d * H);
    const S* y = at<S>(a.y, d * P);
    const A* c_all = at<A>(a.c, d * H);
    const S* gates = at<S>(a.gates, d * C::kSaved * H);
    const A* weights = at<A>(a.weights, d * blocks_of(P, W) * W * GH);
    const A* projection = at<A>(a.projection, d * blocks_of(H, W) * W * P);
    S* dgates = at<S>(a.dgates, d * GH);
    S* drecurrent = C::kHasRecurrentBias ? at<S>(a.drecurrent, d * H) : nullptr;
    S* dprojected = projected ? at<S>(a.dprojected, d * P) : nullptr;

    for (int64_t s = 0; s < w.rows.slots; ++s) {
      const int64_t place = d * B + w.rows.index[s];
      for (int64_t j = own_h.begin; j < own_h.end; ++j)
        buf.dh[s * buf.ldh + j] = a.dh_n ? Memory<S, A>::value(at<S>(a.dh_n, place * P)[j]) : A(0);
      for (int64_t g = 0; g < G; ++g)
        for (int64_t j = units.begin; j < units.end; ++j)
          buf.dgates[0][s * buf.ldg + g * H + j] = buf.dgates[1][s * buf.ldg + g * H + j] = A(0);
      if (C::kHasC)
        for (int64_t j = units.begin; j < units.end; ++j) buf.dc[s * buf.ldp + j] = a.dc_n ? at<A>(a.dc_n, place * H)[j] : A(0);
    }
    if (w.first) {
      steps.clear(dgates, D * GH, GH);
      steps.clear(drecurrent, D * H, H);
      steps.clear(dprojected, D * P, P);
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
    // one block of units of one slot, given the whole gradient of its h (before the projection)
    const auto finish = [&](int64_t t, int64_t slot, int64_t row, int64_t u, V dh, A* dgates_new) __attribute__((always_inline)) {
      const int64_t n = H - u;
      // the forward pass came from this step, if the slot was active in it
      const int64_t before = w.reverse ? t + 1 : t - 1;
      const bool inside = before >= 0 && before < w.rows.steps && slot < steps.active(before);
      const int64_t before_row = inside ? steps.row(before, slot) : 0, place = d * B + w.rows.index[slot];
      V saved[C::kSaved + 1], h{}, c{}, h_new{}, c_new{}, dc{}, dx[G], dr[G], dh_direct{}, dc_prev{};
#pragma GCC unroll 4
      for (int g = 0; g < C::kSaved; ++g) saved[g] = Memory<S, A>::load(gates + row * D * C::kSaved * H + g * H + u, n);
      if (C::kHasC) {
        c_new = Memory<A, A>::load(c_all + row * D * H + u, n);
        if (inside)
          c = Memory<A, A>::load(c_all + before_row * D * H + u, n);
        else if (a.c0)
          c = Memory<A, A>::load(at<A>(a.c0, place * H) + u, n);
        dc = *(const V*)(buf.dc + slot * buf.ldp + u);
        if (dc_all) dc += Memory<A, A>::load(dc_all + row * D * H + u, n);
      } else if (C::kSaved) {
        if (inside)
          h = Memory<S, A>::load(y + before_row * D * P + u, n);
        else if (a.h0)
          h = Memory<S, A>::load(at<S>(a.h0, place * P) + u, n);
      } else {
        h_new = Memory<S, A>::load(y + row * D * P + u, n);
      }
      C::backward(dh, dc, saved, h, c, h_new, c_new, dx, dr, dh_direct, dc_prev);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        Memory<S, A>::store(dgates + row * D * GH + g * H + u, dx[g], n);
        Memory<A, A>::store(dgates_new + slot * buf.ldg + g * H + u, Memory<S, A>::rounded(dr[g]), n);
      }
      if (C::kHasRecurrentBias) Memory<S, A>::store(drecurrent + row * D * H + u, dr[G - 1], n);
      if (C::kHasC) *(V*)(buf.dc + slot * buf.ldp + u) = dc_prev;
      if (!projected) *(V*)(buf.dh + slot * buf.ldh + u) = dh_direct;
    };
    const auto fetch = [&](int64_t t, int64_t slot, int64_t u0, int64_t blocks) __attribute__((always_inline)) {
      const int64_t row = steps.row(t, slot);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t u = u0 + b * W;
        for (int g = 0; g < C::kSaved; ++g) prefetch(gates + row * D * C::kSaved * H + g * H + u);
        if (C::kHasC) prefetch(c_all + row * D * H + u);
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
              if (projected) {
                *(V*)(buf.dp + slot * buf.ldh + u) = dh;
                *(V*)(buf.dh + slot * buf.ldh + u) = V{};
                Memory<S, A>::store(dprojected + row * D * P + u, dh, P - u);
              } else {
                finish(t, slot, row, u, dh, dgates_new);
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
                       *(const V*)(sums + (r * columns.blocks + b) * W), dgates_new);
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
    if (C::kHasC)
      for (int64_t s = 0; s < w.rows.slots; ++s)
        __builtin_memcpy(at<A>(a.dc0, (d * B + w.rows.index[s]) * H) + units.begin, buf.dc + s * buf.ldp + units.begin,
                         (units.end - units.begin) * sizeof(A));
  }
};

// Calls body.template operator()<S, A, C>() for the types and the cell of a shape.
template <class S, class A, class F>
auto with_cell(Cell cell, F&& body) {
  switch (cell) {
    case Cell::kRnnTanh: return body.template operator()<S, A, RnnTanh<Math<A>>>();
    case Cell::kRnnRelu: return body.template operator()<S, A, RnnRelu<Math<A>>>();
    case Cell::kLstm: return body.template operator()<S, A, Lstm<Math<A>>>();
    default: return body.template operator()<S, A, Gru<Math<A>>>();
  }
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
    return Tiling{C::kGates, C::kSaved, C::kHasC, Math<A>::kWidth, unit_blocks<C, A>()};
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
    return typename ForwardKernel<S, A, C>::Buffers(shape, slots, nullptr).size;
  });
}

int64_t backward_workspace(const Shape& shape, int64_t slots) {
  return with_types(shape.cell, shape.type, [&]<class S, class A, class C>() {
    return typename BackwardKernel<S, A, C>::Buffers(shape, slots, nullptr).size;
  });
}

void forward(const Forward& arguments, const Work& work) {
  with_types(arguments.shape.cell, arguments.shape.type,
             [&]<class S, class A, class C>() { ForwardKernel<S, A, C>::run(arguments, work); });
}

void backward(const Backward& arguments, const Work& work) {
  with_types(arguments.shape.cell, arguments.shape.type,
             [&]<class S, class A, class C>() { BackwardKernel<S, A, C>::run(arguments, work); });
}

}  // namespace

constexpr Kernels kKernels{FASTSEQ_LEVEL_NAME, tiling,   pack_forward, pack_columns, pack_rows, forward_workspace,
                           backward_workspace, forward, backward};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
