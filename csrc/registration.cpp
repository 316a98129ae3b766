// Every op of the library, and nothing else. fastseq/ops/ gives them gradients, fake kernels and names in Python.
#include <torch/csrc/stable/library.h>

#include "common/build.h"
#include "common/device.h"
#include "cpu/level.h"
#include "cpu/recurrent.h"
#include "limits/exchange_op.h"
#include "limits/fma_op.h"
#include "recurrent/recurrent.h"

STABLE_TORCH_LIBRARY(fastseq_native, m) {
  m.def("version() -> str");
  m.def("architectures() -> str[]");
  m.def("cuda_versions() -> int[]");
  m.def("cuda_obstacle(int device) -> str");
  m.def("cuda_image(int device) -> int[]");
  m.def("cuda_stream_lent() -> bool");
  m.def("cpu_level() -> str");
  m.def("cpu_amx_obstacle() -> str");
  m.def("cuda_limits(int device) -> int[]");
  m.def("recurrent_plan_fields() -> str[]");
  m.def("recurrent_plan(str cell, str precision, bool backward, int batch, int lanes, int hidden, int[] device, "
        "int rank=0) -> (str, float, int[], int)");
  m.def(
      "recurrent_forward(Tensor? x, Tensor? w_ih, Tensor? b_ih, Tensor? x_gates, Tensor weight, Tensor? vectors, "
      "Tensor? projection, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, str cell, "
      "int reverse, float zoneout_h, float zoneout_c, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) c, "
      "Tensor(e!) gates) -> ()");
  m.def(
      "recurrent_layers(Tensor input, Tensor? h0, Tensor? c0, Tensor[] params, Tensor? lengths, Tensor? batch_sizes, str cell, "
      "int num_layers, bool has_biases, bool bidirectional, bool batch_first, float zoneout_h, float zoneout_c, Tensor[]? kept) -> "
      "Tensor[]");
  m.def(
      "recurrent_pack(Tensor[] params, str cell, int num_layers, bool has_biases, bool bidirectional, str weights) -> Tensor[]");
  m.def(
      "recurrent_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor weight, Tensor? vectors, Tensor? projection, "
      "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, Tensor y, Tensor c, "
      "Tensor gates, str cell, int reverse, float zoneout_h, float zoneout_c, bool through_weights, Tensor(a!) dgates, "
      "Tensor(b!) drecurrent, Tensor(c!) doutput, Tensor(d!) dh0, Tensor(e!) dc0) -> ()");
  m.def(
      "recurrent_gradients(Tensor x, Tensor dgates, Tensor drecurrent, Tensor y, Tensor? h0, Tensor? lengths, Tensor? batch_sizes, "
      "Tensor[] w_ih, int reverse, int[] wanted) -> Tensor[]");
  m.def(
      "recurrent_cuda_forward(str cell, str precision, int[] plan, Tensor x_gates, Tensor weight, Tensor? vectors, Tensor? h0, "
      "Tensor? c0, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) c, Tensor(e!) gates, Tensor? starts, Tensor? lengths, "
      "int steps, int batch, int lanes, int hidden, int reverse, Tensor(f!) operands, Tensor(g!) flags) -> ()");
  m.def(
      "recurrent_cuda_backward(str cell, str precision, int[] plan, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, "
      "Tensor weight, Tensor? vectors, Tensor? h0, Tensor? c0, Tensor y, Tensor c, Tensor gates, Tensor(a!) dgates, "
      "Tensor(b!) drecurrent, Tensor(c!) dh0, Tensor(d!) dc0, Tensor? starts, Tensor? lengths, int steps, int batch, int lanes, "
      "int hidden, int reverse, Tensor(e!) operands, Tensor(f!) flags) -> ()");
  // The benchmark suite `limits` measures the machine with these; no module and no function of fastseq calls them.
  m.def("fma(Tensor start, float factor, float addend, int steps, Tensor(a!) results) -> ()");
  m.def("exchange(str kind, int steps, int ctas, int vectors, Tensor(a!) flags, Tensor(b!) operands, Tensor(c!) results) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("fma", TORCH_BOX(&fastseq::limits::fma_cpu));
  m.impl("recurrent_forward", TORCH_BOX(&fastseq::cpu::recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&fastseq::cpu::recurrent_backward));
  m.impl("recurrent_gradients", TORCH_BOX(&fastseq::cpu::recurrent_gradients));
}

#if defined(FASTSEQ_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CUDA, m) {
  m.impl("exchange", TORCH_BOX(&fastseq::limits::exchange_cuda));
  m.impl("recurrent_cuda_forward", TORCH_BOX(&fastseq::recurrent::recurrent_cuda_forward));
  m.impl("recurrent_cuda_backward", TORCH_BOX(&fastseq::recurrent::recurrent_cuda_backward));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&fastseq::version));
  m.impl("architectures", TORCH_BOX(&fastseq::architectures));
  m.impl("cuda_versions", TORCH_BOX(&fastseq::cuda_versions));
  m.impl("cuda_obstacle", TORCH_BOX(&fastseq::cuda_obstacle));
  m.impl("cuda_image", TORCH_BOX(&fastseq::cuda_image));
  m.impl("cuda_stream_lent", TORCH_BOX(&fastseq::cuda_stream_lent));
  m.impl("cpu_level", TORCH_BOX(&fastseq::cpu::cpu_level));
  m.impl("cpu_amx_obstacle", TORCH_BOX(&fastseq::cpu::cpu_amx_obstacle));
  m.impl("recurrent_layers", TORCH_BOX(&fastseq::cpu::recurrent_layers));  // these decline what is not on the CPU
  m.impl("recurrent_pack", TORCH_BOX(&fastseq::cpu::recurrent_pack));
  m.impl("cuda_limits", TORCH_BOX(&fastseq::cuda_limits));
  m.impl("recurrent_plan_fields", TORCH_BOX(&fastseq::recurrent::recurrent_plan_fields));
  m.impl("recurrent_plan", TORCH_BOX(&fastseq::recurrent::recurrent_plan));
}
