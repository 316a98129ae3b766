#include <torch/headeronly/util/Exception.h>

#include "common/on_device.h"
#include "common/stream.h"
#include "recurrent.h"
#include "run.cuh"

namespace fastseq::recurrent {
namespace {

using torch::headeronly::ScalarType;

// Checks what the kernels rely on; the Python side of the op sees to it, a caller of the raw op may not.
class Arguments {
 public:
  Arguments(const std::string& cell, const std::string& precision, const std::vector<int64_t>& plan, const Tensor& y,
            const std::optional<Tensor>& starts, const std::optional<Tensor>& lengths, Walk sizes)
      : walk(sizes), device_(y.get_device_index()) {
    STD_TORCH_CHECK(find(cell, cell_), "there is no CUDA kernel for cell ", cell);
    STD_TORCH_CHECK(find(precision, precision_), "precision ", precision, " is none of fp16, bf16, tf32, ieee");
    STD_TORCH_CHECK(plan.size() == kPlanFields, "recurrent: a plan has ", kPlanFields, " fields, got ", plan.size());
    plan_ = plan_of(plan);
    facts = facts_of(cell_);
    narrow = precision_ == Precision::kHalf       ? ScalarType::Half
             : precision_ == Precision::kBfloat16 ? ScalarType::BFloat16
                                                  : ScalarType::Float;
    units = int64_t{walk.lanes} * walk.hidden, states = walk.batch * units;
    all = units ? y.numel() / units * units : 0;
    walk.starts = take<int64_t>(starts, ScalarType::Long, walk.steps, "starts");
    walk.lengths = take<int64_t>(lengths, ScalarType::Long, walk.batch, "lengths");
    STD_TORCH_CHECK(walk.starts || all == walk.steps * states, "recurrent: y has ", y.numel(), " elements, not T x B x D x H");
  }

  Walk walk;
  CellFacts facts;
  ScalarType narrow;
  int64_t units, states, all;  // D H; of all sequences; of all rows

  // Null for none and for an empty one; `elements` if there is one.
  template <class T = void>
  T* take(const std::optional<Tensor>& tensor, ScalarType type, int64_t elements, const char* name) const {
    if (!tensor || tensor->numel() == 0) return nullptr;
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == device_, "recurrent: ", name, " is on another device");
    STD_TORCH_CHECK(tensor->scalar_type() == type, "recurrent: ", name, " has a wrong dtype");
    STD_TORCH_CHECK(tensor->numel() == elements, "recurrent: ", name, " must have ", elements, " elements, got ", tensor->numel());
    STD_TORCH_CHECK(tensor->is_contiguous(), "recurrent: ", name, " must be contiguous");
    return static_cast<T*>(tensor->mutable_data_ptr());
  }

  // The same, but it must be there.
  void* need(const Tensor& tensor, ScalarType type, int64_t elements, const char* name) const {
    STD_TORCH_CHECK(tensor.numel() == elements, "recurrent: ", name, " must have ", elements, " elements, got ", tensor.numel());
    return take(tensor, type, elements, name);
  }

  ExchangeBuffers buffers(const Tensor& operands, const Tensor& flags) const {
    return {take(operands, ScalarType::Byte, plan_.teams * plan_.operand_bytes, "operands"),
            take<uint32_t>(flags, ScalarType::Int, int64_t{plan_.teams} * plan_.split.ctas, "flags")};
  }

  Resets resets(const std::optional<Tensor>& rows, const std::optional<Tensor>& h, const std::optional<Tensor>& c, float* dh = nullptr,
                float* dc = nullptr) const {
    return {take<uint8_t>(rows, ScalarType::Byte, units ? all / units : 0, "resets"), take(h, narrow, states, "reset_h"),
            take<float>(c, ScalarType::Float, states * facts.states, "reset_c"), dh, dc};
  }

  template <class Params>
  void run_on_stream(const Params& params) const {
    if (walk.batch == 0 || walk.hidden == 0) return;
    void* stream = current_stream(device_);
    OnDevice guard(device_);
    STD_TORCH_CHECK(guard.status() == cudaSuccess, "cannot use device ", device_, ": ", cudaGetErrorString(guard.status()));
    const char* error = run(plan_, cell_, precision_, params, stream);
    STD_TORCH_CHECK(*error == 0, "recurrent: a CUDA kernel could not be launched: ", error);
  }

