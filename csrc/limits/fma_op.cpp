#include "fma_op.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "../cpu/level.h"
#include "fma.h"

namespace fastseq::limits {
namespace {

using torch::headeronly::ScalarType;

// Of the instruction set that the recurrent kernels use.
const FmaKernels& kernels() {
#if defined(__x86_64__)
  const cpu::Level level = cpu::level();
  if (level >= cpu::Level::kAvx512) return fma_avx512();
  if (level == cpu::Level::kAvx2) return fma_avx2();
#endif
  return fma_default();
}

template <class A>
void run(FmaLoop<A> loop, const Tensor& start, double factor, double addend, int64_t steps, const Tensor& results) {
  const auto* from = static_cast<const A*>(start.const_data_ptr());
  auto* to = static_cast<A*>(results.mutable_data_ptr());
  const int64_t count = start.size(1);
  torch::stable::parallel_for(0, start.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      loop(from + part * count, static_cast<A>(factor), static_cast<A>(addend), steps, count, to + part * count);
  });
}

}  // namespace

void fma_cpu(Tensor start, double factor, double addend, int64_t steps, Tensor results) {
  const ScalarType type = start.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "fma: start must be float32 or float64");
  STD_TORCH_CHECK(start.dim() == 2 && results.dim() == 2 && start.size(0) == results.size(0) && start.size(1) == results.size(1) &&
                      results.scalar_type() == type && start.is_contiguous() && results.is_contiguous(),
                  "fma: start and results must be contiguous [parts, count] tensors of one shape and dtype");
  STD_TORCH_CHECK(steps >= 0, "fma: steps must not be negative, got ", steps);
  const FmaKernels& kernel = kernels();
  const int64_t bytes = start.size(1) * (type == ScalarType::Double ? 8 : 4);
  STD_TORCH_CHECK(bytes % kernel.bytes == 0, "fma: a part must be a multiple of ", kernel.bytes, " bytes, got ", bytes);
  if (start.numel() == 0) return;
  if (type == ScalarType::Double)
    run(kernel.of_double, start, factor, addend, steps, results);
  else
    run(kernel.of_float, start, factor, addend, steps, results);
}

}  // namespace fastseq::limits
