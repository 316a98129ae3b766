// Kernels of the levels that a library for one machine (FASTSEQ_BUILD_LEVELS=native) goes without. level() never says one of these.
#include <cstdlib>

#include "../limits/fma.h"
#include "attention_few.h"
#include "attention_kernel.h"
#include "layer_norm.h"
#include "matrix_product.h"
#include "recurrent_kernel.h"
#include "recurrent_step.h"
#include "scan_kernel.h"

#define LEFT_OUT_PRODUCTS(level)                                                     \
  namespace fastseq::cpu {                                                           \
  const Kernels& kernels_##level() { std::abort(); }                                 \
  const AttentionKernels& attention_kernels_##level() { std::abort(); }              \
  const FewKernels& few_##level() { std::abort(); }                                  \
  }
#define LEFT_OUT(level)                                                              \
  LEFT_OUT_PRODUCTS(level)                                                           \
  namespace fastseq::cpu {                                                           \
  const LayerNormKernels& layer_norm_##level() { std::abort(); }                     \
  const ScanKernels& scan_##level() { std::abort(); }                                \
  const StepKernels& step_kernels_##level() { std::abort(); }                        \
  }                                                                                  \
  namespace fastseq::limits {                                                        \
  const FmaKernels& fma_##level() { std::abort(); }                                  \
  }

#if defined(FASTSEQ_WITHOUT_default)
LEFT_OUT(default)
#endif
#if defined(FASTSEQ_WITHOUT_avx2)
LEFT_OUT(avx2)
#endif
#if defined(FASTSEQ_WITHOUT_avx512)
LEFT_OUT(avx512)
#endif
#if defined(FASTSEQ_WITHOUT_avx512_bf16)
LEFT_OUT_PRODUCTS(avx512_bf16)
namespace fastseq::cpu {
const MatrixKernels& matrix_kernels_avx512_bf16() { std::abort(); }
}
#endif
#if defined(FASTSEQ_WITHOUT_amx)
LEFT_OUT_PRODUCTS(amx)
namespace fastseq::cpu {
const MatrixKernels& matrix_kernels_amx() { std::abort(); }
}
#endif
