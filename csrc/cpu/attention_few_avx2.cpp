// Attention of few rows for AVX2 and FMA. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx2
#define FASTSEQ_VECTOR_BYTES 32
#define FASTSEQ_VECTOR_REGISTERS 16
#include "attention_few.inl"

namespace fastseq::cpu {
const FewKernels& few_avx2() { return level_avx2::kFewKernels; }
}  // namespace fastseq::cpu