 private:
  int32_t device_;
  Cell cell_{};
  Precision precision_{};
  Plan plan_;
};

Walk sizes(int64_t steps, int64_t batch, int64_t lanes, int64_t hidden, int64_t reverse) {
  const auto small = [](int64_t n) { return n >= 0 && n <= INT32_MAX; };
  STD_TORCH_CHECK(small(steps) && small(batch) && small(lanes) && small(hidden), "recurrent: sizes must fit 31 bits");
  return {nullptr, nullptr, static_cast<int32_t>(steps), static_cast<int32_t>(batch), static_cast<int32_t>(lanes),
          static_cast<int32_t>(hidden), static_cast<uint64_t>(reverse)};
}

}  // namespace

void recurrent_cuda_forward(std::string cell, std::string precision, std::vector<int64_t> plan, Tensor x_gates, Tensor weight,
                            std::optional<Tensor> vectors, std::optional<Tensor> h0, std::optional<Tensor> c0, Tensor y, Tensor h_n,
                            Tensor c_n, Tensor c, Tensor gates, std::optional<Tensor> starts, std::optional<Tensor> lengths,
                            int64_t steps, int64_t batch, int64_t lanes, int64_t hidden, int64_t reverse, Tensor operands,
                            Tensor flags, std::optional<Tensor> resets, std::optional<Tensor> reset_h,
                            std::optional<Tensor> reset_c) {
  const Arguments a(cell, precision, plan, y, starts, lengths, sizes(steps, batch, lanes, hidden, reverse));
  const CellFacts facts = a.facts;
  const ScalarType narrow = a.narrow, wide = ScalarType::Float;
  a.run_on_stream(ForwardParams{
      a.need(x_gates, narrow, a.all * facts.gates, "x_gates"), a.need(weight, narrow, a.units * facts.gates * hidden, "weight"),
      a.take(vectors, narrow, a.units * facts.vectors, "vectors"), a.take(h0, narrow, a.states, "h0"),
      a.take<float>(c0, wide, a.states * facts.states, "c0"), a.need(y, narrow, a.all, "y"), a.need(h_n, narrow, a.states, "h_n"),
      a.take<float>(c_n, wide, a.states * facts.states, "c_n"), a.take<float>(c, wide, a.all * facts.states, "c"),
      a.take(gates, narrow, a.all * facts.saved, "gates"), a.walk, {}, a.buffers(operands, flags),
      a.resets(resets, reset_h, reset_c)});
}

void recurrent_cuda_backward(std::string cell, std::string precision, std::vector<int64_t> plan, std::optional<Tensor> dy,
                             std::optional<Tensor> dh_n, std::optional<Tensor> dc_n, std::optional<Tensor> dc, Tensor weight,
                             std::optional<Tensor> vectors, std::optional<Tensor> h0, std::optional<Tensor> c0, Tensor y, Tensor c,
                             Tensor gates, Tensor dgates, Tensor drecurrent, Tensor dh0, Tensor dc0, std::optional<Tensor> starts,
                             std::optional<Tensor> lengths, int64_t steps, int64_t batch, int64_t lanes, int64_t hidden,
                             int64_t reverse, Tensor operands, Tensor flags, std::optional<Tensor> resets,
                             std::optional<Tensor> reset_h, std::optional<Tensor> reset_c, Tensor dreset_h, Tensor dreset_c) {
  const Arguments a(cell, precision, plan, y, starts, lengths, sizes(steps, batch, lanes, hidden, reverse));
  const CellFacts facts = a.facts;
  const ScalarType narrow = a.narrow, wide = ScalarType::Float;
  a.run_on_stream(BackwardParams{
      a.take(dy, narrow, a.all, "dy"), a.take(dh_n, narrow, a.states, "dh_n"),
      a.take<float>(dc_n, wide, a.states * facts.states, "dc_n"), a.take<float>(dc, wide, a.all * facts.states, "dc"),
      a.need(weight, narrow, a.units * facts.gates * hidden, "weight"), a.take(vectors, narrow, a.units * facts.vectors, "vectors"),
      a.take(h0, narrow, a.states, "h0"), a.take<float>(c0, wide, a.states * facts.states, "c0"), a.need(y, narrow, a.all, "y"),
      a.take<float>(c, wide, a.all * facts.states, "c"), a.take(gates, narrow, a.all * facts.saved, "gates"),
      a.need(dgates, narrow, a.all * facts.gates, "dgates"),
      a.take(drecurrent, narrow, a.all * facts.own_recurrent, "drecurrent"), a.need(dh0, narrow, a.states, "dh0"),
      a.take<float>(dc0, wide, a.states * facts.states, "dc0"), a.walk, {}, a.buffers(operands, flags),
      a.resets(resets, reset_h, reset_c, a.take<float>(dreset_h, wide, a.states, "dreset_h"),
               a.take<float>(dreset_c, wide, a.states * facts.states, "dreset_c"))});
}

}  // namespace fastseq::recurrent
