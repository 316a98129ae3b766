// What the host part (recurrent.cpp) hands to the kernels of an instruction set (recurrent_kernel.inl).
//
// Letters: T time, B batch, D lanes, H hidden, G gates, P output of a lane, K states beside h, V vectors of a cell, N rows of a
// packed batch.
// "rows x n" is [T, B, D, n] or packed [N, D, n]; S is the storage type (float, double, bfloat16, float16), A the arithmetic type (float, double).
// Packed weights lie as the kernels want them, tile after tile; only the kernels know how.
// Nothing is allocated here and no pointer is kept after the call. No two pointers alias.
#pragma once

#include <atomic>
#include <cstdint>
#include <iterator>

#include "type.h"

namespace fastseq::cpu {

// The cells, one row each: X(struct in ../recurrent/cells/, name of the cell in Python).
#define FASTSEQ_CPU_CELLS(X)             \
  X(RnnTanh, "rnn_tanh")                 \
  X(RnnRelu, "rnn_relu")                 \
  X(Lstm, "lstm")                        \
  X(Gru, "gru")                          \
  X(CoupledLstm, "coupled_lstm")         \
  X(PeepholeLstm, "peephole_lstm")       \
  X(LayerNormLstm, "layer_norm_lstm")    \
  X(LayerNormGru, "layer_norm_gru")      \
  X(Slstm, "slstm")

#define FASTSEQ_CELL(Name, name) k##Name,
enum class Cell { FASTSEQ_CPU_CELLS(FASTSEQ_CELL) };
#undef FASTSEQ_CELL
#define FASTSEQ_CELL(Name, name) name,
constexpr const char* kCellNames[] = {FASTSEQ_CPU_CELLS(FASTSEQ_CELL)};
#undef FASTSEQ_CELL

// Of weights kept for inference beside parameters of type float: rounded, or whole numbers with a scale for each of their rows.
enum class Stored { kAsGiven, kBfloat16, kInt8 };

// Cell facts and the tiles that follow from them: a tile holds whole units, all gates of a unit beside one another.
struct Tiling {
  int64_t gates;          // G
  int64_t saved;          // activations of the gates tensor
  int64_t states;         // K
  int64_t vectors;        // V
  int64_t own_recurrent;  // gates of drecurrent
  int64_t width;          // elements of a vector register
  int64_t unit_blocks;    // vectors of units in a tile of the gates (more than one gate: 1, since the gates fill the tile)
  bool normalized;        // with layer norm: the backward pass gives doutput
};

constexpr int64_t kTileVectors = 4;  // of a tile over plain columns (backward, projection)

// The part of the batch that a team works on, and where its rows lie. Slots are sequences, longest first.
struct Rows {
  int64_t steps;          // T
  int64_t stride;         // rows from one step to the next (padded: B), unless start is given
  const int64_t* start;   // [T] first row of a step (packed), or null
  const int64_t* index;   // [slots] place of a slot within a step, and in h0, c0, h_n, c_n
  const int32_t* active;  // [T] how many of the slots are active, or null: all
  const int64_t* length;  // [slots] steps of a slot, or null: T
  int64_t slots;
  const bool* resets;     // rows: where a segment begins, or null
  const bool* begins;     // [T] whether one does in any row of a step, or null
};

// A team meets here once to four times a step; a participant may stand for several (weight).
class Barrier {
 public:
  explicit Barrier(int64_t total = 1) : total_(total) {}
  void reset(int64_t total) { total_ = total; }
  void wait(int64_t weight);

