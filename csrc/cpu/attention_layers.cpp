#include "attention_layers.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "attention.h"
#include "host.h"
#include "layer_norm.h"
#include "level.h"
#include "matrix_product.h"

namespace fastseq::cpu {

namespace {

// of the attention's arithmetic, with a contiguous last dimension
bool rows_of(const Tensor& tensor, ScalarType type) {
  return plain(tensor) && tensor.scalar_type() == type && (tensor.stride(-1) == 1 || tensor.size(-1) == 1);
}

bool may_be_added(const Tensor& tensor, ScalarType type) {
  const ScalarType own = tensor.scalar_type();
  return own == type || (own == ScalarType::Float && bytes_of(type_of(type)) == 2);
}

// New, of a tensor's sizes, two to four.
Tensor contiguous_like(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  switch (x.dim()) {
    case 2: return empty({x.size(0), x.size(1)}, type);
    case 3: return empty({x.size(0), x.size(1), x.size(2)}, type);
    default: return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, type);
  }
}

// [1, .., n, m] of a tensor of two to four dimensions; time_first: of four, [B, T, H, E], with the heads before the time.
Tensor four_dimensions(const Tensor& tensor, bool time_first = false) {
  const auto n = tensor.sizes(), s = tensor.strides();
  switch (tensor.dim()) {
    case 2: return view(tensor, {1, 1, n[0], n[1]}, {0, 0, s[0], s[1]});
    case 3: return view(tensor, {1, n[0], n[1], n[2]}, {0, s[0], s[1], s[2]});
    default: return time_first ? view(tensor, {n[0], n[2], n[1], n[3]}, {s[0], s[2], s[1], s[3]}) : tensor;
  }
}

// Of the features of torch's function; a query has `features`.
AttentionSpec spec_of(const std::optional<Tensor>& mask, bool is_causal, std::optional<double> scale, int64_t features, double dropout,
                      const std::optional<Tensor>& seed, bool bottom_right) {
  AttentionSpec spec{};
  if (mask) (mask->scalar_type() == ScalarType::Bool ? spec.mask : spec.bias) = mask;
  spec.scale = scale.value_or(1 / std::sqrt(static_cast<double>(features))), spec.dropout = dropout, spec.seed = seed;
  spec.right = is_causal ? 0 : -1, spec.bottom_right = bottom_right;
  return spec;
}

}  // namespace

std::vector<Tensor> scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask, bool is_causal,
                                                 std::optional<double> scale, bool enable_gqa, bool wants_lse, double dropout,
                                                 std::optional<Tensor> seed, bool bottom_right, bool time_first) {
  const int64_t rank = query.dim();
  const ScalarType type = query.scalar_type();
  if (rank < 2 + enable_gqa || rank > 4 || (time_first && rank != 4) || key.dim() != rank || value.dim() != rank || !is_stored(type)) return {};
  if (!rows_of(query, type) || !rows_of(key, type) || !rows_of(value, type)) return {};
  const Tensor q = four_dimensions(query, time_first), k = four_dimensions(key, time_first), v = four_dimensions(value, time_first);
  const auto of_q = q.sizes(), of_k = k.sizes(), of_v = v.sizes();
  if (of_k[0] != of_q[0] || of_v[0] != of_q[0] || of_v[1] != of_k[1] || of_v[2] != of_k[2] || of_k[3] != of_q[3]) return {};
  for (int64_t dim = 0; dim < 4; ++dim)
    if (of_q[dim] == 0 || of_k[dim] == 0) return {};
  if (of_v[3] == 0 || (enable_gqa ? of_q[1] % of_k[1] != 0 : of_q[1] != of_k[1])) return {};
  std::optional<Tensor> mask;
  if (attn_mask) {
    const int64_t dims = attn_mask->dim(), of_scores[] = {of_q[0], of_q[1], of_q[2], of_k[2]};
    const bool fits = plain(attn_mask) && dims >= 2 && dims <= rank && !is_causal;
    if (!fits || !(attn_mask->scalar_type() == ScalarType::Bool || may_be_added(*attn_mask, type))) return {};
    mask = four_dimensions(*attn_mask);
    for (int64_t dim = 0; dim < 4; ++dim)
      if (mask->size(dim) != 1 && mask->size(dim) != of_scores[dim]) return {};
  }
  const AttentionSpec spec = spec_of(mask, is_causal, scale, of_q[3], dropout, seed, bottom_right);
  const int64_t H = of_q[1], L = of_q[2], E = of_v[3];
  Tensor out = time_first ? empty({of_q[0], L, H, E}, type) : empty({of_q[0], H, L, E}, type, true);
  std::optional<Tensor> lse;
  if (wants_lse) lse = lse_for_gradients(of_q[0], H, L, of_k[2], type);
  attention_into(q, k, v, spec, four_dimensions(out, time_first), lse, {}, false);
  if (rank == 3) out = view(out, {H, L, E}, {E, H * E, 1});
  if (rank == 2) out = view(out, {L, E}, {E, 1});
  if (wants_lse) return {out, *lse};
  return {out};
}

std::optional<Tensor> plain_attention(Tensor query, Tensor key, Tensor value, double scale, int64_t how) {
  constexpr int64_t kMostHeads = 128;  // beyond what models have: MOST_HEADS of fastseq/functional/_attention_call.py
  const bool grouped = how & kPlainGrouped, time_first = how & kPlainTimeFirst, unambiguous = how & kPlainUnambiguous;
  bool causal = how & kPlainCausal, bottom_right = how & kPlainBottomRight;
  const ScalarType type = query.scalar_type();
  if (query.dim() != 4 || key.dim() != 4 || value.dim() != 4 || !is_stored(type)) {
    if (unambiguous) return {};
    std::vector<Tensor> results = scaled_dot_product_attention(std::move(query), std::move(key), std::move(value), {}, causal,
                                                               how & kPlainScaled ? std::optional(scale) : std::nullopt, grouped, false, 0,
                                                               {}, bottom_right, time_first);
    if (results.empty()) return {};
    return std::move(results[0]);
  }
  if (!rows_of(query, type) || !rows_of(key, type) || !rows_of(value, type)) return {};
  const int64_t heads = time_first ? 2 : 1, time = 3 - heads;
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  const int64_t B = q[0], H = q[heads], L = q[time], S = k[time], E = v[3];
  if (k[0] != B || v[0] != B || v[heads] != k[heads] || v[time] != S || k[3] != q[3]) return {};
  if (B == 0 || H == 0 || L == 0 || q[3] == 0 || k[heads] == 0 || S == 0 || E == 0) return {};
  if (grouped ? H % k[heads] != 0 : H != k[heads]) return {};
  if (const int64_t least = how / kPlainKeys; least && S >= least) return {};
  if (unambiguous) {
    if ((how & kPlainScaled && !std::isfinite(scale)) || (H > kMostHeads && !(how & kPlainLaidOut))) return {};
    if (causal && L != S && !bottom_right) return {};
    causal = causal && !(bottom_right && L == 1);  // the last query sees every key
  }
  Tensor out = time_first ? empty({B, L, H, E}, type) : empty({B, H, L, E}, type, true);
  plain_attention_into(query, key, value, how & kPlainScaled ? scale : 1 / std::sqrt(static_cast<double>(q[3])), causal,
                       causal && bottom_right, time_first, out);
  return out;
}

