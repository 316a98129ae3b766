// The types of elements in memory that the CPU kernels know.
#pragma once

namespace fastseq::cpu {

enum class Type { kFloat, kDouble, kBfloat16, kHalf };

}  // namespace fastseq::cpu
