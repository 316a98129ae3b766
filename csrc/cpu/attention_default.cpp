// The attention kernels for the instructions that every processor has. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_default
#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_VECTOR_REGISTERS 16
#include "attention_kernel.inl"

namespace fastseq::cpu {
const AttentionKernels& attention_kernels_default() { return level_default::kAttentionKernels; }
}  // namespace fastseq::cpu
