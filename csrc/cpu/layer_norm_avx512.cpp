// The loops of layer norm for AVX-512. CMakeLists.txt gives this file its flags.
#define FASTSEQ_LEVEL level_avx512
#define FASTSEQ_VECTOR_BYTES 64
#include "layer_norm.inl"

namespace fastseq::cpu {
const LayerNormKernels& layer_norm_avx512() { return level_avx512::kLayerNormKernels; }
}  // namespace fastseq::cpu
