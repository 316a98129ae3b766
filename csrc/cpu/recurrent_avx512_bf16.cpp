// The recurrent kernels that multiply pairs of bfloat16 by AVX512-BF16, beside AVX-512 (F, BW, DQ, VL). CMakeLists.txt gives this file its
// flags.
#define FASTSEQ_LEVEL level_avx512_bf16
#define FASTSEQ_LEVEL_NAME "avx512_bf16"
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#define FASTSEQ_PAIRS
#include "recurrent_kernel.inl"

namespace fastseq::cpu {
const Kernels& kernels_avx512_bf16() { return level_avx512_bf16::kKernels; }
}  // namespace fastseq::cpu
