// The attention kernels for bfloat16 that multiply pairs of them in vectors: AVX-512 (F, BW, DQ, VL, BF16). CMakeLists.txt gives this file
// its flags.
#define FASTSEQ_LEVEL level_avx512_bf16
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#include "attention_kernel.inl"

namespace fastseq::cpu {
const AttentionKernels& attention_kernels_avx512_bf16() { return level_avx512_bf16::kAttentionKernels; }
}  // namespace fastseq::cpu
