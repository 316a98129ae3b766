#include "kernels.cuh"

namespace fastseq::recurrent {

template Kernel<ForwardParams> kernel_of<Precision::kBfloat16, ForwardParams>(Cell, const Plan&, bool);
template Kernel<BackwardParams> kernel_of<Precision::kBfloat16, BackwardParams>(Cell, const Plan&, bool);

}  // namespace fastseq::recurrent
