// The attention kernels for AVX2 with FMA and F16C. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx2
#define FASTSEQ_VECTOR_BYTES 32
#define FASTSEQ_VECTOR_REGISTERS 16
#include "attention_kernel.inl"

namespace fastseq::cpu {
const AttentionKernels& attention_kernels_avx2() { return level_avx2::kAttentionKernels; }
}  // namespace fastseq::cpu
