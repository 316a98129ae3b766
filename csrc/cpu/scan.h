// First-order linear recurrences; tensors as in fastseq/ops/scan.py, complex numbers as pairs of real ones.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace fastseq::cpu {

using torch::stable::Tensor;

// kind: "real", "complex" or "blocks".
void scan_forward(Tensor b, Tensor a, std::optional<Tensor> initial, std::optional<Tensor> resets, std::optional<Tensor> lengths,
                  std::optional<Tensor> cu_seqlens, std::string kind, bool log, bool reverse, Tensor h, Tensor final);

// db and da are written where given; da has one step if a has.
void scan_backward(std::optional<Tensor> dh, std::optional<Tensor> dfinal, Tensor a, Tensor h, std::optional<Tensor> initial,
                   std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> cu_seqlens, std::string kind,
                   bool log, bool reverse, std::optional<Tensor> db, std::optional<Tensor> da, Tensor dinitial);

}  // namespace fastseq::cpu
