#include "kernels.cuh"

namespace fastseq::recurrent {

template Kernel<ForwardParams> kernel_of<Precision::kBfloat16, ForwardParams>(Cell, const Plan&);
template Kernel<BackwardParams> kernel_of<Precision::kBfloat16, BackwardParams>(Cell, const Plan&);

}  // namespace fastseq::recurrent
