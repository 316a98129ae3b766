// The recurrent kernels for the machine's baseline. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_default
#define FASTSEQ_LEVEL_NAME "default"
#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_VECTOR_REGISTERS 16
#include "recurrent_kernel.inl"

namespace fastseq::cpu {
const Kernels& kernels_default() { return level_default::kKernels; }
}  // namespace fastseq::cpu
