// What the CUDA kernels are given: every pointer, who allocates it, what aliases it. No torch, no CUDA.
//
// Letters: T time, B batch, D lanes (directions or heads), H hidden, G gates, S saved activations, K states beside h, V vectors.
// Rows: T x B of a padded tensor, or the rows of a packed one; a row holds all lanes. All tensors are contiguous and on one device.
#pragma once

#include <cstdint>

#include "../common/portable.h"

namespace fastseq::recurrent {

// How a layer's rows are walked.
struct Walk {
  const int64_t* starts;   // [T] the first row of every step of a packed tensor; null: step t begins at row t B
  const int64_t* lengths;  // [B] steps of every sequence; null: T each
  int32_t steps, batch, lanes, hidden;
  uint64_t reverse;  // bit d: lane d goes backwards
};

// How the work is cut. A team of CTAs takes one lane and some sequences of the batch, and holds the lane's recurrent weights once; a
// CTA of it owns some hidden units, with all their gates. The sequences are the columns of its product, in batch tiles one after
// another. The product's depth (K), from all units or its own, is filled up with zeros. csrc/recurrent/plan.cpp chooses.
struct Split {
  int32_t units;           // of a CTA: a multiple of 8
  int32_t ctas;            // of a team: together at least H units
  int32_t parts;           // teams of a lane, which share its batch
  int32_t rows;            // of the batch that a team takes, at most
  int32_t batch_tiles;     // blocks of columns (sequences) of a team, one after another in every step
  int32_t column_bits;     // 2^column_bits columns of a batch tile are exchanged, whatever the width of a tile
  int32_t m_bits;          // 2^m_bits warps are side by side over the rows of a CTA's product, in tiles of 16 that they take by turns
  int32_t k_warps;         // and so many over its depth
  int32_t k_tiles;         // tiles of depth that a warp takes of every segment; with several tiles of rows there is one segment
  int32_t k_segments;      // pieces of the depth that are brought to shared memory one after another
  int32_t cluster;         // 1: the team is a cluster and exchanges through shared memory; 0: through global memory
  int32_t reduce_scatter;  // 1: CTAs send each other partial sums of the gradients of their states; 0: operands of the product
  int32_t first_team;      // of this launch

  constexpr FASTSEQ_HOST_DEVICE int m_warps() const { return 1 << m_bits; }

  bool operator==(const Split&) const = default;
};

// Room for what a team's CTAs send each other, allocated by the caller for one call.
struct ExchangeBuffers {
  void* operands;   // [teams, 2, batch_tiles, ...] states (forward), gate gradients or partial sums (backward); unused by clusters
  uint32_t* flags;  // [teams, ctas] zero at the beginning; unused by clusters
};

// Where sequences begin anew, and from which states.
struct Resets {
  const uint8_t* rows;  // [rows] not 0: the state before that row, in time, is another sequence's; null: nowhere
  const void* h;        // [D, B, H] or null: zero
  const float* c;       // [D, B, K*H] or null: zero
  float* dh;            // [D, B, H] or null: not wanted; their gradients are added here, in the backward pass
  float* dc;            // [D, B, K*H] or null
};

struct ForwardParams {
  const void* x_gates;  // [rows, D, G*H] the projected input with all biases but the cell's own vectors
  const void* weight;   // [D, G*H, H]
  const void* vectors;  // [D, V*H] or null
  const void* h0;       // [D, B, H] or null: zero
  const float* c0;      // [D, B, K*H] or null: zero
  void* y;              // [rows, D, H]; like c and gates left as it is where a sequence has ended
  void* h_n;            // [D, B, H]
  float* c_n;           // [D, B, K*H]
  float* c;             // [rows, D, K*H] or null: not wanted
  void* gates;          // [rows, D, S*H] or null: not wanted
  Walk walk;
  Split split;
  ExchangeBuffers exchange;
  Resets resets;
};

struct BackwardParams {
  const void* dy;       // [rows, D, H] or null: zero, as all gradients given
  const void* dh_n;     // [D, B, H] or null
  const float* dc_n;    // [D, B, K*H] or null
  const float* dc;      // [rows, D, K*H] or null
  const void* weight;   // [D, G*H, H]
  const void* vectors;  // [D, V*H] or null
  const void* h0;       // [D, B, H] or null: zero
  const float* c0;      // [D, B, K*H] or null: zero
  const void* y;        // [rows, D, H]
  const float* c;       // [rows, D, K*H]
  const void* gates;    // [rows, D, S*H]
  void* dgates;         // [rows, D, G*H] left as it is where a sequence has ended
  void* drecurrent;     // [rows, D, own*H] likewise; null if the cell has none
  void* dh0;            // [D, B, H]
  float* dc0;           // [D, B, K*H]
  Walk walk;
  Split split;
  ExchangeBuffers exchange;
  Resets resets;
};

enum class Precision : int32_t { kHalf, kBfloat16, kTf32, kFloat };

}  // namespace fastseq::recurrent
