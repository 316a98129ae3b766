// Single steps for AVX2 and FMA. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx2
#define FASTSEQ_VECTOR_BYTES 32
#define FASTSEQ_VECTOR_REGISTERS 16
#include "recurrent_step.inl"

namespace fastseq::cpu {
const StepKernels& step_kernels_avx2() { return level_avx2::kStepKernels; }
}  // namespace fastseq::cpu