std::vector<Tensor> scaled_dot_product_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
                                                          std::optional<Tensor> attn_mask, bool is_causal, std::optional<double> scale,
                                                          double dropout, std::optional<Tensor> seed, bool bottom_right, bool time_first,
                                                          std::vector<bool> wanted) {
  const Tensor q = four_dimensions(query, time_first), k = four_dimensions(key, time_first), v = four_dimensions(value, time_first);
  std::optional<Tensor> mask;
  if (attn_mask) mask = four_dimensions(*attn_mask);
  const AttentionSpec spec = spec_of(mask, is_causal, scale, q.size(3), dropout, seed, bottom_right);
  // time before heads in memory
  const auto like = [&](const Tensor& x) {
    return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), !time_first);
  };
  std::vector<Tensor> results;
  const auto heads_first = [&](const Tensor& x, bool is_wanted) -> std::optional<Tensor> {
    if (!is_wanted) return {};
    results.push_back(like(x));
    return four_dimensions(results.back(), time_first);
  };
  const std::optional<Tensor> dq = heads_first(query, wanted[0]), dk = heads_first(key, wanted[1]), dv = heads_first(value, wanted[2]);
  std::optional<Tensor> dbias;
  if (wanted[3]) results.push_back(contiguous_like(*attn_mask)), dbias = four_dimensions(results.back());
  const Tensor gradient = dout.stride(-1) == 1 || dout.size(-1) == 1 ? dout : torch::stable::contiguous(dout);
  attention_backward_into(four_dimensions(gradient, time_first), {}, false, q, k, v, four_dimensions(out, time_first), lse, spec, dq, dk,
                          dv, dbias);
  return results;
}

namespace {

// A batch [N, L, E], or one sequence [L, E], as rows that lie one after another in memory.
struct Batch {
  Tensor rows;  // [N L, E]
  int64_t sequences, length, features;
  int64_t b, t;  // rows from a sequence to the next, from a step to the next

  static Batch of(const Tensor& given, bool batch_first) {
    const bool single = given.dim() == 2;
    const int64_t first = single || batch_first ? 0 : 1, E = given.size(-1), L = given.size(single ? 0 : 1 - first);
    const int64_t N = single ? 1 : given.size(first);
    const auto ordered = [&](const Tensor& x) -> std::optional<Batch> {
      const int64_t of_b = single ? 0 : x.stride(first), of_t = x.stride(single ? 0 : 1 - first);
      if (x.stride(-1) != 1 && E > 1) return {};
      if ((of_t == E || L == 1) && (of_b == L * E || N == 1)) return Batch{view(x, {N * L, E}, {E, 1}), N, L, E, L, 1};
      if ((of_b == E || N == 1) && (of_t == N * E || L == 1)) return Batch{view(x, {N * L, E}, {E, 1}), N, L, E, 1, N};
      return {};
    };
    const auto found = ordered(given);
    return found ? *found : *ordered(torch::stable::contiguous(given));
  }

  int64_t count() const { return sequences * length; }
  // [N, H, L, D] of columns from `first` on of a matrix with the same rows
  Tensor heads(const Tensor& matrix, int64_t H, int64_t D, int64_t first) const {
    const int64_t width = matrix.size(1);
    return view(matrix, {sequences, H, length, D}, {b * width, D, t * width, 1}, first);
  }
  // the same rows as a batch, shaped as the tensor that this is of
  Tensor shaped(const Tensor& matrix, const Tensor& given, bool batch_first) const {
    const int64_t width = matrix.size(1);
    if (given.dim() == 2) return view(matrix, {length, width}, {t * width, 1});
    if (batch_first) return view(matrix, {sequences, length, width}, {b * width, t * width, 1});
    return view(matrix, {length, sequences, width}, {t * width, b * width, 1});
  }
};

// A tensor whose rows are those of a matrix [n, E], which it was made of or has in its memory.
Tensor matrix_of(const Tensor& tensor) {
  const Tensor& given = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const int64_t features = given.size(-1);
  return view(given, {given.numel() / features, features}, {features, 1});
}
Tensor rows_like(const Tensor& matrix, const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end()), strides(sizes.size());
  sizes.back() = matrix.size(1);
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0; stride *= sizes[dim]) strides[dim] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(matrix.get(), sizes.size(), sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

constexpr int64_t kElements = 16384;  // of rows that one thread works through at least

// Rows, depths and columns from which packing the weights pays: with AMX, which multiplies fp32 in parts of bfloat16, and without.
constexpr int64_t kRowsOfTiles = 96, kRowsOfVectors = 16, kLeastDepth = 64;
// Multiply-adds from which AMX's product of bfloat16 with weights as they lie, torch's, is faster; and below which torch's gradients of
// fp32 are.
constexpr int64_t kWork = 1 << 24;

// The kernels for products of n rows with weights, in either direction; null: torch's own products are the ones.
const MatrixKernels* kernels_for(ScalarType type, int64_t n, const Tensor& weight) {
  if ((type != ScalarType::Float && type != ScalarType::BFloat16) || weight.stride(1) != 1) return nullptr;
  if (weight.size(0) < kLeastDepth || weight.size(1) < kLeastDepth) return nullptr;
  if (n < (level() == Level::kAmx ? kRowsOfTiles : kRowsOfVectors)) return nullptr;
  return matrix_kernels(type_of(type));
}

void add_bias(const Tensor& rows, const void* bias, bool relu) {
  const Type type = type_of(rows.scalar_type());
  torch::stable::parallel_for(0, rows.size(0), std::max<int64_t>(1, kElements / rows.size(1)), [&](int64_t begin, int64_t end) {
    layer_norm_kernels().add_bias(type, mutable_data(rows), bias, rows.size(1), begin, end, relu);
  });
}

// rows [n, E] x weights, of which row r is a column of the result, and the bias, from `first` on; false: not multiplied, or the results
// are not to be used.
bool multiplied(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, int64_t first, bool relu, const Tensor& out) {
  const int64_t n = rows.size(0), depth = rows.size(1), count = out.size(1);
  const MatrixKernels* kernels = kernels_for(rows.scalar_type(), n, weight);
  if (!kernels || count < kLeastDepth) return false;
  if (rows.scalar_type() == ScalarType::BFloat16 && level() == Level::kAmx && n * depth * count >= kWork) return false;
  const Type type = type_of(rows.scalar_type());
  const int64_t bytes = bytes_of(type);
  const MatrixRows of_weight{offset(data(weight), first * weight.stride(0) * bytes), weight.stride(0) * bytes, nullptr};
  const void* added = bias ? offset(data(*bias), first * bytes) : nullptr;
  MatrixProduct product{type, n, depth, {data(rows), rows.stride(0) * bytes, nullptr}, false, {}, 1};
  product.right[0] = {of_weight, count, mutable_data(out), count * bytes, true};
  if (kernels->finishes) product.right[0].bias = added, product.right[0].relu = relu;
  if (!multiply(*kernels, {product})) return false;
  if (added && !kernels->finishes) add_bias(out, added, relu);
  return true;
}

// The same without a relu, by torch's product.
void multiply_by_torch(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, int64_t first, const Tensor& out) {
  const int64_t along = weight.stride(1), across = weight.stride(0), count = out.size(1);
  const Tensor transposed = view(weight, {weight.size(1), count}, {along, across}, first * across);
  if (bias) {
    const Tensor part = view(*bias, {count}, {1}, first);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), part.get(), rows.get(), transposed.get(), 1, 1));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), rows.get(), transposed.get()));
  }
}

