// What the CUDA runtime in this library says about the machine. Every function answers without a GPU and without a driver.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastseq {

// {toolkit that compiled this, newest CUDA version the driver serves (0: no driver), devices}, versions as 1000 * major + 10 * minor.
// All zero in a library without CUDA.
std::vector<int64_t> cuda_versions();

// Why no CUDA kernel of this library can run on `device`; empty if they can.
std::string cuda_obstacle(int64_t device);

// {machine code, PTX} that the driver picked for `device`, as 10 * major + minor.
std::vector<int64_t> cuda_image(int64_t device);

// {multiprocessors, bytes of shared memory that a CTA may have, CTAs of a cluster that each have all of it (0: no clusters), whether
// launches can be cooperative}.
std::vector<int64_t> cuda_limits(int64_t device);

// Whether torch lends its current CUDA stream: true in a CUDA build of torch, false in a CPU build.
bool cuda_stream_lent();

} // namespace fastseq
