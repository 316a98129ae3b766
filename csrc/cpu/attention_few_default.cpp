// Attention of few rows for the machine's baseline. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_default
#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_VECTOR_REGISTERS 16
#include "attention_few.inl"

namespace fastseq::cpu {
const FewKernels& few_default() { return level_default::kFewKernels; }
}  // namespace fastseq::cpu
