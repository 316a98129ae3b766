#include <torch/headeronly/util/Exception.h>

#include "plan.h"
#include "recurrent.h"

namespace fastseq::recurrent {

std::tuple<std::string, double, std::vector<int64_t>> recurrent_plan(std::string cell, std::string precision, bool backward,
                                                                     int64_t batch, int64_t lanes, int64_t hidden,
                                                                     std::vector<int64_t> device) {
  Problem problem{};
  STD_TORCH_CHECK(find(cell, problem.cell), "there is no CUDA kernel for cell ", cell);
  STD_TORCH_CHECK(find(precision, problem.precision), "precision ", precision, " is none of fp16, bf16, tf32, ieee");
  STD_TORCH_CHECK(batch > 0 && lanes > 0 && hidden > 0 && batch * lanes * hidden <= INT32_MAX && device.size() == 4,
                  "recurrent_plan: sizes must be positive and fit 31 bits, and a device has 4 numbers");
  problem.backward = backward, problem.batch = batch, problem.lanes = lanes, problem.hidden = hidden;
  const auto number = [&](int i) { return static_cast<int32_t>(device[i]); };
  const Plan p = plan(problem, {number(0), number(1), number(2), device[3] != 0});
  return {p.obstacle, p.step_us, numbers_of(p)};
}

}  // namespace fastseq::recurrent
