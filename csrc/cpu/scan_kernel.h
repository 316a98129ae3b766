// What the host part of a scan (scan.cpp) hands to the loops of an instruction set (scan_kernel.inl).
//
// h_t = a_t h_{t-1} + b_t in every channel. A channel's state is n numbers (1; 2 of a complex number or of a block), its coefficient m (1, 2;
// 4 of a block, row by row). A: fp32, or fp64 if b is; S: the type of b. Steps are counted in memory, whichever way the scan walks.
#pragma once

#include <cstdint>

#include "type.h"

namespace fastseq::cpu {

enum class ScanKind { kReal, kComplex, kBlocks };

// What a and b are (fastseq/reference/scan.py): name, whether steps are made of all inputs and the way back reads b, whether there is a
// gate, a vector. scan_cells.inl has the mathematics.
#define FASTSEQ_SCAN_CELLS(X)                 \
  X(Given, "given", false, false, false)      \
  X(Log, "log", false, false, false)          \
  X(MinGru, "min_gru", true, false, false)    \
  X(MinLstm, "min_lstm", true, true, false)   \
  X(Hgrn, "hgrn", true, false, true)          \
  X(RgLru, "rg_lru", true, true, true)        \
  X(Qrnn, "qrnn", true, false, false)         \
  X(QrnnIfo, "qrnn_ifo", true, true, false)

#define FASTSEQ_SCAN_NAME(Name, ...) k##Name,
enum class ScanCell { FASTSEQ_SCAN_CELLS(FASTSEQ_SCAN_NAME) };
#undef FASTSEQ_SCAN_NAME

struct ScanCellRow {
  const char* name;
  bool reads_b, gate, vector;
};
#define FASTSEQ_SCAN_ROW(Name, name, reads_b, gate, vector) {name, reads_b, gate, vector},
constexpr ScanCellRow kScanCells[] = {FASTSEQ_SCAN_CELLS(FASTSEQ_SCAN_ROW)};
#undef FASTSEQ_SCAN_ROW

constexpr ScanCellRow row_of(ScanCell cell) { return kScanCells[static_cast<int>(cell)]; }

constexpr int64_t kScanState[] = {1, 2, 2}, kScanCoefficient[] = {1, 2, 4};

// Rows [T, B, channels * n or m], the last dimension contiguous; null: none.
struct ScanRows {
  void* data;
  int64_t step, row;  // elements from one to the next; 0: the same for all
};

struct Scan {
  ScanKind kind;
  Type type;       // S
  ScanCell cell;   // other than kGiven of real states alone, with an a for each number of b
  bool wide_a;     // a is A; else S: of kLog, which may have either, and of layers' cells, which have none but S
  bool each;       // each channel has its own coefficient; else a row has one
  bool constant;   // in time: a has one step, and its gradient is the sum over the steps of a row
  bool reverse;
  bool streams;    // gradients go past the caches, which they would only empty
  int64_t steps, rows, channels;
  ScanRows a;      // A or S
  ScanRows b, h;   // S
  ScanRows gate, dgate;          // S, of cells that have one
  ScanRows dh, db; // S
  ScanRows da;     // as a, each channel its own; A [1, B, ..] of a constant a
  const void* vector;            // A [channels] of cells that have one
  void* dvector;                 // A [B, channels] or null: the sum over the steps of a row
  const void* initial;           // A [B, channels * n] or null, as those below
  void* final;
  const void* dfinal;
  void* dinitial;
  const bool* resets;            // [T, B] at strides, or null
  int64_t reset_step, reset_row;
  const int32_t* lengths;        // [B] or null
  const int32_t* starts;         // [B + 1] or null: rows lie end to end in one of b
};

// A part of the rows and channels, in which all steps are walked.
struct ScanPart {
  int64_t row, rows, channel, channels;
};

struct ScanKernels {
  int64_t (*scratch)(const Scan& scan, const ScanPart& part);  // bytes
  void (*forward)(const Scan& scan, const ScanPart& part, void* scratch);
  void (*backward)(const Scan& scan, const ScanPart& part, void* scratch);
};

const ScanKernels& scan_default();
#if defined(__x86_64__)
const ScanKernels& scan_avx2();
const ScanKernels& scan_avx512();
#endif

}  // namespace fastseq::cpu
