#include "kernels.cuh"

namespace fastseq::recurrent {

template Kernel<ForwardParams> kernel_of<Precision::kFloat, ForwardParams>(Cell, const Plan&, bool);
template Kernel<BackwardParams> kernel_of<Precision::kFloat, BackwardParams>(Cell, const Plan&, bool);

}  // namespace fastseq::recurrent
