// Products of whole matrices by AVX-512: float32 by multiply-adds, bfloat16 by pairs of them. CMakeLists.txt gives this file its flags.
//
// Both operands are packed, a run of depths at a time: the right-hand ones of a whole block of the result in panels of two vectors, the
// left-hand one in blocks of rows of which each depth fills a line. Both stay in the second-level cache; a panel stays in the first while
// every block of rows meets it. The sums of a run fill the registers, and the runs are then added up: a sum of n terms loses about sqrt(n)
// roundings.
#define FASTSEQ_VECTOR_BYTES 64
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "../common/portable.h"
#include "matrix_product.h"

namespace fastseq::cpu::level_avx512_bf16 {
namespace {

#include "vector.inl"
#include "transpose.inl"

using V = Lanes<float>::V;
typedef double Wide __attribute__((vector_size(128)));
constexpr int64_t W = 16;
static_assert(kPanel == 2 * W);

// Factors: what a lane multiplies at once, a value, or a pair of values at neighboring depths.
struct Values {
  using Stored = float;
  using Vector = V;
  static constexpr int64_t kDepths = 1;  // of a factor
  static int64_t piece(int64_t depth) { return min(64, blocks_of(depth, 64) * 8); }  // see Product::kernel

  static FASTSEQ_HOST_DEVICE Vector broadcast(const Vector* line, int r) { return ((const float*)line)[r] - V{}; }
  static FASTSEQ_HOST_DEVICE V add(V sum, Vector a, Vector b) { return sum + a * b; }
  // n <= W columns from `column` on, of the first factor's depths of the given rows
  static FASTSEQ_HOST_DEVICE Vector columns(const Stored* const* rows, int64_t, int64_t column, int64_t n) {
    return (V)_mm512_maskz_loadu_ps(head(n), rows[0] + column);
  }
  // the first n <= W factors of a row
  static FASTSEQ_HOST_DEVICE Vector along(const Stored* row, int64_t n) { return (V)_mm512_maskz_loadu_ps(head(n), row); }

  static FASTSEQ_HOST_DEVICE __mmask16 head(int64_t n) { return (uint32_t(1) << n) - 1; }
};

struct Pairs {
  using Stored = bfloat16;
  typedef uint32_t Vector __attribute__((vector_size(64), may_alias));
  static constexpr int64_t kDepths = 2;
  static int64_t piece(int64_t) { return 128; }

  static FASTSEQ_HOST_DEVICE Vector broadcast(const Vector* line, int r) { return (Vector)_mm512_set1_epi32((*line)[r]); }
  static FASTSEQ_HOST_DEVICE V add(V sum, Vector a, Vector b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  // of `depths` rows, one or two
  static FASTSEQ_HOST_DEVICE Vector columns(const Stored* const* rows, int64_t depths, int64_t column, int64_t n) {
    const __mmask16 mask = Values::head(n);
    const __m256i first = _mm256_maskz_loadu_epi16(mask, rows[0] + column);
    const __m256i second = _mm256_maskz_loadu_epi16(depths > 1 ? mask : 0, rows[depths > 1] + column);
    const auto wide = [](__m256i words) { return (Vector)_mm512_maskz_cvtepu16_epi32(0xffff, words); };
    return wide(first) | wide(second) << 16;
  }
  // n depths, at most of W pairs; a lone last one has zero beside it
  static FASTSEQ_HOST_DEVICE Vector along(const Stored* row, int64_t n) {
    return (Vector)_mm512_maskz_loadu_epi16((uint64_t(1) << n) - 1, row);
  }
};

template <class Factors>
class Product {
  using S = typename Factors::Stored;
  using Vector = typename Factors::Vector;
  static constexpr int64_t kDepths = Factors::kDepths, kRun = 128 * kDepths;  // depths: of a factor, of a run
  static constexpr int64_t kRows = 14, kSums = kRows * 2;  // of a block; with two vectors: their sums leave four registers

