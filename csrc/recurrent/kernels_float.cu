#include "kernels.cuh"

namespace fastseq::recurrent {

template Kernel<ForwardParams> kernel_of<Precision::kFloat, ForwardParams>(Cell, const Plan&);
template Kernel<BackwardParams> kernel_of<Precision::kFloat, BackwardParams>(Cell, const Plan&);

}  // namespace fastseq::recurrent
