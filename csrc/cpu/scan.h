// First-order linear recurrences; tensors as in fastseq/ops/scan.py, complex numbers as pairs of real ones.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

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

// Layers that are a product and a scan, without gradients: x [T, B, I], [B, T, I] with batch_first; initial [L, B, H]; params: of each layer a
// weight [gates H, .], whose rows make a, a gate if there are three, and b, and its bias if there are biases. Returns the last layer's h and
// the final states [L, B, H]; nothing where a call is not of the plain kind, as those of attention_layers.h do.
std::vector<Tensor> scan_layers(Tensor x, std::optional<Tensor> initial, std::vector<Tensor> params, std::string cell, int64_t gates,
                                bool has_biases, bool batch_first);

}  // namespace fastseq::cpu