 public:
  Product(const MatrixProduct& product, const MatrixBlock& block, void* scratch)
      : p(product), first_row(block.rows[0] * kPanel), rows(min(block.rows[1] * kPanel, p.rows) - first_row),
        row_blocks(blocks_of(rows, kRows)), panels(block.columns[1] - block.columns[0]),
        lines(blocks_of(min(p.depth, kRun), kDepths)) {
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      char* part = static_cast<char*>(scratch) + at;
      at += blocks_of(size, 64) * 64;
      return part;
    };
    right = (Vector*)take(panels * panel_step() * sizeof(Vector));
    left = (Vector*)take(row_blocks * block_step() * sizeof(Vector));
    sums = (V*)take(p.depth > kRun ? row_blocks * panels * kSums * sizeof(V) : 0);
    of_rows = (Wide*)take(row_blocks * sizeof(Wide));
    bytes = at;
    segment_count = segments_of(p, block, segments);
  }

  int64_t bytes;

  void multiply() const {
    for (int64_t b = 0; b < row_blocks; ++b) of_rows[b] = Wide{};
    for (int64_t k = 0; k < p.depth; k += kRun) {
      const int64_t count = min(kRun, p.depth - k);
      for (int64_t i = 0; i < segment_count; ++i) {
        if (repeats(*segments[i].right)) continue;
        if (segments[i].right->by_columns)
          pack_columns(segments[i], k, count);
        else
          pack_right(segments[i], k, count);
      }
      if (p.transposed)
        pack_transposed(k, count);
      else
        pack_rows(k, count);
      for (int64_t i = 0; i < segment_count; ++i) {
        if (repeats(*segments[i].right)) {
          add_rows(segments[i], k, count);
          continue;
        }
        for (int64_t column = 0; column < segments[i].columns; column += kPanel)
          for (int64_t b = 0; b < row_blocks; ++b) multiply_block(segments[i], column, b, k, count);
      }
    }
  }

 private:
  // Whether a matrix is one column whose rows are all the same: the sums of the left-hand rows are what is asked for.
  static bool repeats(const MatrixProduct::Right& right) {
    return right.columns == 1 && !right.matrix.rows && right.matrix.stride == 0 && !right.by_columns;
  }

  // Vectors from one to the next; no power of two, lest they fall into the same sets of a cache.
  int64_t panel_step() const { return 2 * lines + 1; }
  int64_t block_step() const { return lines + 1; }
  int64_t begin_of(int64_t b) const { return rows * b / row_blocks; }
  int64_t lines_of(int64_t count) const { return blocks_of(count, kDepths); }

  // The rows of a matrix at the depths of a factor: k, and k + 1 where that is within `end`.
  static int64_t rows_at(const MatrixRows& matrix, int64_t k, int64_t end, const S** found) {
    for (int64_t d = 0; d < kDepths; ++d) found[d] = static_cast<const S*>(matrix.row(min(k + d, end - 1)));
    return min(kDepths, end - k);
  }

  void pack_right(const MatrixSegment& own, int64_t k, int64_t count) const {
    Vector* to = right + own.panel * panel_step();
    for (int64_t d = 0; d < count; d += kDepths, to += 2) {
      const S* from[kDepths];
      const int64_t depths = rows_at(own.right->matrix, k + d, k + count, from);
      for (int64_t j = 0; j < own.columns; j += W)
        to[j / kPanel * panel_step() + j / W % 2] = Factors::columns(from, depths, own.column + j, min(W, own.columns - j));
    }
  }

  void pack_transposed(int64_t k, int64_t count) const {
    Vector* to = left;
    for (int64_t d = 0; d < count; d += kDepths, ++to) {
      const S* from[kDepths];
      const int64_t depths = rows_at(p.left, k + d, k + count, from);
      for (int64_t b = 0; b < row_blocks; ++b)
        to[b * block_step()] = Factors::columns(from, depths, first_row + begin_of(b), begin_of(b + 1) - begin_of(b));
    }
  }

