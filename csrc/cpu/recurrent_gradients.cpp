// Gradients of a layer's input and weights: products of whole matrices over the rows of its sequences.

#include <deque>
#include <initializer_list>

#include "layer_norm.h"
#include "matrix_product.h"
#include "recurrent_run.h"

namespace fastseq::cpu {
namespace {

using Pointers = std::vector<const void*>;

// Rows `stride` bytes apart; or those of them that `places` tells.
MatrixRows rows_of(const void* from, int64_t stride, const std::vector<int64_t>* places, Pointers& pointers) {
  if (!places) return {from, stride, nullptr};
  for (int64_t row : *places) pointers.push_back(offset(from, row * stride));
  return {nullptr, 0, pointers.data()};
}

// x as rows: where its last dimension lies in sequence, as it is.
MatrixRows rows_of(const Tensor& x, const std::vector<int64_t>* places, Pointers& pointers, int64_t bytes) {
  if (x.is_contiguous()) return rows_of(data(x), x.size(x.dim() - 1) * bytes, places, pointers);
  const int64_t of_step = x.dim() == 3 ? x.size(1) : 1, rows = places ? places->size() : x.size(0) * of_step;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = places ? (*places)[i] : i, slot = row % of_step;
    pointers.push_back(offset(x.const_data_ptr(), (row / of_step * x.stride(0) + (slot ? slot * x.stride(1) : 0)) * bytes));
  }
  return {nullptr, 0, pointers.data()};
}

}  // namespace

std::vector<Tensor> recurrent_gradients(Tensor x, Tensor dgates, Tensor drecurrent, Tensor y, std::optional<Tensor> h0,
                                        std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::optional<Tensor> resets,
                                        std::optional<Tensor> reset_h, std::vector<Tensor> w_ih, int64_t reverse,
                                        std::vector<int64_t> wanted, bool two_parts) {
  const ScalarType narrow = y.scalar_type();
  const int64_t D = wanted.size(), I = x.size(x.dim() - 1), P = y.size(y.dim() - 1), GH = dgates.size(dgates.dim() - 1);
  const Type type = type_of(narrow);
  const MatrixKernels* kernels = matrix_kernels(type);
  if (!kernels || !x.numel() || !y.numel()) return {};
  const int64_t bytes = bytes_of(type), rows = x.numel() / I, own = drecurrent.numel() / (rows * D), main = GH - own;
  const auto dense = [](Tensor& tensor) {
    if (tensor.stride(tensor.dim() - 1) != 1) tensor = torch::stable::contiguous(tensor);
  };
  dense(x);
  expect(x, narrow, rows * I, "x", false), expect(y, narrow, rows * D * P, "y"), expect(dgates, narrow, rows * D * GH, "dgates");
  expect(drecurrent, narrow, rows * D * own, "drecurrent");
  const int64_t batch = batch_sizes ? integers(batch_sizes)[0] : y.size(1);
  expect(h0, narrow, D * batch * P, "h0"), expect(lengths, ScalarType::Long, batch, "lengths");
  expect(resets, ScalarType::Bool, rows, "resets"), expect(reset_h, narrow, D * batch * P, "reset_h");
  STD_TORCH_CHECK(w_ih.empty() || static_cast<int64_t>(w_ih.size()) == D, "recurrent: w_ih must be given for every lane or none");
  for (Tensor& weight : w_ih) dense(weight), expect(weight, narrow, GH * I, "w_ih", false);

  enum { kInputWeight = 1, kRecurrentWeight = 2, kInputBias = 4, kRecurrentBias = 8, kInput = 16 };
  std::vector<Tensor> results;
  std::vector<MatrixProduct> products;
  std::deque<Pointers> pointers;  // what a product refers to stays where it is
  const auto fresh = [&]() -> Pointers& { return pointers.emplace_back(); };
  const auto made = [&](bool wants, std::initializer_list<int64_t> sizes) -> char* {
    if (!wants) return nullptr;
    results.push_back(torch::stable::new_empty(y, sizes));
    return static_cast<char*>(mutable_data(results.back()));
  };
  const int64_t steps = batch_sizes ? batch_sizes->size(0) : y.size(0);
  const Sequences sequences(steps, batch, integers(lengths), integers(batch_sizes), flags(resets));
  // with lengths, the rows within them: the others have no share in the sums, whatever x holds there
  std::vector<int64_t> within;
  if (lengths) sequences.each(false, [&](int64_t row, int64_t, int64_t) { within.push_back(row); });
  const std::vector<int64_t>* places = lengths ? &within : nullptr;
  const int64_t depth = lengths ? within.size() : rows;
  if (!depth) return {};
  const MatrixRows of_x = rows_of(x, places, fresh(), bytes);
  if (wanted[0] & kInput) {
    const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    results.push_back(torch::stable::new_empty(y, sizes));
    Pointers& weights = fresh();
    for (const Tensor& weight : w_ih)
      for (int64_t g = 0; g < GH; ++g) weights.push_back(offset(data(weight), g * weight.stride(0) * bytes));
    products.push_back({type, rows, D * GH, {data(dgates), D * GH * bytes, nullptr}, false,
                        {{{nullptr, 0, weights.data()}, I, mutable_data(results.back()), I * bytes}}, 1, two_parts});
  }

  const Buffer zeros(P * bytes);
  std::memset(zeros.get(), 0, P * bytes);
  constexpr float kOne = 1;
  constexpr uint16_t kShortOne = 0x3f80;
  const MatrixRows ones{narrow == ScalarType::Float ? static_cast<const void*>(&kOne) : &kShortOne, 0, nullptr};
  struct Copy {
    void* to;
    const void* from;
    int64_t bytes;
  };
  std::vector<Copy> copies;
  for (int64_t d = 0; d < D; ++d) {
    const int64_t wants = wanted[d];
    char* dw_ih = made(wants & kInputWeight, {GH, I});
    char* dw_hh = made(wants & kRecurrentWeight, {GH, P});
    char* db_ih = made(wants & kInputBias, {GH});
    char* db_hh = made(wants & kRecurrentBias, {GH});
    MatrixRows of_h{};
    if (dw_hh) {
      Pointers& states = fresh();
      const void* own = offset(data(y), d * P * bytes);
      sequences.each((reverse >> d) & 1, [&](int64_t, int64_t before, int64_t slot) {
        const void* given = data(before == Sequences::kAnew ? reset_h : h0);
        states.push_back(before >= 0 ? offset(own, before * D * P * bytes)
                         : given     ? offset(given, (d * batch + slot) * P * bytes)
                                     : zeros.get());
      });
      of_h.rows = states.data();
    }
    // gates from `first` on of a tensor of all lanes, with what they are multiplied by
    const auto add = [&](const Tensor& gates, int64_t column, int64_t width, int64_t first, char* of_input, char* of_state, char* of_bias) {
      if (!width || (!of_input && !of_state && !of_bias)) return;
      const int64_t all = gates.size(gates.dim() - 1);
      const MatrixRows left = rows_of(offset(data(gates), (d * all + column) * bytes), D * all * bytes, places, fresh());
      MatrixProduct product{type, width, depth, left, true, {}, 0, two_parts};
      if (of_input) product.right[product.count++] = {of_x, I, of_input + first * I * bytes, I * bytes};
      if (of_state) product.right[product.count++] = {of_h, P, of_state + first * P * bytes, P * bytes};
      if (of_bias) product.right[product.count++] = {ones, 1, of_bias + first * bytes, bytes};
      products.push_back(product);
    };
    add(dgates, 0, main, 0, dw_ih, dw_hh, db_ih ? db_ih : db_hh);
    add(dgates, main, own, main, dw_ih, nullptr, db_ih);
    add(drecurrent, 0, own, main, nullptr, dw_hh, db_hh);
    if (db_ih && db_hh) copies.push_back({db_hh, db_ih, main * bytes});
  }
  if (!multiply(*kernels, products)) return {};
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  return results;
}

