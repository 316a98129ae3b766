// The loops of a scan for baseline code. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_default
#define FASTSEQ_VECTOR_BYTES 16
#include "scan_kernel.inl"

namespace fastseq::cpu {
const ScanKernels& scan_default() { return level_default::kScanKernels; }
}  // namespace fastseq::cpu
