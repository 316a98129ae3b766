// The loops of layer norm for AVX2 with FMA and F16C. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx2
#define FASTSEQ_VECTOR_BYTES 32
#include "layer_norm.inl"

namespace fastseq::cpu {
const LayerNormKernels& layer_norm_avx2() { return level_avx2::kLayerNormKernels; }
}  // namespace fastseq::cpu