Tensor recurrent_norm_gradients(Tensor dgates, Tensor gates, std::optional<Tensor> dm, std::optional<Tensor> c, Tensor vectors,
                                std::string cell) {
  const bool lstm = cell == "layer_norm_lstm";
  STD_TORCH_CHECK(lstm || cell == "layer_norm_gru", "recurrent: cell ", cell, " is none of layer_norm_lstm, layer_norm_gru");
  const ScalarType narrow = gates.scalar_type();
  const Type type = type_of(narrow);
  const ScalarType wide = type == Type::kDouble ? ScalarType::Double : ScalarType::Float;
  const int64_t G = lstm ? 4 : 3, V = kNormVectors[lstm], H = vectors.numel() / V, rows = gates.size(0), bytes = wide_bytes(type);
  expect(vectors, wide, V * H, "vectors");
  STD_TORCH_CHECK(lstm == dm.has_value() && lstm == c.has_value(), "recurrent: dm and c are given of an LSTM, and only of one");
  const auto of = [&](const Tensor& tensor, ScalarType dtype, int64_t columns, const char* name) {
    expect(tensor, dtype, rows * columns, name, false);
    STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) == 1 || tensor.stride(1) == 1), "recurrent: ", name, " must be rows");
    return NormVectors::Rows{data(tensor), tensor.stride(0)};
  };
  NormVectors n{type, lstm, H, of(dgates, narrow, G * H, "dgates"), of(gates, narrow, 2 * G * H, "gates"), {}, {}, data(vectors)};
  if (lstm) n.dm = of(*dm, wide, H, "dm"), n.c = of(*c, wide, H, "c");
  constexpr int64_t kParts = 16;  // whatever the number of threads: the same sums
  const Buffer sums(kParts * 2 * V * H * bytes);
  const auto part = [&](int64_t p) { return static_cast<char*>(sums.get()) + p * 2 * V * H * bytes; };
  torch::stable::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      std::memset(part(p), 0, V * H * bytes);
      layer_norm_kernels().add_vectors(n, rows * p / kParts, rows * (p + 1) / kParts, part(p), part(p) + V * H * bytes);
    }
  });
  const Tensor result = torch::stable::new_empty(vectors, {V * H});
  void* to = mutable_data(result);
  std::memset(to, 0, V * H * bytes);
  const auto add_up = [&]<class A>() {
    for (int64_t p = 0; p < kParts; ++p)
      for (int64_t i = 0; i < V * H; ++i) static_cast<A*>(to)[i] += reinterpret_cast<const A*>(part(p))[i];
  };
  if (type == Type::kDouble)
    add_up.template operator()<double>();
  else
    add_up.template operator()<float>();
  return result;
}

}  // namespace fastseq::cpu
