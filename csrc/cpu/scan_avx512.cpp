// The loops of a scan for AVX-512 (F, BW, DQ, VL). CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx512
#define FASTSEQ_VECTOR_BYTES 64
#include "scan_kernel.inl"

namespace fastseq::cpu {
const ScanKernels& scan_avx512() { return level_avx512::kScanKernels; }
}  // namespace fastseq::cpu
