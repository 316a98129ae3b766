// First-order linear recurrences; tensors as in fastseq/ops/scan.py, complex numbers as pairs of real ones.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace fastseq::cpu {

using torch::stable::Tensor;

// kind: "real", "complex" or "blocks"; cell: a name of kScanCells.
void scan_forward(Tensor b, Tensor a, std::optional<Tensor> gate, std::optional<Tensor> vector, std::optional<Tensor> initial,
                  std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> cu_seqlens, std::string kind,
                  std::string cell, bool reverse, Tensor h, Tensor final);

// db, da, dgate and dvector [B, C] are written where given; da has one step if a has.
void scan_backward(std::optional<Tensor> dh, std::optional<Tensor> dfinal, std::optional<Tensor> b, Tensor a, std::optional<Tensor> gate,
                   std::optional<Tensor> vector, Tensor h, std::optional<Tensor> initial, std::optional<Tensor> resets,
                   std::optional<Tensor> lengths, std::optional<Tensor> cu_seqlens, std::string kind, std::string cell, bool reverse,
                   std::optional<Tensor> db, std::optional<Tensor> da, std::optional<Tensor> dgate, std::optional<Tensor> dvector,
                   Tensor dinitial);

}  // namespace fastseq::cpu