  // W rows at a time, row(i) or null, become columns: lines of W factors, `step` vectors apart.
  template <class Row>
  static void transposed(const Row& row, int64_t count, Vector* to, int64_t step) {
    const S* from[W];
    for (int64_t i = 0; i < W; ++i) from[i] = row(i);
    constexpr int64_t kSquare = W * kDepths;
    for (int64_t d = 0; d < count; d += kSquare) {
      Vector square[W];
      for (int64_t i = 0; i < W; ++i) {
        square[i] = from[i] ? Factors::along(from[i] + d, min(kSquare, count - d)) : Vector{};
        if (from[i]) __builtin_prefetch(reinterpret_cast<const char*>(from[i] + d) + 4 * sizeof(V), 0, 3);
      }
      transpose<W / 2, W>(square);
      for (int64_t i = 0; i < min(W, blocks_of(count - d, kDepths)); ++i, to += step) *to = square[i];
    }
  }

  void pack_rows(int64_t k, int64_t count) const {
    for (int64_t b = 0; b < row_blocks; ++b) {
      const int64_t begin = begin_of(b), n = begin_of(b + 1) - begin;
      transposed([&](int64_t i) { return i < n ? static_cast<const S*>(p.left.row(first_row + begin + i)) + k : nullptr; }, count,
                 left + b * block_step(), 1);
    }
  }

  void pack_columns(const MatrixSegment& own, int64_t k, int64_t count) const {
    for (int64_t j = 0; j < own.columns; j += W) {
      const auto row = [&](int64_t i) {
        return j + i < own.columns ? static_cast<const S*>(own.right->matrix.row(own.column + j + i)) + k : nullptr;
      };
      transposed(row, count, right + (own.panel + j / kPanel) * panel_step() + j / W % 2, 2);
    }
  }

  // Sums over the depths of the left-hand rows, each times one number. Several sets: each is short, and none waits for another; the runs
  // are added up in fp64, since there is nothing else to do.
  void add_rows(const MatrixSegment& own, int64_t k, int64_t count) const {
    const S* from[kDepths];
    for (int64_t d = 0; d < kDepths; ++d) from[d] = static_cast<const S*>(own.right->matrix.row(0));
    const Vector one = Factors::columns(from, kDepths, 0, 1), factor = Factors::broadcast(&one, 0);
    const int64_t n = lines_of(count);
    for (int64_t b = 0; b < row_blocks; ++b) {
      const Vector* a = left + b * block_step();
      V set[8]{};
      for (int64_t i = 0; i < n; ++i) set[i % 8] = Factors::add(set[i % 8], a[i], factor);
      for (int64_t half = 4; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) set[i] += set[i + half];
      of_rows[b] += __builtin_convertvector(set[0], Wide);
      if (k + count < p.depth) continue;
      char* to = static_cast<char*>(own.right->out) + (first_row + begin_of(b)) * own.right->stride;
      for (int64_t r = 0; r < begin_of(b + 1) - begin_of(b); ++r, to += own.right->stride)
        Memory<S, float>::store(reinterpret_cast<S*>(to), V{} + float(of_rows[b][r]), 1);
    }
  }

  struct Block {
    const Vector *left, *right;
    int64_t lines, piece;
    V* sums;      // of the runs, [rows][2]
    bool begins;  // with this one
    // of the last run: results, bytes from a row to the next
    char* out;
    int64_t stride, columns;
    const S* bias;
    bool relu;
  };

  void multiply_block(const MatrixSegment& own, int64_t column, int64_t b, int64_t k, int64_t count) const {
    const int64_t panel = own.panel + column / kPanel, begin = begin_of(b), n = begin_of(b + 1) - begin;
    const int64_t columns = min(kPanel, own.columns - column), vectors = blocks_of(columns, W), stride = own.right->stride;
    char* out = static_cast<char*>(own.right->out) + (first_row + begin) * stride + (own.column + column) * sizeof(S);
    const Block block{left + b * block_step(), right + panel * panel_step(), lines_of(count), Factors::piece(p.depth), sums + (panel * row_blocks + b) * kSums,
                      k == 0, out, stride, columns, own.right->bias ? static_cast<const S*>(own.right->bias) + own.column + column : nullptr,
                      own.right->relu};
    k + count < p.depth ? kernel_of<false>(n, vectors)(block) : kernel_of<true>(n, vectors)(block);
  }

