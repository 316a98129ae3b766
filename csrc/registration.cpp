// Every op of the library, and nothing else. fastseq/ops/ gives them gradients, fake kernels and names in Python.
#include <torch/csrc/stable/library.h>

#include "common/build.h"
#include "common/device.h"
#include "cpu/recurrent.h"

STABLE_TORCH_LIBRARY(fastseq_native, m) {
  m.def("version() -> str");
  m.def("architectures() -> str[]");
  m.def("cuda_versions() -> int[]");
  m.def("cuda_obstacle(int device) -> str");
  m.def("cuda_image(int device) -> int[]");
  m.def("cuda_stream_lent() -> bool");
  m.def("cpu_level() -> str");
  m.def(
      "recurrent_forward(Tensor? x, Tensor? w_ih, Tensor? b_ih, Tensor? x_gates, Tensor? h_gates, Tensor weight, Tensor? vectors, "
      "Tensor? projection, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, str cell, "
      "int reverse, float zoneout_h, float zoneout_c, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) c, "
      "Tensor(e!) gates) -> ()");
  m.def(
      "recurrent_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor weight, Tensor? vectors, Tensor? projection, "
      "Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? batch_sizes, Tensor? hold_h, Tensor? hold_c, Tensor y, Tensor c, "
      "Tensor gates, str cell, int reverse, float zoneout_h, float zoneout_c, bool through_weights, Tensor(a!) dgates, "
      "Tensor(b!) drecurrent, Tensor(c!) doutput, Tensor(d!) dh0, Tensor(e!) dc0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&fastseq::cpu::recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&fastseq::cpu::recurrent_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq_native, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&fastseq::version));
  m.impl("architectures", TORCH_BOX(&fastseq::architectures));
  m.impl("cuda_versions", TORCH_BOX(&fastseq::cuda_versions));
  m.impl("cuda_obstacle", TORCH_BOX(&fastseq::cuda_obstacle));
  m.impl("cuda_image", TORCH_BOX(&fastseq::cuda_image));
  m.impl("cuda_stream_lent", TORCH_BOX(&fastseq::cuda_stream_lent));
  m.impl("cpu_level", TORCH_BOX(&fastseq::cpu::cpu_level));
}
