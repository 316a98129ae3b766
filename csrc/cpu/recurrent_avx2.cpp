// The recurrent kernels for AVX2 and FMA. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx2
#define FASTSEQ_LEVEL_NAME "avx2"
#define FASTSEQ_VECTOR_BYTES 32
#define FASTSEQ_VECTOR_REGISTERS 16
#include "recurrent_kernel.inl"

namespace fastseq::cpu {
const Kernels& kernels_avx2() { return level_avx2::kKernels; }
}  // namespace fastseq::cpu