 private:
  int64_t total_;
  std::atomic<int64_t> arrived_{0};
  std::atomic<int64_t> generation_{0};
};

struct Shape {
  Cell cell;
  Type type;
  int64_t lanes;      // D
  int64_t hidden;     // H
  int64_t output;     // P
  bool projected;     // of cells with one state beside h
  bool zoned;         // with zoneout: a cell that saves nothing saves its output before it
};

// What zoneout keeps of the old h and c: masks or, where they are null, proportions.
struct Zoneout {
  const bool* hold_h;  // rows x P
  const bool* hold_c;  // rows x H
  double h, c;
};

struct Forward {
  Shape shape;
  const void* x_gates;     // rows x G*H, S: the projected input; or null:
  bool wide_x_gates;       // they are A instead, as sums are: not rounded
  const void* x;           // [T, B, I] or [N, I], S
  int64_t input;           // I
  const void* input_weights;  // [D, unit tiles], packed by pack_units over depth I
  const void* input_bias;     // [D, G*H] S or null
  const void* const* in_place;  // [D] weights [G*H, P] laid out as PyTorch does, which a short call reads as they are; or null
  Stored stored;           // their type
  const void* const* scales;  // [D] [G*H] A of kInt8, or null
  int64_t batch;           // B
  const void* vectors;     // [D, V*H] S or null
  const void* h0;          // [D, B, P] S or null
  const void* c0;          // [D, B, K*H] A or null
  const void* reset_h;     // as h0: the states of a row whose segment begins, or null
  const void* reset_c;     // as c0
  const void* weights;     // [D, unit tiles], packed by pack_units over depth P; null with in_place
  const void* projection;  // [D, column tiles over P], packed by pack_columns over depth H, or null
  Zoneout zoneout;
  void* y;                 // rows x P, S
  void* h_n;               // [D, B, P] S
  void* c_n;               // [D, B, K*H] A
  void* c;                 // rows x K*H, A, or null
  void* gates;             // rows x saved*H, S, or null
  float least_x, least_h;  // as `least` below, of x and of h
  bool two_parts;          // of float, multiplied in parts: two instead of three
};

// The input of a lane in a short call: gates[r * stride + j] = bias[j] + scales[j] x[r] . weights[j].
struct Projection {
  const void* x;        // [rows, input] S
  const void* weights;  // [G*H, input], laid out as PyTorch does
  Stored stored;        // their type
  const void* scales;   // [G*H] A of kInt8, or null
  const void* bias;     // [G*H] S or null
  int64_t rows, input;
  void* gates;          // S, or A
  bool wide;            // which
  int64_t stride;
};

struct Backward {
  Shape shape;
  const void* dy;            // rows x P, S or null
  const void* dh_n;          // [D, B, P] S or null
  const void* dc_n;          // [D, B, K*H] A or null
  const void* dc;            // rows x K*H, A or null
  const void* vectors;       // [D, V*H] S or null
  const void* h0;            // [D, B, P] S or null
  const void* c0;            // [D, B, K*H] A or null
  const void* reset_h;       // as in Forward
  const void* reset_c;
  int64_t batch;             // B
  Zoneout zoneout;
  const void* y;             // rows x P, S
  const void* c;             // rows x K*H, A
  const void* gates;         // rows x saved*H, S
  const void* weights;       // [D, column tiles over P], packed by pack_rows over depth G*H; null: a single step, R takes no part
  const void* projection;    // [D, column tiles over H], packed by pack_rows over depth P, or null
  void* dgates;              // rows x G*H, S
  void* drecurrent;          // rows x own_recurrent*H, S
  void* doutput;             // rows x P, S, with projection or layer norm only
  void* dh0;                 // [D, B, P] S
  void* dc0;                 // [D, B, K*H] A
  void* dreset_h;            // [D, B, P] A, added to; or null
  void* dreset_c;            // [D, B, K*H] A, added to; or null
  // Of operands multiplied in parts (Kernels::forward): the largest of a step must not be smaller, unless all are zero.
  float least;
  bool two_parts;            // as in Forward
};

// Nor larger than this.
constexpr float kMostOfParts = 1e30f;

// One participant of one team: a lane, a part of the batch, a range of tiles.
struct Work {
  int64_t lane;
  bool reverse;
  Rows rows;
  int64_t unit_tiles[2];    // begin, end: tiles over the H units
  int64_t output_tiles[2];  // tiles over the P outputs
  bool first;               // of its team: clears what has ended
  int64_t weight;           // participants that it stands for
  Barrier* barrier;         // null: alone
  void* workspace;          // shared by the team, of forward_workspace or backward_workspace bytes
  void* scratch;            // the participant's own, of forward_scratch bytes
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  Tiling (*tiling)(const Shape&);
  // bytes of a packed tile of the gates of whole units, of one of kTileVectors vectors of plain columns
  int64_t (*unit_tile_bytes)(const Shape&, int64_t depth);
  int64_t (*column_tile_bytes)(const Shape&, int64_t depth);
  // [G*H, depth] S -> a tile of the gates of whole units
  void (*pack_units)(const Shape&, const void* weight, int64_t depth, int64_t tile, void* packed);
  // [columns, depth] S -> a tile of columns, transposed
  void (*pack_columns)(const Shape&, const void* weight, int64_t columns, int64_t depth, int64_t tile, void* packed);
  // [depth, columns] S -> the same
  void (*pack_rows)(const Shape&, const void* weight, int64_t depth, int64_t columns, int64_t tile, void* packed);
  // columns begin .. end of a projection
  void (*project)(const Shape&, const Projection&, int64_t begin, int64_t end);
  int64_t (*forward_workspace)(const Shape&, int64_t slots);
  int64_t (*backward_workspace)(const Shape&, int64_t slots);
  int64_t (*forward_scratch)(const Forward&, const Work&);
  // False: a number of type float was met that is beyond what the kernels multiply in parts (AMX). Then the results are not to be used.
  bool (*forward)(const Forward&, const Work&);
  bool (*backward)(const Backward&, const Work&);
  // bits of the largest absolute value of n floats; those of a NaN are larger than any other's
  uint32_t (*largest)(const float* values, int64_t n);
};

const Kernels& kernels_default();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();  // bfloat16 alone
const Kernels& kernels_amx();  // bfloat16, and float in parts; without zoneout
#endif

}  // namespace fastseq::cpu
