// Products of whole matrices by AMX tiles: bfloat16, and float32 in three parts of it.
// CMakeLists.txt gives this file its flags; the tile instructions are assembly and need none.
//
// Both operands are packed into panels of two tiles, a run of depths at a time: the right-hand ones of a whole block of the result, which
// stay in the second-level cache, and one panel of the left-hand one, which stays in the first. Each panel of one meets each of the other;
// their four tiles of sums stay in registers for the run, and between the runs in the second-level cache.
#define FASTSEQ_VECTOR_BYTES 64
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "../common/portable.h"
#include "matrix_product.h"
#include "recurrent_kernel.h"  // kMostOfParts

namespace fastseq::cpu::level_amx {
namespace {

#include "vector.inl"
#include "tiles.inl"

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

constexpr int64_t kTile = 16, kDepth = 32, kTileBytes = 1024;  // rows or columns of a tile, depths of one

using V = Lanes<float>::V;
using U = Lanes<float>::U;
typedef uint16_t Words __attribute__((vector_size(64)));
typedef int64_t Quads __attribute__((vector_size(64)));

// The lower or the upper halves of each 16 bytes of a and b, elements in turn.
template <class E, int kUpper, class T>
FASTSEQ_HOST_DEVICE T unpacked(T a, T b) {
  typedef E Elements __attribute__((vector_size(64)));
  constexpr int n = 16 / sizeof(E), all = 64 / sizeof(E);
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return (T)__builtin_shufflevector((Elements)a, (Elements)b, (I / n * n + kUpper * n / 2 + I % n / 2 + I % 2 * all)...);
  }(std::make_integer_sequence<int, all>());
}

// A tile of 16 x 16 pairs, transposed.
FASTSEQ_HOST_DEVICE void transpose(const char* from, char* to) {
#pragma GCC unroll 4
  for (int four = 0; four < 4; ++four) {
    Quads a[4], b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto quarter = [&](int q) __attribute__((always_inline)) {
        return _mm_load_si128((const __m128i*)(from + (4 * q + i) * 64 + four * 16));
      };
      __m512i row = _mm512_castsi128_si512(quarter(0));
      row = _mm512_inserti32x4(row, quarter(1), 1);
      row = _mm512_inserti32x4(row, quarter(2), 2);
      a[i] = (Quads)_mm512_inserti32x4(row, quarter(3), 3);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      b[i] = unpacked<uint32_t, 0>(a[2 * i], a[2 * i + 1]), b[2 + i] = unpacked<uint32_t, 1>(a[2 * i], a[2 * i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Quads* rows = (Quads*)(to + (4 * four + 2 * i) * 64);
      rows[0] = unpacked<uint64_t, 0>(b[2 * i], b[2 * i + 1]);
      rows[1] = unpacked<uint64_t, 1>(b[2 * i], b[2 * i + 1]);
    }
  }
}

template <class S, int kParts>
class Product {
  static constexpr int64_t kBytes = kTileBytes * kParts, kStep = 2 * kBytes;  // of a tile, of a panel's depths of a tile
  // Depths of a run: a panel of the left-hand matrix fits the first-level cache, which the right-hand ones stream past.
  static constexpr int64_t kRun = kParts == 1 ? 512 : 128;

 public:
  Product(const MatrixProduct& product, const MatrixBlock& block, void* scratch)
      : p(product), first_row(block.rows[0] * kPanel), rows(min(block.rows[1] * kPanel, p.rows) - first_row),
        row_panels(blocks_of(rows, kPanel)), panels(block.columns[1] - block.columns[0]),
        step(blocks_of(min(p.depth, kRun), kDepth) * kStep + 64) {
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      char* part = static_cast<char*>(scratch) + at;
      at += blocks_of(size, 64) * 64;
      return part;
    };
    right = take(panels * step);
    left = take(row_panels * step);
    pairs = take(p.transposed ? row_panels * kStep : 0);
    sums = take(p.depth > kRun ? row_panels * panels * kSums : 0);
    fresh = take(kSums);
    of_rows = (V*)take(kParts > 1 ? row_panels * (p.transposed ? 2 : kPanel) * sizeof(V) : 0);
    of_columns = (V*)take(kParts > 1 ? panels * 2 * sizeof(V) : 0);
    bytes = at;
    segment_count = segments_of(p, block, segments);
  }

  int64_t bytes;

  bool multiply() const {
    const TileConfiguration configuration({16, 16, 16, 16, 16, 16, 16, 16});
    if constexpr (kParts > 1) __builtin_memset((void*)of_rows, 0, (char*)(of_columns + 2 * panels) - (char*)of_rows);
    Waiting waiting;
    for (int64_t k = 0; k < p.depth; k += kRun) {
      const int64_t count = min(kRun, p.depth - k);
      for (int64_t d = 0; d < count; d += kDepth)
        for (int64_t i = 0; i < segment_count; ++i) {
          const MatrixSegment& own = segments[i];
          if (own.right->by_columns) continue;
          pack_pairs(own.right->matrix, k + d, min(kDepth, count - d), own.column, own.columns, right + own.panel * step + d / kDepth * kStep,
                     step, of_columns + 2 * own.panel);
        }
      for (int64_t i = 0; i < segment_count; ++i)
        if (segments[i].right->by_columns) pack_columns(segments[i], k, count);
      if (p.transposed)
        pack_transposed(k, count);
      else
        pack_rows(k, count);
      for (int64_t r = 0; r < row_panels; ++r)
        for (int64_t i = 0; i < segment_count; ++i)
          for (int64_t column = 0; column < segments[i].columns; column += kPanel) {
            const bool two_rows = rows - r * kPanel > kTile, two_columns = segments[i].columns - column > kTile;
            if (two_rows && two_columns)
              pair<2, 2>(k, r, segments[i], column, waiting);
            else if (two_rows)
              pair<2, 1>(k, r, segments[i], column, waiting);
            else if (two_columns)
              pair<1, 2>(k, r, segments[i], column, waiting);
            else
              pair<1, 1>(k, r, segments[i], column, waiting);
          }
      waiting.rest();
    }
    return kParts == 1 || within();
  }

 private:
  static constexpr int64_t kSums = 4 * kTileBytes;  // of a pair of panels

  // Sums that are stored and have to be added to those of earlier runs, rounded or both. That is done beside the next products: by
  // themselves, the sums would wait for the last of the tiles, and then the tiles for them.
  struct Waiting {
    const V* fresh = nullptr;
    V* own = nullptr;     // those of earlier runs, or null
    char* out = nullptr;  // null: they go on
    int64_t stride = 0, columns = 0, row = 0, rows = 0, at_once = 0;  // at_once: rows beside a step

    FASTSEQ_HOST_DEVICE void operator()() { advance(min(rows, row + at_once)); }
    void rest() { advance(rows); }
    void advance(int64_t end) {
      for (; row < end; ++row) {
        const int64_t at = row / kTile * 2 * kTile + row % kTile;
        V sum[2] = {fresh[at], fresh[at + kTile]};
        if (own) sum[0] += own[at], sum[1] += own[at + kTile];
        if (!out) {
          own[at] = sum[0], own[at + kTile] = sum[1];
        } else {
          if (sizeof(S) == 2 && columns == kPanel) {
            const Words both = (Words)_mm512_cvtne2ps_pbh((__m512)sum[1], (__m512)sum[0]);
            __builtin_memcpy(out, &both, sizeof both);
          } else {
            Memory<S, float>::store((S*)out, sum[0], columns);
            if (columns > kTile) Memory<S, float>::store((S*)out + kTile, sum[1], columns - kTile);
          }
          out += stride;
        }
      }
    }
  };

  static FASTSEQ_HOST_DEVICE void see(V v, V& most) {
    const U size = (U)v & 0x7fffffffu;
    most = (V)(size > (U)most ? size : (U)most);
  }

  // Two vectors as pairs, in parts: rounded by adding half of the last place that stays, so that what is left fits in the parts below.
  static FASTSEQ_HOST_DEVICE void pairs_of(V a, V b, char* to) {
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
      const U round = U{} + (part < 2 ? 0x8000u : 0), upper_a = ((U)a + round) & 0xffff0000u, upper_b = ((U)b + round) & 0xffff0000u;
      a -= (V)upper_a, b -= (V)upper_b;
      *(U*)(to + part * kTileBytes) = upper_a >> 16 | upper_b;
    }
  }

