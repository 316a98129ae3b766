// The attention kernels for AVX-512 (F, BW, DQ, VL). CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx512
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#include "attention_kernel.inl"

namespace fastseq::cpu {
const AttentionKernels& attention_kernels_avx512() { return level_avx512::kAttentionKernels; }
}  // namespace fastseq::cpu
