// The loops of a scan for AVX2 with FMA and F16C. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx2
#define FASTSEQ_VECTOR_BYTES 32
#include "scan_kernel.inl"

namespace fastseq::cpu {
const ScanKernels& scan_avx2() { return level_avx2::kScanKernels; }
}  // namespace fastseq::cpu
