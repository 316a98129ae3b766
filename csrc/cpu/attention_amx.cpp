// The attention kernels that multiply by AMX tiles, bfloat16, beside AVX-512 (F, BW, DQ, VL, BF16). CMakeLists.txt gives this file its
// flags; the tile instructions are assembly and need none.
#define FASTSEQ_LEVEL level_amx
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#define FASTSEQ_TILES
#include "attention_kernel.inl"

namespace fastseq::cpu {
const AttentionKernels& attention_kernels_amx() { return level_amx::kAttentionKernels; }
}  // namespace fastseq::cpu