// weight[first .. first + count) x + bias of rows [n, E], which are contiguous, as is the bias.
Tensor linear(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, int64_t first, int64_t count) {
  const Tensor out = empty({rows.size(0), count}, rows.scalar_type());
  if (!multiplied(rows, weight, bias, first, false, out)) multiply_by_torch(rows, weight, bias, first, out);
  return out;
}
Tensor linear(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
  return linear(rows, weight, bias, 0, weight.size(0));
}

}  // namespace

std::vector<Tensor> linear_forward(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  const ScalarType type = input.scalar_type();
  if (!plain(input) || !plain(weight) || !plain(bias) || weight.scalar_type() != type || weight.dim() != 2) return {};
  if (input.dim() < 2 || input.numel() == 0 || input.size(-1) != weight.size(1) || !weight.is_contiguous()) return {};
  if (bias && (bias->scalar_type() != type || bias->dim() != 1 || bias->size(0) != weight.size(0) || !bias->is_contiguous())) return {};
  if (!kernels_for(type, input.numel() / input.size(-1), weight)) return {};
  if (type == ScalarType::Float && input.numel() * weight.size(0) < kWork) return {};
  return {rows_like(linear(matrix_of(input), weight, bias, 0, weight.size(0)), input)};
}

std::vector<Tensor> linear_backward(Tensor dout, Tensor input, Tensor weight, std::vector<bool> wanted) {
  const Tensor gradient = matrix_of(dout), x = matrix_of(input);
  const ScalarType type = x.scalar_type();
  const int64_t n = x.size(0), E = x.size(1), O = weight.size(0), bytes = bytes_of(type_of(type));
  const Tensor dx = empty({wanted[0] ? n : 0, E}, type), dweight = empty({wanted[1] ? O : 0, E}, type), dbias = empty({wanted[2] ? O : 0}, type);
  constexpr float kOne = 1;
  constexpr uint16_t kShortOne = 0x3f80;
  std::vector<MatrixProduct> products;
  const MatrixRows of_gradient{data(gradient), O * bytes, nullptr};
  if (wanted[0]) {
    products.push_back({type_of(type), n, O, of_gradient, false,
                        {{{data(weight), weight.stride(0) * bytes, nullptr}, E, mutable_data(dx), E * bytes}}, 1});
  }
  if (wanted[1] || wanted[2]) {
    MatrixProduct product{type_of(type), O, n, of_gradient, true, {}, 0};
    if (wanted[1]) product.right[product.count++] = {{data(x), E * bytes, nullptr}, E, mutable_data(dweight), E * bytes};
    if (wanted[2]) product.right[product.count++] = {{bytes == 4 ? static_cast<const void*>(&kOne) : &kShortOne, 0, nullptr}, 1, mutable_data(dbias), bytes};
    products.push_back(product);
  }
  const MatrixKernels* kernels = kernels_for(type, n, weight);
  std::vector<Tensor> results{wanted[0] ? rows_like(dx, input) : dx, dweight, dbias};
  if (kernels && multiply(*kernels, products)) return results;
  const Tensor transposed = view(gradient, {O, n}, {1, O});
  if (wanted[0]) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(dx.get(), gradient.get(), weight.get()));
  if (wanted[1]) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(dweight.get(), transposed.get(), x.get()));
  constexpr int64_t kOfRows[] = {0};
  if (wanted[2]) results[2] = torch::stable::sum(gradient, torch::headeronly::IntHeaderOnlyArrayRef(kOfRows));
  return results;
}

namespace {

bool same(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.dim() != b.dim()) return false;
  for (int64_t dim = 0; dim < a.dim(); ++dim)
    if (a.size(dim) != b.size(dim) || a.stride(dim) != b.stride(dim)) return false;
  return true;
}

bool is_matrix(const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns) {
  return plain(tensor) && tensor.scalar_type() == type && tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
}
bool is_vector(const std::optional<Tensor>& tensor, ScalarType type, int64_t size) {
  const auto fits = [&](const Tensor& t) { return t.scalar_type() == type && t.dim() == 1 && t.size(0) == size && t.is_contiguous(); };
  return !tensor || (plain(tensor) && fits(*tensor));
}

