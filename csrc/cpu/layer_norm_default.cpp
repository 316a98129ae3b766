// The loops of layer norm for the baseline instruction set. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_default
#define FASTSEQ_VECTOR_BYTES 16
#include "layer_norm.inl"

namespace fastseq::cpu {
const LayerNormKernels& layer_norm_default() { return level_default::kLayerNormKernels; }
}  // namespace fastseq::cpu
