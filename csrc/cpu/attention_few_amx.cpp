// Attention of few rows of bfloat16 by AMX tiles. CMakeLists.txt gives this file its flags; the tile instructions are assembly and need
// none.
#define FASTSEQ_LEVEL level_amx
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#define FASTSEQ_TILES
#include "attention_few.inl"

namespace fastseq::cpu {
const FewKernels& few_amx() { return level_amx::kFewKernels; }
}  // namespace fastseq::cpu