// Which of the keys [N, S] a padding mask hides: bool, or added numbers that are 0 or -inf; nothing if there are others.
std::optional<std::vector<char>> padded(const Tensor& mask) {
  const int64_t n = mask.numel();
  std::vector<char> hidden(n);
  const auto* given = data(mask);
  if (mask.scalar_type() == ScalarType::Bool) {
    std::memcpy(hidden.data(), given, n);
    return hidden;
  }
  bool clear = true;
  with_storage(type_of(mask.scalar_type()), [&]<class S>() {
    for (int64_t i = 0; i < n; ++i) {
      const auto x = static_cast<double>(static_cast<const S*>(given)[i]);
      hidden[i] = x != 0;
      clear &= x == 0 || x == -std::numeric_limits<double>::infinity();
    }
  });
  if (!clear) return {};
  return hidden;
}

// True where a bool mask is False.
Tensor inverted(const Tensor& mask, Sizes sizes) {
  const Tensor hides = mask.is_contiguous() ? mask : torch::stable::contiguous(mask);
  Tensor seen = empty(sizes, ScalarType::Bool);
  const auto* from = static_cast<const bool*>(data(hides));
  std::transform(from, from + hides.numel(), static_cast<bool*>(mutable_data(seen)), [](bool hidden) { return !hidden; });
  return seen;
}

// What is added to the scores, [1 or N, 1 or H, L, S], with what is added to those of each key, [N, S]: new.
Tensor with_padding(const Tensor& bias, const Tensor& padding) {
  const int64_t N = padding.size(0), S = padding.size(1), H = bias.size(1), L = bias.size(2);
  const Tensor sum = empty({N, H, L, S}, bias.scalar_type());
  const int64_t of_n = bias.size(0) == 1 ? 0 : bias.stride(0), of_h = bias.stride(1), i = bias.stride(2), j = bias.stride(3);
  with_storage(type_of(bias.scalar_type()), [&]<class A>() {
    const auto *added = static_cast<const A*>(data(padding)), *own = static_cast<const A*>(data(bias));
    auto* to = static_cast<A*>(mutable_data(sum));
    for (int64_t n = 0; n < N; ++n, added += S)
      for (int64_t row = 0; row < H * L; ++row, to += S) {
        const A* from = own + n * of_n + row / L * of_h + row % L * i;
        for (int64_t key = 0; key < S; ++key) to[key] = static_cast<A>(from[key * j] + added[key]);
      }
  });
  return sum;
}

// What the two masks of nn.MultiheadAttention say; false: not what they have to be, or both are added, in different dtypes.
bool read_masks(std::optional<Tensor> padding, std::optional<Tensor> attn_mask, int64_t N, int64_t H, int64_t L, int64_t S,
                ScalarType type, AttentionSpec& to) {
  if (attn_mask) {
    const int64_t dims = attn_mask->dim();
    if (!plain(attn_mask) || dims < 2 || dims > 3 || (dims == 3 && attn_mask->size(0) != N * H)) return false;
    if (attn_mask->size(-2) != L || attn_mask->size(-1) != S) return false;
    if (attn_mask->scalar_type() == ScalarType::Bool) {
      to.mask = dims == 2 ? inverted(*attn_mask, {1, 1, L, S}) : inverted(*attn_mask, {N, H, L, S});
    } else {
      if (type == ScalarType::Double && attn_mask->scalar_type() == ScalarType::Float) attn_mask = torch::stable::to(*attn_mask, type);
      if (!may_be_added(*attn_mask, type)) return false;
      const int64_t i = attn_mask->stride(-2), j = attn_mask->stride(-1), h = attn_mask->stride(0);
      to.bias = dims == 2 ? view(*attn_mask, {1, 1, L, S}, {0, 0, i, j}) : view(*attn_mask, {N, H, L, S}, {H * h, h, i, j});
    }
  }
  if (!padding) return true;
  const bool whole = N == 1 && padding->dim() == 1;
  if (!plain(padding) || (!whole && (padding->dim() != 2 || padding->size(0) != N)) || padding->size(-1) != S) return false;
  const bool added = padding->scalar_type() != ScalarType::Bool;
  if (type == ScalarType::Double && padding->scalar_type() == ScalarType::Float) padding = torch::stable::to(*padding, type);
  if ((added && !may_be_added(*padding, type)) || !padding->is_contiguous()) return false;
  const auto hidden = padded(*padding);
  if (!hidden) {  // numbers to be added
    if (to.bias && to.bias->scalar_type() != padding->scalar_type()) return false;
    to.bias = to.bias ? with_padding(*to.bias, view(*padding, {N, S}, {S, 1})) : view(*padding, {N, 1, 1, S}, {S, 0, 0, 1});
    return true;
  }
  // keys behind the last that is seen cost nothing if they are told as a length
  Tensor lengths = empty({N}, ScalarType::Int);
  auto* length = static_cast<int32_t*>(mutable_data(lengths));
  bool gaps = false, any = false;
  for (int64_t n = 0; n < N; ++n) {
    const char* row = hidden->data() + n * S;
    int64_t seen = S;
    while (seen > 0 && row[seen - 1]) --seen;
    length[n] = static_cast<int32_t>(seen);
    any |= seen < S, gaps |= std::count(row, row + seen, 1) > 0;
  }
  if (any) to.k_lengths = lengths;
  if (!gaps) return true;
  if (!to.mask) {
    Tensor seen = empty({N, 1, 1, S}, ScalarType::Bool);
    std::transform(hidden->begin(), hidden->end(), static_cast<bool*>(mutable_data(seen)), [](char hides) { return !hides; });
    to.mask = seen;
    return true;
  }
  Tensor bias = empty({N, 1, 1, S}, type);
  with_storage(type_of(type), [&]<class A>() {
    std::transform(hidden->begin(), hidden->end(), static_cast<A*>(mutable_data(bias)),
                   [](char hides) { return static_cast<A>(hides ? -std::numeric_limits<float>::infinity() : 0.0f); });
  });
  to.bias = bias;
  return true;
}

// Self-attention or attention to others, up to the output projection: the heads' results [N L, E], beside them the weights if `weights`.
struct Heads {
  Tensor rows;
  std::optional<Tensor> weights;
};

