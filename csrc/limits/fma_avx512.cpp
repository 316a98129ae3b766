// The multiply-add loops for AVX-512 (F, BW, DQ, VL). CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx512
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#include "fma.inl"

namespace fastseq::limits {
const FmaKernels& fma_avx512() { return level_avx512::kKernels; }
}  // namespace fastseq::limits