  // A tile of depths, k .. k + count, of columns, in pairs: panels `step` bytes apart. Row by row, since what lies in sequence is fetched
  // ahead by the processor.
  static void pack_pairs(const MatrixRows& matrix, int64_t k, int64_t count, int64_t column, int64_t columns, char* to, int64_t step,
                         V* most) {
    for (int64_t pair = 0; pair < kTile; ++pair, to += 64) {
      const int64_t first = kParts == 1 ? 2 * pair : pair, second = first + (kParts == 1 ? 1 : kTile);
      const auto row = [&](int64_t d) { return static_cast<const S*>(matrix.row(k + min(d, count - 1))) + column; };
      const S *a = row(first), *b = row(second);
      char* at = to;
      for (int64_t j = 0; j < columns; j += kPanel, at += step) {
        const uint32_t mask = (uint64_t(1) << min(kPanel, columns - j)) - 1, of_a = first < count ? mask : 0, of_b = second < count ? mask : 0;
        if constexpr (kParts == 1) {
          const Words x = (Words)_mm512_maskz_loadu_epi16(of_a, a + j), y = (Words)_mm512_maskz_loadu_epi16(of_b, b + j);
          const Quads low = (Quads)unpacked<uint16_t, 0>(x, y), high = (Quads)unpacked<uint16_t, 1>(x, y);  // every other four columns
          *(Quads*)at = __builtin_shufflevector(low, high, 0, 1, 8, 9, 2, 3, 10, 11);
          *(Quads*)(at + kBytes) = __builtin_shufflevector(low, high, 4, 5, 12, 13, 6, 7, 14, 15);
        } else {
#pragma GCC unroll 2
          for (int64_t half = 0; half < 2; ++half) {
            const V x = (V)_mm512_maskz_loadu_ps(of_a >> half * kTile, a + j + half * kTile);
            const V y = (V)_mm512_maskz_loadu_ps(of_b >> half * kTile, b + j + half * kTile);
            see(x, most[j / kTile + half]), see(y, most[j / kTile + half]);
            pairs_of(x, y, at + half * kBytes);
          }
        }
      }
    }
  }

