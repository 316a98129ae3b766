// First-order linear recurrences; tensors as in fastseq/ops/scan.py, complex numbers as pairs of real ones.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace fastseq::cpu {

using torch::stable::Tensor;

// kind: "real", "complex" or "blocks"; cell: "given", "log" or "min_gru".
void scan_forward(Tensor b, Tensor a, std::optional<Tensor> initial, std::optional<Tensor> resets, std::optional<Tensor> lengths,
                  std::optional<Tensor> cu_seqlens, std::string kind, std::string cell, bool reverse, Tensor h, Tensor final);

// db and da are written where given; da has one step if a has.
void scan_backward(std::optional<Tensor> dh, std::optional<Tensor> dfinal, std::optional<Tensor> b, Tensor a, Tensor h, std::optional<Tensor> initial,
                   std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> cu_seqlens, std::string kind,
                   std::string cell, bool reverse, std::optional<Tensor> db, std::optional<Tensor> da, Tensor dinitial);

}  // namespace fastseq::cpu