Heads attend(const Batch& of_q, const Batch& of_k, const Batch& of_v, bool self, bool shared, int64_t H, const Tensor& weight,
             const std::optional<Tensor>& bias, const AttentionSpec& spec, bool need_weights, bool average) {
  const int64_t E = of_q.features, D = E / H, N = of_q.sequences, L = of_q.length, S = of_k.length;
  Tensor q, k, v;
  if (self) {
    const Tensor all = linear(of_q.rows, weight, bias);
    q = of_q.heads(all, H, D, 0), k = of_q.heads(all, H, D, E), v = of_q.heads(all, H, D, 2 * E);
  } else {
    q = of_q.heads(linear(of_q.rows, weight, bias, 0, E), H, D, 0);
    if (shared) {
      const Tensor both = linear(of_k.rows, weight, bias, E, 2 * E);
      k = of_k.heads(both, H, D, 0), v = of_k.heads(both, H, D, E);
    } else {
      k = of_k.heads(linear(of_k.rows, weight, bias, E, E), H, D, 0);
      v = of_v.heads(linear(of_v.rows, weight, bias, 2 * E, E), H, D, 0);
    }
  }
  const ScalarType type = of_q.rows.scalar_type();
  Heads result{empty({N * L, E}, type), {}};
  if (need_weights) result.weights = average ? empty({N, L, S}, type) : empty({N, H, L, S}, type);
  attention_into(q, k, v, spec, of_q.heads(result.rows, H, D, 0), {}, result.weights, average);
  return result;
}

}  // namespace

std::vector<Tensor> multihead_attention(Tensor query, Tensor key, Tensor value, int64_t num_heads, Tensor in_proj_weight,
                                        std::optional<Tensor> in_proj_bias, Tensor out_proj_weight, std::optional<Tensor> out_proj_bias,
                                        std::optional<Tensor> key_padding_mask, std::optional<Tensor> attn_mask, bool batch_first,
                                        bool is_causal, bool need_weights, bool average_attn_weights) {
  const int64_t rank = query.dim(), H = num_heads;
  const ScalarType type = query.scalar_type();
  if (rank < 2 || rank > 3 || key.dim() != rank || value.dim() != rank || !is_stored(type)) return {};
  if (!plain(query) || !plain(key) || !plain(value) || key.scalar_type() != type || value.scalar_type() != type) return {};
  const int64_t E = query.size(-1);
  if (!is_matrix(in_proj_weight, type, 3 * E, E) || !is_matrix(out_proj_weight, type, E, E) || E % H) return {};
  if (!is_vector(in_proj_bias, type, 3 * E) || !is_vector(out_proj_bias, type, E)) return {};
  if (query.numel() == 0 || key.numel() == 0 || key.size(-1) != E) return {};
  for (int64_t dim = 0; dim < rank; ++dim)
    if (value.size(dim) != key.size(dim)) return {};
  const bool shared = same(key, value), self = shared && same(query, key);
  const Batch of_q = Batch::of(query, batch_first), of_k = self ? of_q : Batch::of(key, batch_first);
  const Batch of_v = shared ? of_k : Batch::of(value, batch_first);
  if (of_k.sequences != of_q.sequences) return {};
  AttentionSpec spec{};
  spec.scale = 1 / std::sqrt(static_cast<double>(E / H)), spec.right = is_causal ? 0 : -1;
  const auto mask = is_causal ? std::nullopt : attn_mask;
  if (!read_masks(key_padding_mask, mask, of_q.sequences, H, of_q.length, of_k.length, type, spec)) return {};
  Heads heads = attend(of_q, of_k, of_v, self, shared, H, in_proj_weight, in_proj_bias, spec, need_weights, average_attn_weights);
  const Tensor out = of_q.shaped(linear(heads.rows, out_proj_weight, out_proj_bias), query, batch_first);
  if (!need_weights) return {out};
  Tensor weights = *heads.weights;
  if (rank == 2) {
    const int64_t L = of_q.length, S = of_k.length;
    weights = average_attn_weights ? view(weights, {L, S}, {S, 1}) : view(weights, {H, L, S}, {L * S, S, 1});
  }
  return {out, weights};
}

namespace {

// What a layer with gradients computes between its projections, as its two passes see it.
struct Between {
  int64_t heads, features;  // H, E
  int64_t batch, time;  // dimensions of the projected tensors
  Tensor q, k, v;
  AttentionSpec spec;

  static std::optional<Between> of(const std::vector<Tensor>& projected, int64_t H, const std::optional<Tensor>& padding,
                                   const std::optional<Tensor>& attn_mask, bool batch_first, bool causal, double dropout,
                                   const std::optional<Tensor>& seed) {
    if (projected.empty() || projected.size() > 3) return {};
    const Tensor& first = projected[0];
    const int64_t batch = batch_first ? 0 : 1, time = 1 - batch;
    int64_t all = 0;
    for (const Tensor& x : projected) {
      if (!plain(x) || x.scalar_type() != first.scalar_type() || x.dim() != 3 || x.numel() == 0) return {};
      if (x.stride(-1) != 1 || x.size(batch) != first.size(batch)) return {};
      all += x.size(-1);
    }
    const int64_t E = all / 3;
    if (!is_stored(first.scalar_type()) || all % 3 || E % H) return {};
    for (const Tensor& x : projected)
      if (x.size(-1) % E) return {};
    Between between{H, E, batch, time, first, first, first, {}};
    const auto [q, k, v] = between.parts(projected);
    if (v.size(2) != k.size(2)) return {};
    AttentionSpec& spec = between.spec;
    spec.scale = 1 / std::sqrt(static_cast<double>(E / H)), spec.right = causal ? 0 : -1;
    spec.dropout = dropout, spec.seed = seed;
    const auto mask = causal ? std::nullopt : attn_mask;
    if (!read_masks(padding, mask, q.size(0), H, q.size(2), k.size(2), first.scalar_type(), spec)) return {};
    between.q = q, between.k = k, between.v = v;
    return between;
  }

  // [N, H, T, D] of E features, from `first` on
  Tensor of_heads(const Tensor& given, int64_t first = 0) const {
    const int64_t D = features / heads;
    return view(given, {given.size(batch), heads, given.size(time), D}, {given.stride(batch), D, given.stride(time), 1}, first);
  }
  // q, k and v of projected tensors, or of their gradients: E features each, one after another
  std::array<Tensor, 3> parts(const std::vector<Tensor>& given) const {
    std::vector<Tensor> found;
    for (const Tensor& x : given)
      for (int64_t first = 0; first < x.size(-1); first += features) found.push_back(of_heads(x, first));
    return {found[0], found[1], found[2]};
  }
};

}  // namespace

