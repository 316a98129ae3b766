#include <torch/headeronly/util/Exception.h>

#include "plan.h"
#include "recurrent.h"

namespace fastseq::recurrent {

std::vector<std::string> recurrent_plan_fields() { return plan_fields(); }

std::tuple<std::string, double, std::vector<int64_t>, int64_t> recurrent_plan(std::string cell, std::string precision, bool backward,
                                                                              int64_t batch, int64_t lanes, int64_t hidden,
                                                                              std::vector<int64_t> device, int64_t rank) {
  Problem problem{};
  STD_TORCH_CHECK(find(cell, problem.cell), "there is no CUDA kernel for cell ", cell);
  STD_TORCH_CHECK(find(precision, problem.precision), "precision ", precision, " is none of fp16, bf16, tf32, ieee");
  STD_TORCH_CHECK(batch > 0 && lanes > 0 && hidden > 0 && batch * lanes * hidden <= INT32_MAX && device.size() == 4,
                  "recurrent_plan: sizes must be positive and fit 31 bits, and a device has 4 numbers");
  problem.backward = backward, problem.batch = batch, problem.lanes = lanes, problem.hidden = hidden;
  const auto number = [&](int i) { return static_cast<int32_t>(device[i]); };
  const std::vector<Plan> found = plans(problem, {number(0), number(1), number(2), device[3] != 0});
  const auto count = static_cast<int64_t>(found.size());
  STD_TORCH_CHECK(rank >= 0 && rank < count, "recurrent_plan: rank must be from 0 to ", count - 1, ", got ", rank);
  const Plan& p = found[rank];
  return {p.obstacle, p.step_us, numbers_of(p), count};
}

}  // namespace fastseq::recurrent
