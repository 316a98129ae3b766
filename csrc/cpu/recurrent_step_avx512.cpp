// Single steps for AVX-512 (F, BW, DQ, VL). CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx512
#define FASTSEQ_VECTOR_BYTES 64
#define FASTSEQ_VECTOR_REGISTERS 32
#include "recurrent_step.inl"

namespace fastseq::cpu {
const StepKernels& step_kernels_avx512() { return level_avx512::kStepKernels; }
}  // namespace fastseq::cpu