  void pack_transposed(int64_t k, int64_t count) const {
    for (int64_t d = 0; d < count; d += kDepth) {
      pack_pairs(p.left, k + d, min(kDepth, count - d), first_row, rows, pairs, kStep, of_rows);
      for (int64_t i = 0; i < row_panels; ++i)
        for (int64_t tile = 0; tile < 2 * kParts; ++tile)
          transpose(pairs + i * kStep + tile * kTileBytes, left + i * step + d / kDepth * kStep + tile * kTileBytes);
    }
  }

  // Columns that lie as rows do, 16 at a time.
  void pack_columns(const MatrixSegment& own, int64_t k, int64_t count) const {
    for (int64_t column = 0; column < own.columns; column += kTile) {
      const int64_t panel = own.panel + column / kPanel, half = column / kTile % 2;
      char* to = right + panel * step + half * kBytes;
      V most[kTile] = {};
      for (int64_t d = 0; d < count; d += kDepth, to += kStep) {
        alignas(64) char lying[kBytes];
        for (int64_t i = 0; i < kTile; ++i) {
          const bool inside = column + i < own.columns;
          const uint32_t mask = inside ? (uint64_t(1) << min(kDepth, count - d)) - 1 : 0;
          const S* from = static_cast<const S*>(own.right->matrix.row(own.column + (inside ? column + i : 0))) + k + d;
          if constexpr (kParts == 1) {
            *(Words*)(lying + i * 64) = (Words)_mm512_maskz_loadu_epi16(mask, from);
          } else {
            const V x = (V)_mm512_maskz_loadu_ps(mask, from), y = (V)_mm512_maskz_loadu_ps(mask >> kTile, from + kTile);
            see(x, most[i]), see(y, most[i]);
            pairs_of(x, y, lying + i * 64);
          }
        }
        for (int64_t part = 0; part < kParts; ++part) transpose(lying + part * kTileBytes, to + part * kTileBytes);
      }
      if constexpr (kParts > 1) {
        U* of_tile = (U*)of_columns + 2 * panel + half;
        for (int64_t i = 0; i < kTile; ++i)
          for (int64_t lane = 0; lane < kTile; ++lane) (*of_tile)[i] = max((*of_tile)[i], ((U)most[i])[lane]);
      }
    }
  }

