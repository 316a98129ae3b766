// Products of whole matrices: the gradients of a layer's weights, sums over every row of the sequences, and that of its input; projections.
// Nothing is allocated here and no pointer is kept after the call. No two pointers alias.
#pragma once

#include <cstdint>
#include <vector>

#include "type.h"

namespace fastseq::cpu {

// Rows of a matrix: `stride` bytes apart (0: one row for all), or each where `rows` says.
struct MatrixRows {
  const void* data;
  int64_t stride;
  const void* const* rows;
  const void* row(int64_t i) const { return rows ? rows[i] : static_cast<const char*>(data) + i * stride; }
};

// out[m][n] = sum over k < depth of left x right, rounded once. A row of right is a depth, or a column, as of the weights of a projection.
// Several matrices are multiplied by the same left one; each begins a panel of columns of its own.
struct MatrixProduct {
  struct Right {
    MatrixRows matrix;
    int64_t columns;
    void* out;
    int64_t stride;  // bytes
    bool by_columns = false;  // matrix is [columns][depth], else [depth][columns]
    // of kernels that finish results: what is added to every row, and whether negative sums then become zero
    const void* bias = nullptr;
    bool relu = false;
  };
  Type type;  // kFloat or kBfloat16
  int64_t rows, depth;
  MatrixRows left;
  bool transposed;  // left is [depth][rows], else [rows][depth]
  Right right[3];
  int count;  // of right matrices
  bool two_parts = false;  // of float: two parts of bfloat16 instead of three, with half the products and errors of 2^-16
};

constexpr int64_t kPanel = 32;  // rows or columns

// A part of the result: panels of rows begin .. end, and of columns, those of all right matrices counted on.
struct MatrixBlock {
  int64_t rows[2], columns[2];
};

// What a block has of a right-hand matrix: columns of it, and the first of its panels, counted from the block's.
struct MatrixSegment {
  const MatrixProduct::Right* right;
  int64_t column, columns, panel;
};

// Those of a block, in turn; how many there are.
inline int64_t segments_of(const MatrixProduct& product, const MatrixBlock& block, MatrixSegment* to) {
  const int64_t panels = block.columns[1] - block.columns[0];
  int64_t count = 0;
  for (int64_t i = 0, panel = -block.columns[0]; i < product.count; panel += (product.right[i++].columns + kPanel - 1) / kPanel) {
    const MatrixProduct::Right& own = product.right[i];
    const int64_t skipped = panel < 0 ? -panel : 0, from = skipped * kPanel;
    const int64_t end = (panels - panel) * kPanel, columns = (end < own.columns ? end : own.columns) - from;
    if (columns > 0) to[count++] = {&own, from, columns, panel + skipped};
  }
  return count;
}

struct MatrixKernels {
  int64_t (*scratch)(const MatrixProduct&, const MatrixBlock&);  // bytes, 64-byte aligned
  // False: a number of type float was met that is beyond what is multiplied in parts. Then the results are not to be used.
  bool (*multiply)(const MatrixProduct&, const MatrixBlock&, void* scratch);
  bool finishes;
};

#if defined(__x86_64__)
const MatrixKernels& matrix_kernels_avx512_bf16();
const MatrixKernels& matrix_kernels_amx();
#endif

// Those that serve a type here; null: torch's own products do.
const MatrixKernels* matrix_kernels(Type type);

// All of these products, by torch's threads; the sums do not depend on how many there are. False: the results are not to be used.
bool multiply(const MatrixKernels& kernels, const std::vector<MatrixProduct>& products);

}  // namespace fastseq::cpu
