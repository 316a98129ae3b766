#include "instances.cuh"

namespace fastseq::recurrent {

template const char* launch<Precision::kBfloat16>(Cell, bool, const gpu::Launch&, const ForwardParams&);
template const char* launch<Precision::kBfloat16>(Cell, bool, const gpu::Launch&, const BackwardParams&);

}  // namespace fastseq::recurrent
