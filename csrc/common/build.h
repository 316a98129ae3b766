// What this binary is: its version and the processors that it was compiled for.
#pragma once

#include <string>
#include <vector>

namespace fastseq {

// The version of the package that this library was built from.
std::string version();

// CPU levels ("default", "avx2", "avx512"), then CUDA architectures ("sm_90a" machine code, "compute_120" PTX).
std::vector<std::string> architectures();

} // namespace fastseq
