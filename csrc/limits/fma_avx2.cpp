// The multiply-add loops for AVX2 and FMA. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx2
#define FASTSEQ_VECTOR_BYTES 32
#define FASTSEQ_VECTOR_REGISTERS 16
#include "fma.inl"

namespace fastseq::limits {
const FmaKernels& fma_avx2() { return level_avx2::kKernels; }
}  // namespace fastseq::limits