  void pack_rows(int64_t k, int64_t count) const {
    for (int64_t i = 0; i < row_panels * kPanel; ++i) {
      char* to = left + i / kPanel * step + i / kTile % 2 * kBytes + i % kTile * 64;
      const S* from = static_cast<const S*>(p.left.row(first_row + min(i, rows - 1))) + k;
      V most{};
      for (int64_t d = 0; d < count; d += kDepth, to += kStep) {
        const uint32_t mask = i < rows ? (uint64_t(1) << min(kDepth, count - d)) - 1 : 0;
        if constexpr (kParts == 1) {
          *(Words*)to = (Words)_mm512_maskz_loadu_epi16(mask, from + d);
        } else {
          const V x = (V)_mm512_maskz_loadu_ps(mask, from + d), y = (V)_mm512_maskz_loadu_ps(mask >> kTile, from + d + kTile);
          see(x, most), see(y, most);
          pairs_of(x, y, to);
        }
      }
      if constexpr (kParts > 1) see(most, of_rows[i]);
    }
  }

  // a panel of the left-hand matrix times one of a right-hand one: MT and NT tiles
  template <int MT, int NT>
  void pair(int64_t k, int64_t r, const MatrixSegment& segment, int64_t column, Waiting& waiting) const {
    const int64_t panel = segment.panel + column / kPanel, depths = blocks_of(min(kRun, p.depth - k), kDepth);
    waiting.at_once = blocks_of(waiting.rows - waiting.row, depths);
    tile_zero<0>();
    if constexpr (NT == 2) tile_zero<1>();
    if constexpr (MT == 2) tile_zero<2>();
    if constexpr (MT == 2 && NT == 2) tile_zero<3>();
    const char *a = left + r * step, *b = right + panel * step;
    for (int64_t d = 0; d < depths; ++d, a += kStep, b += kStep) {
      if constexpr (kParts == 1) {
        load_left<MT>(a), load_right<NT>(b), multiply_tiles<MT, NT>();
      } else if constexpr (kParts == 2) {
        load_left<MT>(a), load_right<NT>(b + kTileBytes), multiply_tiles<MT, NT>();
        load_left<MT>(a + kTileBytes), load_right<NT>(b), multiply_tiles<MT, NT>();
        load_left<MT>(a), multiply_tiles<MT, NT>();
      } else {
        // the six products that count, the largest last, each with one factor of the one before
        load_left<MT>(a), load_right<NT>(b + 2 * kTileBytes), multiply_tiles<MT, NT>();
        load_right<NT>(b + kTileBytes), multiply_tiles<MT, NT>();
        load_left<MT>(a + kTileBytes), multiply_tiles<MT, NT>();
        load_right<NT>(b), multiply_tiles<MT, NT>();
        load_left<MT>(a + 2 * kTileBytes), multiply_tiles<MT, NT>();
        load_left<MT>(a), multiply_tiles<MT, NT>();
      }
      waiting();
    }
    waiting.rest();
    char* own = sums + (r * panels + panel) * kSums;
    const bool begins = k == 0, ends = k + kRun >= p.depth, keeps = begins && !ends;
    char* to = keeps ? own : fresh;
    tile_store<0>(to, 64);
    if constexpr (NT == 2) tile_store<1>(to + kTileBytes, 64);
    if constexpr (MT == 2) tile_store<2>(to + 2 * kTileBytes, 64);
    if constexpr (MT == 2 && NT == 2) tile_store<3>(to + 3 * kTileBytes, 64);
    if (keeps) return;
    const int64_t stride = segment.right->stride, first = first_row + r * kPanel, left_rows = min(MT * kTile, rows - r * kPanel);
    char* out = static_cast<char*>(segment.right->out) + first * stride + (segment.column + column) * sizeof(S);
    waiting = {(const V*)to, begins ? nullptr : (V*)own, ends ? out : nullptr, stride, min(NT * kTile, segment.columns - column),
               0, ends ? left_rows : MT * kTile};
  }

