// Single steps for the baseline instruction set. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_default
#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_VECTOR_REGISTERS 16
#include "recurrent_step.inl"

namespace fastseq::cpu {
const StepKernels& step_kernels_default() { return level_default::kStepKernels; }
}  // namespace fastseq::cpu
