// What the host part (attention.cpp) hands to the kernels of an instruction set (attention_kernel.inl, attention_few.inl).
//
// Letters: B batch, Hq query heads, Hkv key heads (query head h reads key head h / (Hq / Hkv)), Tq, Tk, E features of q and k, Ev of v.
// The scores, and what hides a key from a query, are as fastseq/reference/attention.py says; a query's place is i + shift.
// Nothing is allocated here and no pointer is kept after the call. Strides count elements; the last dimension is contiguous.
#pragma once

#include <cstdint>

#include "type.h"

namespace fastseq::cpu {

// Rows [B, H, T, ..] of a tensor, or [H, N, ..] of a packed one, whose sequences begin at rows given elsewhere (b = 0).
template <class P>
struct RowsOf {
  P* data;
  int64_t b, h, t;

  bool given() const { return data != nullptr; }
  // in elements
  int64_t offset(int64_t batch, int64_t head, int64_t row) const { return batch * b + head * h + row * t; }
};
using ConstRows = RowsOf<const void>;
using MutableRows = RowsOf<void>;

// A tensor over the pairs [B, Hq, Tq, Tk]; the stride of a dimension that it is broadcast along is 0.
struct Pairs {
  const void* data;
  int64_t b, h, i, j;

  bool given() const { return data != nullptr; }
};

struct Attention {
  Type type;
  int64_t batch, heads, key_heads, queries, keys, features, value_features;  // packed: the longest sequences
  ConstRows q, k, v;

  // what hides
  Pairs mask;  // bytes
  const int32_t *q_lengths, *k_lengths;
  const int32_t *cu_q, *cu_k;       // packed: [B + 1]
  Pairs blocks;                     // bytes; i and j of blocks
  int64_t block_size;
  int64_t left, right;              // -1: unlimited
  bool bottom_right;
  int64_t offset;

  // what shapes the scores
  double scale, softcap;
  Pairs bias;
  Type bias_type;
  const void* relative_bias;  // [Hq, relative_bias_length], entry zero for j = p
  Type relative_bias_type;
  int64_t relative_bias_length, relative_bias_zero;
  ConstRows relative_q;       // as q
  const void* relative_k;     // [Hq, relative_k_length, E]
  int64_t relative_k_length, relative_k_zero;
  const void* slopes;         // wide [B or 1, Hq]
  int64_t slopes_b;
  const void* sinks;          // [Hq]
  Type sinks_type;
  bool placed;                // whether `seed` is [5]: then it has the place of the call in a larger one, as `Spec` of fastseq/ops/types.py says
  const int64_t* seed;        // [1]
  double dropout;

  // of a cache in pages: entry [b, j / page_size] of the table is the place of a page in the first dimension of k and v
  const int32_t* block_table;
  int64_t block_table_b, page_size, pages;

  // results
  MutableRows out;
  void* lse;  // wide [B, Hq, Tq] or [Hq, N]; may be null
  int64_t lse_b, lse_h;
  void* lse_rest;  // as lse, of type float and without sinks: what rounding took from it; may be null
  bool saves;  // for a backward pass, which takes lse for the sum of the weights that it forms again, from scores that are rounded alike

  struct Sequence {
    int64_t first_q, first_k;  // rows of packed tensors
    int64_t queries, keys;     // that are valid
    int64_t shift;             // place of query 0 among the keys
  };
  Sequence sequence(int64_t b) const {
    Sequence s{0, 0, queries, keys, offset};
    if (cu_q) {
      s.first_q = cu_q[b], s.first_k = cu_k[b];
      s.queries = cu_q[b + 1] - cu_q[b], s.keys = cu_k[b + 1] - cu_k[b];
    }
    if (q_lengths) s.queries = clamped(q_lengths[b], queries);
    if (k_lengths) s.keys = clamped(k_lengths[b], keys);
    if (bottom_right) s.shift += s.keys - s.queries;
    return s;
  }
  int64_t key_head(int64_t h) const { return h / (heads / key_heads); }

 private:
  static int64_t clamped(int64_t length, int64_t most) { return length < 0 ? 0 : length < most ? length : most; }
};

// A block of queries of a head.
struct AttentionTask {
  int64_t b, h, first, count;
};

// The weights after dropout, contiguous [B, Hq, Tq, Tk], or averaged over the heads [B, Tq, Tk]. Padded only; `out` may be missing.
struct AttentionWeights {
  Attention attention;
  void* weights;
  bool average;
};

struct AttentionBackward {
  Attention attention;  // without out and lse, but with the strides of lse
  ConstRows dout, out;     // may both be missing, and the attention's v, if dv is not wanted
  const void *lse, *dlse;  // wide, strides as of the attention's lse; dlse may be null
  const void* lse_rest;    // as the attention's; may be null
  Pairs dweights;          // of the weights after dropout, in the attention's type; may be missing. Padded only
  double dweights_factor;  // 1, or a head's share of the gradient of their average
  // what is wanted
  MutableRows dq, dk, dv;
  // wide sums, one for each worker, zero at first; strides in elements, 0 where the bias is broadcast
  void* const* dbias;
  int64_t dbias_b, dbias_h, dbias_i, dbias_j;
  bool dbias_once;  // each element is of one pair alone: then it is set, not added to, of the bias's type; those of hidden keys may be left as they are
  void* const* drelative_bias;  // [Hq, relative_bias_length]
  MutableRows drelative_q;
  void* const* drelative_k;  // [Hq, relative_k_length, E], of which the scale is not yet a factor
  void* delta;               // as lse: the sum over the keys of weights times their gradients, less dlse; may be null
};

// The kernels of one instruction set. A workspace is a thread's own, 64-byte aligned.
struct AttentionKernels {
  int64_t (*lanes)(const Attention&);  // queries of a block at most
  int64_t (*forward_workspace)(const Attention&);
  // How many of the tasks, which then come first, have no results: a number of type float was met that is beyond what is multiplied in parts.
  int64_t (*forward)(const Attention&, AttentionTask*, int64_t count, void* workspace);
  int64_t (*weights_workspace)(const AttentionWeights&);
  void (*weights)(const AttentionWeights&, const AttentionTask*, int64_t count, void* workspace);
  int64_t (*backward_workspace)(const AttentionBackward&);
  // of the sums of a key head's gradients
  int64_t (*sums_bytes)(const Attention&);
  // a part of the queries of a key head: dq, and dk and dv in `sums`; what is summed over heads too goes to the worker's own sums
  void (*backward)(const AttentionBackward&, int64_t b, int64_t key_head, int64_t part, int64_t parts, void* sums, int64_t worker,
                   void* workspace);
  // the parts' sums, one behind another, as dk and dv
  void (*store_gradients)(const AttentionBackward&, int64_t b, int64_t key_head, const void* sums, int64_t parts);
};

const AttentionKernels& attention_kernels_default();
#if defined(__x86_64__)
const AttentionKernels& attention_kernels_avx2();
const AttentionKernels& attention_kernels_avx512();
const AttentionKernels& attention_kernels_avx512_bf16();  // bfloat16
const AttentionKernels& attention_kernels_amx();  // bfloat16; forward of float, in parts
#endif

}  // namespace fastseq::cpu
