// Products of 16 rows of weights with 8 columns (sequences), a warp at a time: fp16 and bf16, TF32, and fp32 by plain FMAs.
//
// The operand (states, or gate gradients) lies in shared memory as [depth / kVector][columns][kVector]: 16 bytes of depth a
// column, as CTAs exchange it. Weights are four registers of a lane for 16 rows and kDepth of depth, in a layout that only this
// file knows. tile_sizes.h has the sizes.
#pragma once

#include "../common/prims.cuh"
#include "tile_sizes.h"

namespace fastseq::recurrent {

// lane = 4 * quad + place in PTX's fragments
FASTSEQ_DEVICE int quad() { return gpu::lane() >> 2; }
FASTSEQ_DEVICE int place() { return gpu::lane() & 3; }

// Operands of mma.sync by ldmatrix, two tiles of depth at a time: a row of four vectors for every column. 32-bit numbers arrive as
// pairs of 16-bit ones do.
template <class Number>
struct MmaOperand {
  // Where this lane's part of it lies in the operand.
  static FASTSEQ_DEVICE int offset(int columns) {
    return ((gpu::lane() >> 3) * columns + (gpu::lane() & 7)) * static_cast<int>(sizeof(gpu::Vec16) / sizeof(Number));
  }
  FASTSEQ_DEVICE explicit MmaOperand(const Number* at, int) { gpu::ldmatrix_x4(words, at); }

  uint32_t words[4];
};

// Accumulators of mma.sync: columns 2 * place() and the next, of rows quad() and quad() + 8.
struct MmaSums {
  static constexpr int kSums = 4;

  // into sums[column * stride + row]
  static FASTSEQ_DEVICE void store(const float (&d)[kSums], float* sums, int stride) {
    float* at = sums + 2 * place() * stride + quad();
    at[0] = d[0], at[stride] = d[1], at[8] = d[2], at[stride + 8] = d[3];
  }

  // Four columns of one row: of row() the columns from 4 * quarter().
  static FASTSEQ_DEVICE gpu::Vec16 vector(const float (&d)[kSums]) {
    const bool odd = place() & 1;
    const float other[2] = {gpu::shuffle_xor(odd ? d[0] : d[2], 1), gpu::shuffle_xor(odd ? d[1] : d[3], 1)};
    return odd ? gpu::Vec16{{gpu::as_bits(other[0]), gpu::as_bits(other[1]), gpu::as_bits(d[2]), gpu::as_bits(d[3])}}
               : gpu::Vec16{{gpu::as_bits(d[0]), gpu::as_bits(d[1]), gpu::as_bits(other[0]), gpu::as_bits(other[1])}};
  }
  static FASTSEQ_DEVICE int row() { return quad() + 8 * (place() & 1); }
  static FASTSEQ_DEVICE int quarter() { return place() >> 1; }
};

template <class T>
struct Tile16 : MmaSums, Sizes16 {
  using Number = T;
  using Operand = MmaOperand<T>;
  static constexpr bool kExact = false;

  // at(row, depth) gives a weight
  template <class At>
  static FASTSEQ_DEVICE void load(uint32_t (&a)[4], const At& at) {
    FASTSEQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = quad() + 8 * (r & 1), depth = 2 * place() + 8 * (r >> 1);
      a[r] = at(row, depth).bits | static_cast<uint32_t>(at(row, depth + 1).bits) << 16;
    }
  }

  // by tile n of the operand's two
  static FASTSEQ_DEVICE void multiply(float (&d)[kSums], const uint32_t (&a)[4], const Operand& operand, int n) {
    const uint32_t b[2] = {operand.words[2 * n], operand.words[2 * n + 1]};
    gpu::mma_16816(d, a, b, T{});
  }

  static FASTSEQ_DEVICE T operand(T x) { return x; }
  static FASTSEQ_DEVICE gpu::Vec16 sent(gpu::Vec16 v) { return v; }
};