  template <int MT>
  static FASTSEQ_HOST_DEVICE void load_left(const char* a) {
    tile_load<4>(a, 64);
    if constexpr (MT == 2) tile_load<5>(a + kBytes, 64);
  }
  template <int NT>
  static FASTSEQ_HOST_DEVICE void load_right(const char* b) {
    tile_stream<6>(b, 64);
    if constexpr (NT == 2) tile_stream<7>(b + kBytes, 64);
  }
  template <int MT, int NT>
  static FASTSEQ_HOST_DEVICE void multiply_tiles() {
    tile_multiply<0, 4, 6>();
    if constexpr (NT == 2) tile_multiply<1, 4, 7>();
    if constexpr (MT == 2) tile_multiply<2, 5, 6>();
    if constexpr (MT == 2 && NT == 2) tile_multiply<3, 5, 7>();
  }

  // Of float, each row of the left-hand matrix and each column of the others must be zero or reach so far that what is lost of parts too
  // small, 2^-126, is below a rounding, of the number and of its products; and no product may come near infinity.
  bool within() const {
    constexpr double kLeast = 1e-30, kMost = 1e38;
    Extent left, right;
    for (int64_t i = 0; i < panels * 2; ++i)
      for (int64_t lane = 0; lane < kTile; ++lane) right.see(((const U*)of_columns)[i][lane]);
    if (p.transposed) {
      for (int64_t i = 0; i < row_panels * 2; ++i)
        for (int64_t lane = 0; lane < kTile; ++lane) left.see(((const U*)of_rows)[i][lane]);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        uint32_t most = 0;
        for (int64_t lane = 0; lane < kTile; ++lane) most = max(most, ((const U*)of_rows)[i][lane]);
        left.see(most);
      }
    }
    return left.least() >= kLeast && right.least() >= kLeast && left.least() * right.least() >= kLeast && left.most() <= kMostOfParts &&
           right.most() <= kMostOfParts && left.most() * right.most() * p.depth <= kMost;
  }

  // the largest and the smallest of some largest values, by their bits; what is all zero does not count
  struct Extent {
    uint32_t bits[2] = {~0u, 0};
    void see(uint32_t most) {
      if (!most) return;
      bits[0] = min(bits[0], most), bits[1] = max(bits[1], most);
    }
    double least() const { return bits[1] ? __builtin_bit_cast(float, bits[0]) : 1; }
    double most() const { return bits[1] ? __builtin_bit_cast(float, bits[1]) : 1; }
  };

  const MatrixProduct& p;
  const int64_t first_row, rows, row_panels, panels;
  const int64_t step;  // bytes of a packed panel; no power of two, lest they fall into the same sets of a cache
  // packed panels of the right-hand matrices and the left-hand one, [depths][2][parts] tiles; pairs of depths to be transposed, [2][parts];
  // sums of earlier runs [panels of rows][of columns][2][2]; those of the last product
  char *right, *left, *pairs, *sums, *fresh;
  V *of_rows, *of_columns;  // the largest absolute values, lane by lane, of rows or of tiles of them, of tiles of columns
  MatrixSegment segments[3];
  int64_t segment_count = 0;
};

template <class F>
auto with_parts(const MatrixProduct& product, F&& body) {
  if (product.type != Type::kFloat) return body.template operator()<Product<bfloat16, 1>>();
  return product.two_parts ? body.template operator()<Product<float, 2>>() : body.template operator()<Product<float, 3>>();
}

constexpr MatrixKernels kMatrixKernels{
    [](const MatrixProduct& product, const MatrixBlock& block) {
      return with_parts(product, [&]<class P>() { return P(product, block, nullptr).bytes; });
    },
    [](const MatrixProduct& product, const MatrixBlock& block, void* scratch) {
      return with_parts(product, [&]<class P>() { return P(product, block, scratch).multiply(); });
    },
    false};

}  // namespace
}  // namespace fastseq::cpu::level_amx

namespace fastseq::cpu {
const MatrixKernels& matrix_kernels_amx() { return level_amx::kMatrixKernels; }
}  // namespace fastseq::cpu
