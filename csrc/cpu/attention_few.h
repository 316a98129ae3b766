// Attention whose rows per key head are few, as in decoding against a cache: what the host part (attention_few.cpp) hands to the kernels
// of an instruction set (attention_few.inl).
//
// A key head is read by rows: row r is query r / g of query head r % g of its g = Hq / Hkv. What a part of its keys makes of some rows is,
// in the arithmetic type, [rows] highest scores, [rows] sums of exponentials, and the weighted sums of v, [rows, padded Ev].
#pragma once

#include <cstdint>

#include "attention_kernel.h"

namespace fastseq::cpu {

constexpr int64_t kFewRows = 32;  // that go over the keys together

struct FewPart {
  int64_t batch, key_head;
  int64_t first_row, rows;
  int64_t begin, end;  // keys
};

struct FewKernels {
  int64_t (*block)(const Attention& a);          // keys that are weighted together, where a part may end
  int64_t (*scratch)(const Attention& a);        // bytes
  int64_t (*partial)(const Attention& a);        // bytes of what a part makes
  // Writes the results of its rows or, if partial is given, what the part makes of them.
  void (*run)(const Attention& a, const FewPart& part, void* scratch, void* partial);
  // The results of rows from `count` parts of their keys, `partial(a)` bytes apart, in this order.
  void (*merge)(const Attention& a, const FewPart& rows, const void* partials, int64_t count, void* scratch);
};

const FewKernels& few_default();
#if defined(__x86_64__)
const FewKernels& few_avx2();
const FewKernels& few_avx512();
const FewKernels& few_avx512_bf16();  // bfloat16
const FewKernels& few_amx();  // bfloat16
#endif

// Whether the kernels take a call, and are the ones for it.
bool few_serves(const Attention& a);

// splits: parts that the keys of every head are cut into; 0: as many as keep the threads busy. Results differ by rounding only, and are
// the same bit by bit for the same arguments and threads.
void attention_few(const Attention& a, int64_t splits = 0);

}  // namespace fastseq::cpu
