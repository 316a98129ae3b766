#include "attention_decode.h"

#include "attention_few.h"
#include "host.h"

namespace fastseq::cpu {
namespace {

// What the kernels rely on; the Python side of the op sees to it, a caller of the raw op may not.
void expect(const std::optional<Tensor>& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->scalar_type() == type, "attention_decode: ", name, " has a wrong dtype");
  STD_TORCH_CHECK(tensor->dim() == static_cast<int64_t>(sizes.size()), "attention_decode: ", name, " must have ", sizes.size(),
                  " dimensions, got ", tensor->dim());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(tensor->size(dim) == size, "attention_decode: ", name, " must have ", size, " in dimension ", dim, ", got ",
                    tensor->size(dim));
    ++dim;
  }
}

void expect_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, "attention_decode: ", name, " must have 4 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, "attention_decode: the last dimension of ", name,
                  " must be contiguous");
}

void expect_contiguous(const std::optional<Tensor>& tensor, const char* name) {
  STD_TORCH_CHECK(!tensor || tensor->is_contiguous(), "attention_decode: ", name, " must be contiguous");
}

template <size_t N>
Tensor empty(const int64_t (&sizes)[N], const int64_t (&strides)[N], ScalarType type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

template <class Rows>
Rows rows_of(const Tensor& tensor, decltype(Rows::data) data) {
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, std::optional<Tensor> block_table,
                                            std::optional<Tensor> slopes, std::optional<Tensor> sinks, double scale, double softcap,
                                            int64_t left, int64_t right, int64_t num_splits) {
  expect_rows(q, "q"), expect_rows(k_cache, "k_cache"), expect_rows(v_cache, "v_cache");
  const ScalarType narrow = q.scalar_type();
  Attention a{};
  a.type = type_of(narrow);
  const ScalarType wide = a.type == Type::kDouble ? ScalarType::Double : ScalarType::Float;
  a.batch = q.size(0), a.heads = q.size(1), a.queries = q.size(2), a.features = q.size(3);
  a.key_heads = k_cache.size(1), a.value_features = v_cache.size(3);
  const int64_t places = k_cache.size(0), room = k_cache.size(2);
  expect(k_cache, "k_cache", narrow, {block_table ? places : a.batch, a.key_heads, room, a.features});
  expect(v_cache, "v_cache", narrow, {places, a.key_heads, room, a.value_features});
  STD_TORCH_CHECK(a.heads == a.key_heads || (a.key_heads && a.heads % a.key_heads == 0),
                  "attention_decode: heads must be a multiple of those of the cache, got ", a.heads, " and ", a.key_heads);
  expect(lengths, "lengths", ScalarType::Int, {a.batch}), expect_contiguous(lengths, "lengths");
  if (slopes) expect(slopes, "slopes", wide, {slopes->dim() && slopes->size(0) == 1 ? 1 : a.batch, a.heads});
  expect_contiguous(slopes, "slopes");
  expect(sinks, "sinks", wide, {a.heads}), expect_contiguous(sinks, "sinks");
  STD_TORCH_CHECK(num_splits >= 0, "attention_decode: num_splits must not be negative, got ", num_splits);
  if (block_table) {
    STD_TORCH_CHECK(block_table->dim() == 2, "attention_decode: block_table must have 2 dimensions, got ", block_table->dim());
    expect(block_table, "block_table", ScalarType::Int, {a.batch, block_table->size(1)});
    STD_TORCH_CHECK(block_table->size(1) <= 1 || block_table->stride(1) == 1,
                    "attention_decode: the last dimension of block_table must be contiguous");
  }

  const int64_t B = a.batch, H = a.heads, T = a.queries, Ev = a.value_features;
  const Tensor out = empty<4>({B, H, T, Ev}, {T * H * Ev, Ev, H * Ev, 1}, narrow);  // time before heads
  const Tensor lse = empty<3>({B, H, T}, {H * T, T, 1}, wide);
  a.keys = block_table ? (places ? block_table->size(1) * room : 0) : room;
  if (block_table && a.keys) {
    a.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    a.block_table_b = block_table->stride(0), a.page_size = room, a.pages = places;
  }
  a.q = rows_of<ConstRows>(q, data(q));
  a.k = rows_of<ConstRows>(k_cache, data(k_cache));
  a.v = rows_of<ConstRows>(v_cache, data(v_cache));
  a.out = rows_of<MutableRows>(out, mutable_data(out));
  a.k_lengths = static_cast<const int32_t*>(data(lengths));
  a.left = left, a.right = right, a.bottom_right = true;
  a.scale = scale, a.softcap = softcap;
  a.slopes = data(slopes), a.slopes_b = slopes && slopes->size(0) > 1 ? a.heads : 0;
  a.sinks = data(sinks), a.sinks_type = type_of(wide);
  a.lse = mutable_data(lse), a.lse_b = H * T, a.lse_h = T;
  attention_few(a, num_splits);
  return {out, lse};
}

}  // namespace fastseq::cpu