std::vector<Tensor> projected_attention(std::vector<Tensor> projected, int64_t num_heads, std::optional<Tensor> key_padding_mask,
                                        std::optional<Tensor> attn_mask, bool batch_first, bool is_causal, double dropout,
                                        std::optional<Tensor> seed, bool need_weights, bool average_attn_weights) {
  const auto found = Between::of(projected, num_heads, key_padding_mask, attn_mask, batch_first, is_causal, dropout, seed);
  if (!found) return {};
  const Between& x = *found;
  const ScalarType type = projected[0].scalar_type();
  const int64_t N = x.q.size(0), H = num_heads, L = x.q.size(2), S = x.k.size(2);
  const Tensor out = empty({projected[0].size(0), projected[0].size(1), x.features}, type), lse = lse_for_gradients(N, H, L, S, type);
  std::vector<Tensor> results{out, lse};
  std::optional<Tensor> weights;
  if (need_weights) weights = average_attn_weights ? empty({N, L, S}, type) : empty({N, H, L, S}, type);
  attention_into(x.q, x.k, x.v, x.spec, x.of_heads(out), lse, weights, average_attn_weights);
  if (need_weights) results.push_back(*weights);
  return results;
}

std::vector<Tensor> projected_attention_backward(Tensor dout, std::optional<Tensor> dweights, std::vector<Tensor> projected, Tensor out,
                                                 Tensor lse, int64_t num_heads, std::optional<Tensor> key_padding_mask,
                                                 std::optional<Tensor> attn_mask, bool batch_first, bool is_causal, double dropout,
                                                 std::optional<Tensor> seed, bool average_attn_weights) {
  const auto found = Between::of(projected, num_heads, key_padding_mask, attn_mask, batch_first, is_causal, dropout, seed);
  STD_TORCH_CHECK(found, "projected_attention_backward is given what projected_attention takes");
  const Between& x = *found;
  std::vector<Tensor> results;
  for (const Tensor& of : projected) results.push_back(contiguous_like(of));
  const auto [dq, dk, dv] = x.parts(results);
  const Tensor gradient = dout.stride(-1) == 1 ? dout : torch::stable::contiguous(dout);
  attention_backward_into(x.of_heads(gradient), dweights, average_attn_weights, x.q, x.k, x.v, x.of_heads(out), lse, x.spec, dq, dk, dv,
                          {});
  return results;
}

const LayerNormKernels& layer_norm_kernels() {
#if defined(__x86_64__)
  if (level() >= Level::kAvx512) return layer_norm_avx512();
  if (level() == Level::kAvx2) return layer_norm_avx2();
#endif
  return layer_norm_default();
}

namespace {

enum Parameter { kInProj, kInProjBias, kOutProj, kOutProjBias, kNorm1, kNorm1Bias, kNorm2, kNorm2Bias, kLinear1, kLinear1Bias, kLinear2,
                 kLinear2Bias, kParameters };
// What a layer with gradients keeps for them, in this order, beside src: see EncoderLayer.
enum Saved { kProjected, kAttended, kLse, kSum1, kNormalized, kOther, kMean1, kScale1, kMean2, kScale2, kBefore, kHidden, kSaved };
enum Dropping { kOfAttention, kOfDropout1, kOfDropout, kOfDropout2, kDroppings };

// Runs body(begin, end, scratch) over rows by torch's threads, with `rows_of_scratch` rows of scratch each.
template <class Body>
void over_rows(Type type, int64_t count, int64_t features, int64_t rows_of_scratch, const Body& body) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kElements / features), [&](int64_t begin, int64_t end) {
    const Buffer scratch(rows_of_scratch * scratch_row(features) * wide_bytes(type));
    body(begin, end, scratch.get());
  });
}

// Of torch.nn.TransformerEncoderLayer with biases: what both passes know of a call, and their parts.
//
//   norm last     sum1 = src + dropout1(attention(src)), normalized = norm1(sum1), other = normalized + dropout2(feed-forward(normalized)),
//                 the output is norm2(other)
//   norm first    normalized = norm1(src), sum1 = src + dropout1(attention(normalized)), other = norm2(sum1), the output is
//                 sum1 + dropout2(feed-forward(other))
//
// The feed-forward part is linear2(hidden), hidden = dropout(activation(before)), before = linear1 of what it is given.
struct EncoderLayer {
  const std::vector<Tensor>& p;
  Batch batch;
  Type type;
  int64_t n, E, H, F;  // rows; features, heads, features of the feed-forward part
  bool gelu, norm_first;
  double eps;
  AttentionSpec spec;
  double probability[kDroppings];
  uint64_t seed;

  static std::optional<EncoderLayer> of(const Tensor& src, const std::vector<Tensor>& p, int64_t H, bool gelu, bool norm_first, double eps,
                                        const std::optional<Tensor>& src_mask, const std::optional<Tensor>& padding, bool batch_first,
                                        bool is_causal, const std::vector<double>& dropouts, const std::optional<Tensor>& seed) {
    const ScalarType type = src.scalar_type();
    if (src.dim() < 2 || src.dim() > 3 || !plain(src) || !is_stored(type) || src.numel() == 0 || p.size() != kParameters) return {};
    const int64_t E = src.size(-1), F = p[kLinear1].dim() == 2 ? p[kLinear1].size(0) : 0;
    if (F == 0 || E % H || !is_matrix(p[kInProj], type, 3 * E, E) || !is_matrix(p[kOutProj], type, E, E)) return {};
    if (!is_matrix(p[kLinear1], type, F, E) || !is_matrix(p[kLinear2], type, E, F)) return {};
    if (!is_vector(p[kInProjBias], type, 3 * E) || !is_vector(p[kLinear1Bias], type, F)) return {};
    for (int i = 0; i < kParameters; ++i)
      if (!p[i].is_contiguous()) return {};
    for (const int of_features : {kOutProjBias, kNorm1, kNorm1Bias, kNorm2, kNorm2Bias, kLinear2Bias})
      if (!is_vector(p[of_features], type, E)) return {};
    const Batch batch = Batch::of(src, batch_first);
    EncoderLayer layer{p, batch, type_of(type), batch.count(), E, H, F, gelu, norm_first, eps, {}, {}, 0};
    AttentionSpec& spec = layer.spec;
    spec.scale = 1 / std::sqrt(static_cast<double>(E / H)), spec.right = is_causal ? 0 : -1;
    if (!read_masks(padding, is_causal ? std::nullopt : src_mask, batch.sequences, H, batch.length, batch.length, type, spec)) return {};
    if (!seed) return layer;
    std::copy(dropouts.begin(), dropouts.end(), layer.probability);
    if (dropouts[kOfAttention] > 0) spec.dropout = dropouts[kOfAttention], spec.seed = view(*seed, {1}, {1});
    layer.seed = static_cast<uint64_t>(integers(seed)[1]);
    return layer;
  }

