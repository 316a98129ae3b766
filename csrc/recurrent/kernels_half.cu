#include "kernels.cuh"

namespace fastseq::recurrent {

template Kernel<ForwardParams> kernel_of<Precision::kHalf, ForwardParams>(Cell, const Plan&);
template Kernel<BackwardParams> kernel_of<Precision::kHalf, BackwardParams>(Cell, const Plan&);

}  // namespace fastseq::recurrent