struct TileTf32 : MmaSums, SizesTf32 {
  using Number = float;
  using Operand = MmaOperand<float>;
  static constexpr bool kExact = false;

  template <class At>
  static FASTSEQ_DEVICE void load(uint32_t (&a)[4], const At& at) {
    FASTSEQ_UNROLL
    for (int r = 0; r < 4; ++r) a[r] = gpu::to_tf32(at(quad() + 8 * (r & 1), place() + 4 * (r >> 1)));
  }

  static FASTSEQ_DEVICE void multiply(float (&d)[kSums], const uint32_t (&a)[4], const Operand& operand, int n) {
    const uint32_t b[2] = {operand.words[2 * n], operand.words[2 * n + 1]};
    gpu::mma_1688_tf32(d, a, b);
  }

  // rounded once, by who sends it or who alone needs it
  static FASTSEQ_DEVICE float operand(float x) { return gpu::as_float(gpu::to_tf32(x)); }
  static FASTSEQ_DEVICE gpu::Vec16 sent(gpu::Vec16 v) {
    FASTSEQ_UNROLL
    for (int i = 0; i < 4; ++i) v.word[i] = gpu::to_tf32(gpu::as_float(v.word[i]));
    return v;
  }
};

// Two lanes to a row, each with half of the tile's depth.
struct TileFloat : SizesFloat {
  struct Operand {
    static FASTSEQ_DEVICE int offset(int columns) { return (gpu::lane() & 1) * columns * kVector; }
    FASTSEQ_DEVICE Operand(const float* at, int columns) : vectors(reinterpret_cast<const gpu::Vec16*>(at)), columns(columns) {}

    const gpu::Vec16* vectors;
    int columns;
  };
  using Number = float;
  static constexpr int kSums = 8;  // columns
  static constexpr bool kExact = true;

  template <class At>
  static FASTSEQ_DEVICE void load(uint32_t (&a)[4], const At& at) {
    FASTSEQ_UNROLL
    for (int r = 0; r < 4; ++r) a[r] = gpu::as_bits(at(gpu::lane() >> 1, 4 * (gpu::lane() & 1) + r));
  }

  static FASTSEQ_DEVICE void multiply(float (&d)[kSums], const uint32_t (&a)[4], const Operand& operand, int n) {
    const gpu::Vec16* h = operand.vectors + n * (kDepth / kVector) * operand.columns;
    FASTSEQ_UNROLL
    for (int column = 0; column < kSums; ++column) {
      const gpu::Vec16 v = h[column];
      FASTSEQ_UNROLL
      for (int r = 0; r < 4; ++r) d[column] += gpu::as_float(a[r]) * gpu::as_float(v.word[r]);
    }
  }

  static FASTSEQ_DEVICE void store(const float (&d)[kSums], float* sums, int stride) {
    const int half = gpu::lane() & 1;
    FASTSEQ_UNROLL
    for (int n = 0; n < kSums; ++n) {
      const float sum = d[n] + gpu::shuffle_xor(d[n], 1);
      if (n / 4 == half) sums[n * stride + (gpu::lane() >> 1)] = sum;
    }
  }

  static FASTSEQ_DEVICE gpu::Vec16 vector(const float (&d)[kSums]) {
    const bool odd = gpu::lane() & 1;
    gpu::Vec16 v;
    FASTSEQ_UNROLL
    for (int n = 0; n < 4; ++n) {
      const float own = odd ? d[4 + n] : d[n], other = gpu::shuffle_xor(odd ? d[n] : d[4 + n], 1);
      v.word[n] = gpu::as_bits(own + other);
    }
    return v;
  }
  static FASTSEQ_DEVICE int row() { return gpu::lane() >> 1; }
  static FASTSEQ_DEVICE int quarter() { return gpu::lane() & 1; }

  static FASTSEQ_DEVICE float operand(float x) { return x; }
  static FASTSEQ_DEVICE gpu::Vec16 sent(gpu::Vec16 v) { return v; }
};

}  // namespace fastseq::recurrent
