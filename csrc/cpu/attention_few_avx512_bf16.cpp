// Attention of few rows of bfloat16, pairs of which are multiplied in vectors: AVX-512 (F, BW, DQ, VL, BF16). CMakeLists.txt gives this file
// its flags.
#define FASTSEQ_LEVEL level_avx512_bf16
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#include "attention_few.inl"

namespace fastseq::cpu {
const FewKernels& few_avx512_bf16() { return level_avx512_bf16::kFewKernels; }
}  // namespace fastseq::cpu