  using Kernel = void (*)(const Block&);

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // pieces: added only after the first of them was kept
  // RB rows times NV vectors, of the last run or another. Pieces of a run are added up by themselves: a float's rounding errors are those of
  // short sums then.
  template <bool kLast, int RB, int NV>
  static void kernel(const Block& block) {
    const auto [left, right, lines, piece, sums, begins, out, stride, columns, bias, relu] = block;
    V sum[RB][NV];
#pragma GCC unroll 16
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        if (!begins) __builtin_prefetch(sums + r * 2 + v, 1, 3);
        if (kLast && v * W * sizeof(S) % 64 == 0) __builtin_prefetch(out + r * stride + v * W * sizeof(S), 1, 3);
        sum[r][v] = V{};
      }
    V pieces[kSums];  // sums of those before
    for (int64_t k = 0; k < lines;) {
      const int64_t end = min(k + piece, lines);
#pragma GCC unroll 2
      for (; k < end; ++k) {
        Vector weight[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) weight[v] = right[2 * k + v];
#pragma GCC unroll 16
        for (int r = 0; r < RB; ++r) {
          const Vector value = Factors::broadcast(left + k, r);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sum[r][v] = Factors::add(sum[r][v], value, weight[v]);
        }
      }
      if (end > piece)
#pragma GCC unroll 16
        for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sum[r][v] += pieces[r * 2 + v];
      if (end < lines)
#pragma GCC unroll 16
        for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) pieces[r * 2 + v] = sum[r][v], sum[r][v] = V{};
    }
    if (!begins)
#pragma GCC unroll 16
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sum[r][v] += sums[r * 2 + v];
    if constexpr (kLast) {
      if (bias || relu)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          const V added = bias ? Memory<S, float>::load(bias + v * W, columns - v * W) : V{};
#pragma GCC unroll 16
          for (int r = 0; r < RB; ++r) sum[r][v] = relu ? Math<float>::relu(sum[r][v] + added) : sum[r][v] + added;
        }
#pragma GCC unroll 16
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) Memory<S, float>::store((S*)(out + r * stride) + v * W, sum[r][v], columns - v * W);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) sums[r * 2 + v] = sum[r][v];
    }
  }
#pragma GCC diagnostic pop

  template <bool kLast, int NV>
  static Kernel kernel_of_rows(int64_t rows) {
    struct Kernels {
      Kernel of_rows[kRows];
    };
    static constexpr auto kernels = []<int... R>(std::integer_sequence<int, R...>) {
      return Kernels{{kernel<kLast, R + 1, NV>...}};
    }(std::make_integer_sequence<int, kRows>());
    return kernels.of_rows[rows - 1];
  }
  template <bool kLast>
  static Kernel kernel_of(int64_t rows, int64_t vectors) {
    return vectors == 1 ? kernel_of_rows<kLast, 1>(rows) : kernel_of_rows<kLast, 2>(rows);
  }

  const MatrixProduct& p;
  const int64_t first_row, rows, row_blocks, panels;
  const int64_t lines;  // of a whole run
  // packed: panels of [lines][2], blocks of rows of [lines]; sums of earlier runs, [panels][row blocks][kRows][2], and of the rows
  Vector *right, *left;
  V* sums;
  Wide* of_rows;
  MatrixSegment segments[3];
  int64_t segment_count = 0;
};

template <class F>
auto with_factors(const MatrixProduct& product, F&& body) {
  return product.type == Type::kFloat ? body.template operator()<Product<Values>>() : body.template operator()<Product<Pairs>>();
}

constexpr MatrixKernels kMatrixKernels{
    [](const MatrixProduct& product, const MatrixBlock& block) {
      return with_factors(product, [&]<class P>() { return P(product, block, nullptr).bytes; });
    },
    [](const MatrixProduct& product, const MatrixBlock& block, void* scratch) {
      with_factors(product, [&]<class P>() { P(product, block, scratch).multiply(); });
      return true;
    },
    true};

}  // namespace
}  // namespace fastseq::cpu::level_avx512_bf16

namespace fastseq::cpu {
const MatrixKernels& matrix_kernels_avx512_bf16() { return level_avx512_bf16::kMatrixKernels; }
}  // namespace fastseq::cpu
