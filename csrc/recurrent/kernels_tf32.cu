#include "kernels.cuh"

namespace fastseq::recurrent {

template Kernel<ForwardParams> kernel_of<Precision::kTf32, ForwardParams>(Cell, const Plan&);
template Kernel<BackwardParams> kernel_of<Precision::kTf32, BackwardParams>(Cell, const Plan&);

}  // namespace fastseq::recurrent
