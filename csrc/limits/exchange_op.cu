#include "exchange_op.h"

#include <torch/headeronly/util/Exception.h>

#include "common/on_device.h"
#include "common/stream.h"
#include "exchange.h"

namespace fastseq::limits {

void exchange_cuda(std::string kind, int64_t steps, int64_t ctas, int64_t vectors, Tensor flags, Tensor operands, Tensor results) {
  STD_TORCH_CHECK(steps > 0 && steps <= INT32_MAX && ctas > 0 && ctas <= 1 << 16 && vectors > 0 && vectors <= 1 << 16,
                  "exchange: steps, ctas and vectors must be positive and small");
  const auto fits = [](const Tensor& tensor, int64_t bytes) {
    return tensor.is_cuda() && tensor.is_contiguous() && tensor.numel() * static_cast<int64_t>(tensor.element_size()) >= bytes;
  };
  STD_TORCH_CHECK(fits(flags, 4 * ctas) && fits(results, 4 * ctas) && fits(operands, 32 * ctas * vectors),
                  "exchange: flags, results or operands are too small, or not on a GPU");
  const int32_t device = flags.get_device_index();
  void* stream = current_stream(device);
  OnDevice guard(device);
  STD_TORCH_CHECK(guard.status() == cudaSuccess, "cannot use device ", device, ": ", cudaGetErrorString(guard.status()));
  const ExchangeParams params{static_cast<uint32_t*>(flags.mutable_data_ptr()), operands.mutable_data_ptr(),
                              static_cast<uint32_t*>(results.mutable_data_ptr()), static_cast<int32_t>(steps),
                              static_cast<int32_t>(ctas), static_cast<int32_t>(vectors)};
  const char* error = exchange(kind, params, stream);
  STD_TORCH_CHECK(*error == 0, "exchange: ", kind, " could not be launched: ", error);
}

}  // namespace fastseq::limits
