// Attention of few rows for AVX-512 (F, BW, DQ, VL). CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx512
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#include "attention_few.inl"

namespace fastseq::cpu {
const FewKernels& few_avx512() { return level_avx512::kFewKernels; }
}  // namespace fastseq::cpu