  Dropout dropout(Dropping which) const { return {probability[which], seed, static_cast<uint32_t>(which)}; }
  Tensor rows(int64_t features) const { return empty({n, features}, batch.rows.scalar_type()); }
  Tensor numbers() const { return empty({n}, wide_of(batch.rows.scalar_type())); }
  // q, k or v of projected rows, or of their gradient; or the heads of other rows
  Tensor heads(const Tensor& rows, int64_t which = 0) const { return batch.heads(rows, H, E / H, which * E); }

  // x + dropout(y), or x alone, into `sum` if it is given; the result is that, normalized.
  Tensor normalized(const Tensor& x, const Tensor* y, Dropping which, Parameter weight, const Tensor* sum, Tensor* saved_mean,
                    Tensor* saved_scale) const {
    const Tensor result = rows(E);
    AddNorm norm{type, E, data(x), y ? data(*y) : nullptr, data(p[weight]), data(p[weight + 1]), eps, sum ? mutable_data(*sum) : nullptr,
                 mutable_data(result)};
    if (y) norm.dropout = dropout(which);
    if (saved_mean) {
      *saved_mean = numbers(), *saved_scale = numbers();
      norm.mean = mutable_data(*saved_mean), norm.scale = mutable_data(*saved_scale);
    }
    run(norm);
    return result;
  }
  // x + dropout(y), or that alone, into `to`
  void add(const Tensor* x, const Tensor& y, const Tensor& to, const Dropout& dropout) const {
    run({type, E, x ? data(*x) : nullptr, data(y), nullptr, nullptr, 0, mutable_data(to), nullptr, nullptr, nullptr, dropout});
  }
  void run(const AddNorm& norm) const {
    over_rows(type, n, E, 2, [&](int64_t begin, int64_t end, void* scratch) { layer_norm_kernels().add_norm(norm, begin, end, scratch); });
  }

  Activation activation(const Tensor& before, const Tensor& after) const {
    return {type, F, gelu, data(before), mutable_data(after), dropout(kOfDropout)};
  }

  std::vector<Tensor> forward(bool saves) const {
    const Tensor& x = batch.rows;
    std::vector<Tensor> saved(saves ? kSaved : 0);
    const auto to = [&](Saved which) { return saves ? &saved[which] : nullptr; };
    const auto keep = [&](Saved which, const Tensor& tensor) {
      if (saves) saved[which] = tensor;
      return tensor;
    };
    const auto attention = [&](const Tensor& given) {
      const Tensor projected = keep(kProjected, linear(given, p[kInProj], p[kInProjBias])), attended = keep(kAttended, rows(E));
      std::optional<Tensor> lse;
      if (saves) lse = keep(kLse, lse_for_gradients(batch.sequences, H, batch.length, batch.length, x.scalar_type()));
      attention_into(heads(projected), heads(projected, 1), heads(projected, 2), spec, heads(attended), lse, {}, false);
      return keep(kSum1, linear(attended, p[kOutProj], p[kOutProjBias]));  // what it becomes a part of, in place
    };
    const auto feed_forward = [&](const Tensor& given) {
      const Tensor before = rows(F);
      const bool done = multiplied(given, p[kLinear1], p[kLinear1Bias], 0, !gelu, before);
      if (!done) multiply_by_torch(given, p[kLinear1], p[kLinear1Bias], 0, before);
      const Tensor hidden = keep(kHidden, saves && gelu ? rows(F) : before);
      keep(kBefore, gelu ? before : empty({0}, x.scalar_type()));
      if (!done || gelu || probability[kOfDropout] > 0) {
        const Activation a = activation(before, hidden);
        over_rows(type, n, F, 1, [&](int64_t begin, int64_t end, void* scratch) { layer_norm_kernels().activate(a, begin, end, scratch); });
      }
      return linear(hidden, p[kLinear2], p[kLinear2Bias]);
    };
    Tensor out;
    if (norm_first) {
      const Tensor sum = attention(keep(kNormalized, normalized(x, nullptr, kOfDropout1, kNorm1, nullptr, to(kMean1), to(kScale1))));
      const Tensor other = keep(kOther, normalized(x, &sum, kOfDropout1, kNorm2, &sum, to(kMean2), to(kScale2)));
      out = feed_forward(other);
      add(&sum, out, out, dropout(kOfDropout2));
    } else {
      const Tensor sum = attention(x);
      const Tensor middle = keep(kNormalized, normalized(x, &sum, kOfDropout1, kNorm1, to(kSum1), to(kMean1), to(kScale1)));
      const Tensor other = keep(kOther, feed_forward(middle));
      out = normalized(middle, &other, kOfDropout2, kNorm2, to(kOther), to(kMean2), to(kScale2));
    }
    saved.insert(saved.begin(), out);
    return saved;
  }

