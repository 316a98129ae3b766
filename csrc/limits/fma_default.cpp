// The multiply-add loops for the machine's baseline. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_default
#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_VECTOR_REGISTERS 16
#include "fma.inl"

namespace fastseq::limits {
const FmaKernels& fma_default() { return level_default::kKernels; }
}  // namespace fastseq::limits