  // The gradients of src and of the parameters, of size 0 where they are not wanted.
  std::vector<Tensor> backward(const Tensor& dout, const std::vector<Tensor>& saved, const std::vector<bool>& wanted) const {
    const Tensor& x = batch.rows;
    std::vector<Tensor> grads(1 + kParameters);
    // of what was normalized, with `beside`; and of what was dropped before it became a part of that
    const auto through_norm = [&](const Tensor& given, const Tensor* more, const Tensor& sum, Saved mean, Saved scale, Parameter weight,
                                  const Tensor* beside, const Dropout& before) {
      const Tensor dsum = rows(E), dy = before.probability > 0 ? rows(E) : dsum;
      const NormGradient norm{type, E, data(given), more ? data(*more) : nullptr, data(sum), data(saved[mean]), data(saved[scale]),
                              data(p[weight]), beside ? data(*beside) : nullptr, mutable_data(dsum),
                              before.probability > 0 ? mutable_data(dy) : nullptr, before};
      norm_gradients(norm, grads[1 + weight], grads[2 + weight]);
      return std::pair(dsum, dy);
    };
    const auto through_linear = [&](const Tensor& given, const Tensor& of, Parameter weight, bool further = true) {
      std::vector<Tensor> found = linear_backward(given, of, p[weight], {further, wanted[1 + weight], wanted[2 + weight]});
      grads[1 + weight] = found[1], grads[2 + weight] = found[2];
      return found[0];
    };
    const auto through_feed_forward = [&](const Tensor& given, const Tensor& of) {
      const Tensor gradient = through_linear(given, saved[kHidden], kLinear2);
      const Activation a = activation(saved[kBefore], saved[kHidden]);
      over_rows(type, n, F, 0, [&](int64_t begin, int64_t end, void*) {
        layer_norm_kernels().activation_gradient(a, mutable_data(gradient), begin, end);
      });
      return through_linear(gradient, of, kLinear1);
    };
    const auto through_attention = [&](const Tensor& given, const Tensor& of, bool further) {
      const Tensor gradient = through_linear(given, saved[kAttended], kOutProj), projected = rows(3 * E);
      const Tensor& before = saved[kProjected];
      attention_backward_into(heads(gradient), {}, false, heads(before), heads(before, 1), heads(before, 2), heads(saved[kAttended]),
                              saved[kLse], spec, heads(projected), heads(projected, 1), heads(projected, 2), {});
      return through_linear(projected, of, kInProj, further);
    };
    const Tensor rows_of_dout = matrix_of(dout);
    Tensor dx;
    if (norm_first) {
      Tensor dropped = rows_of_dout;
      if (probability[kOfDropout2] > 0) dropped = rows(E), add(nullptr, rows_of_dout, dropped, dropout(kOfDropout2));
      const Tensor dother = through_feed_forward(dropped, saved[kOther]);
      const auto [dsum, dy] =
          through_norm(dother, nullptr, saved[kSum1], kMean2, kScale2, kNorm2, &rows_of_dout, dropout(kOfDropout1));
      const Tensor dnormalized = through_attention(dy, saved[kNormalized], true);
      dx = through_norm(dnormalized, nullptr, x, kMean1, kScale1, kNorm1, &dsum, {}).first;
    } else {
      const auto [dother, dy2] =
          through_norm(rows_of_dout, nullptr, saved[kOther], kMean2, kScale2, kNorm2, nullptr, dropout(kOfDropout2));
      const Tensor dmiddle = through_feed_forward(dy2, saved[kNormalized]);
      const auto [dsum, dy] = through_norm(dmiddle, &dother, saved[kSum1], kMean1, kScale1, kNorm1, nullptr, dropout(kOfDropout1));
      dx = through_attention(dy, x, wanted[0]);
      if (wanted[0]) add(&dsum, dx, dx, {});
    }
    grads[0] = dx;
    return grads;
  }

  // Sums over parts of the rows, whatever the number of threads.
  void norm_gradients(const NormGradient& norm, Tensor& dweight, Tensor& dbias) const {
    constexpr int64_t kRows = 128;
    const int64_t parts = (n + kRows - 1) / kRows, bytes = 2 * E * wide_bytes(type);
    const Buffer sums(parts * bytes);
    std::memset(sums.get(), 0, parts * bytes);
    torch::stable::parallel_for(0, parts, std::max<int64_t>(1, kElements / (kRows * E)), [&](int64_t begin, int64_t end) {
      const Buffer scratch(2 * scratch_row(E) * wide_bytes(type));
      for (; begin < end; ++begin) {
        void* const of_part = static_cast<char*>(sums.get()) + begin * bytes;
        layer_norm_kernels().norm_gradient(norm, begin * kRows, std::min(n, (begin + 1) * kRows), of_part, scratch.get());
      }
    });
    dweight = empty({E}, batch.rows.scalar_type()), dbias = empty({E}, batch.rows.scalar_type());
    if (type == Type::kDouble)
      add_up(static_cast<double*>(sums.get()), parts, dweight, dbias);
    else
      add_up(static_cast<float*>(sums.get()), parts, dweight, dbias);
  }
  template <class A>
  void add_up(A* sums, int64_t parts, const Tensor& dweight, const Tensor& dbias) const {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < 2 * E; ++i) sums[i] += sums[part * 2 * E + i];
    with_storage(type, [&]<class S>() {
      std::copy_n(sums, E, static_cast<S*>(mutable_data(dweight))), std::copy_n(sums + E, E, static_cast<S*>(mutable_data(dbias)));
    });
  }
};

}  // namespace

std::vector<Tensor> transformer_encoder_layer(Tensor src, std::vector<Tensor> parameters, int64_t num_heads, bool gelu, bool norm_first,
                                              double eps, std::optional<Tensor> src_mask, std::optional<Tensor> src_key_padding_mask,
                                              bool batch_first, bool is_causal, std::vector<double> dropouts, std::optional<Tensor> seed,
                                              bool saves) {
  const auto layer = EncoderLayer::of(src, parameters, num_heads, gelu, norm_first, eps, src_mask, src_key_padding_mask, batch_first,
                                      is_causal, dropouts, seed);
  if (!layer) return {};
  std::vector<Tensor> results = layer->forward(saves);
  results[0] = layer->batch.shaped(results[0], src, batch_first);
  return results;
}

std::vector<Tensor> transformer_encoder_layer_backward(Tensor dout, std::vector<Tensor> saved, Tensor src, std::vector<Tensor> parameters,
                                                       int64_t num_heads, bool gelu, bool norm_first, double eps,
                                                       std::optional<Tensor> src_mask, std::optional<Tensor> src_key_padding_mask,
                                                       bool batch_first, bool is_causal, std::vector<double> dropouts,
                                                       std::optional<Tensor> seed, std::vector<bool> wanted) {
  const auto layer = EncoderLayer::of(src, parameters, num_heads, gelu, norm_first, eps, src_mask, src_key_padding_mask, batch_first,
                                      is_causal, dropouts, seed);
  STD_TORCH_CHECK(layer, "transformer_encoder_layer_backward is given what transformer_encoder_layer takes");
  std::vector<Tensor> grads = layer->backward(dout, saved, wanted);
  if (wanted[0]) grads[0] = rows_like(grads[0], src);
  return grads;
}

}  // namespace fastseq::cpu
