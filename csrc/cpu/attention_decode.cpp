#include "attention_decode.h"

#include <cmath>

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

// [B, H, T, ..], or [B, T, H, ..] with time first
template <class Rows>
Rows rows_of(const Tensor& tensor, decltype(Rows::data) data, bool time_first = false) {
  return {data, tensor.stride(0), tensor.stride(time_first ? 2 : 1), tensor.stride(time_first ? 1 : 2)};
}

}  // namespace

std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, std::optional<Tensor> block_table,
                                            std::optional<Tensor> slopes, std::optional<Tensor> sinks, double scale, double softcap,
                                            int64_t left, int64_t right, int64_t num_splits) {
  expect_rows(q, "q"), expect_rows(k_cache, "k_cache"), expect_rows(v_cache, "v_cache");
  const ScalarType narrow = q.scalar_type();
  Attention a{};
  a.type = type_of(narrow);
  const ScalarType wide = wide_of(narrow);
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
  const Tensor out = empty({B, H, T, Ev}, narrow, true), lse = empty({B, H, T}, wide);
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

namespace {

bool rows_fit(const Tensor& tensor, ScalarType type) {
  return plain(tensor) && tensor.dim() == 4 && tensor.scalar_type() == type && (tensor.stride(3) == 1 || tensor.size(3) <= 1);
}

// What shapes the scores, of each head, contiguous.
bool of_heads(const std::optional<Tensor>& tensor, int64_t heads) {
  return !tensor || (plain(tensor) && tensor->is_contiguous() && tensor->dim() && tensor->size(tensor->dim() - 1) == heads);
}

// Elements of int32 or int64 tensors, as int32: one that a conversion would change becomes -1, which no caller accepts.
class Integers {
 public:
  explicit Integers(const Tensor& tensor)
      : data_(data(tensor)), is_long_(tensor.scalar_type() == ScalarType::Long), stride_(tensor.dim() ? tensor.stride(-1) : 0) {}
  static bool fit(const Tensor& tensor, int64_t dims) {
    return plain(tensor) && tensor.dim() == dims && (tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long);
  }
  int32_t at(int64_t offset, int64_t i) const {
    const int64_t place = offset + i * stride_;
    if (!is_long_) return static_cast<const int32_t*>(data_)[place];
    const int64_t value = static_cast<const int64_t*>(data_)[place];
    return value == static_cast<int32_t>(value) ? static_cast<int32_t>(value) : -1;
  }

 private:
  const void* data_;
  bool is_long_;
  int64_t stride_;
};

// Writes new rows [B, Hkv, Tn] of a cache behind the first ones that it has.
void append(const Attention& a, const ConstRows& cache, const ConstRows& rows, const int32_t* totals, int64_t count, int64_t bytes,
            int64_t row_bytes) {
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t j = totals[b] - count + t;
      const int64_t place = a.block_table ? a.block_table[b * a.block_table_b + j / a.page_size] : b;
      for (int64_t h = 0; h < a.key_heads; ++h) {
        const void* from = offset(rows.data, rows.offset(b, h, t) * bytes);
        std::memmove(const_cast<void*>(offset(cache.data, cache.offset(place, h, a.block_table ? j % a.page_size : j) * bytes)), from,
                     row_bytes);
      }
    }
  }
}

}  // namespace

std::vector<Tensor> attention_with_kv_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, std::optional<Tensor> k_new,
                                            std::optional<Tensor> v_new, std::optional<Tensor> block_table,
                                            std::optional<Tensor> slopes, std::optional<Tensor> sinks, bool time_first,
                                            std::optional<double> scale, double softcap, int64_t left, int64_t right,
                                            int64_t num_splits) {
  const ScalarType narrow = q.scalar_type();
  if (!is_stored(narrow) || !rows_fit(q, narrow) || !rows_fit(k_cache, narrow) || !rows_fit(v_cache, narrow)) return {};
  const int64_t of_heads_dim = time_first ? 2 : 1, of_time = time_first ? 1 : 2;
  Attention a{};
  a.type = type_of(narrow);
  const ScalarType wide = wide_of(narrow);
  const int64_t B = a.batch = q.size(0), H = a.heads = q.size(of_heads_dim), T = a.queries = q.size(of_time), E = a.features = q.size(3);
  const int64_t Hkv = a.key_heads = k_cache.size(of_heads_dim), Ev = a.value_features = v_cache.size(3);
  const int64_t places = k_cache.size(0), room = k_cache.size(of_time);
  if (k_cache.size(3) != E || v_cache.size(0) != places || v_cache.size(of_heads_dim) != Hkv || v_cache.size(of_time) != room) return {};
  if (Hkv == 0 || H % Hkv || room == 0 || places == 0 || (!block_table && places != B)) return {};
  int64_t more = 0;
  if (k_new && v_new) {
    more = k_new->dim() == 4 ? k_new->size(of_time) : 0;
    for (const auto& [rows, features] : {std::pair{&*k_new, E}, std::pair{&*v_new, Ev}})
      if (!rows_fit(*rows, narrow) || rows->size(0) != B || rows->size(of_heads_dim) != Hkv || rows->size(of_time) != more ||
          rows->size(3) != features)
        return {};
  }
  if (!Integers::fit(cache_seqlens, 1) || cache_seqlens.size(0) != B) return {};
  if (!of_heads(slopes, H) || (slopes && (slopes->scalar_type() != wide || slopes->dim() > 2 ||
                                          (slopes->dim() == 2 && slopes->size(0) != 1 && slopes->size(0) != B))))
    return {};
  if (!of_heads(sinks, H) || (sinks && (sinks->dim() != 1 || (sinks->scalar_type() != narrow && sinks->scalar_type() != wide)))) return {};
  if (block_table && (!Integers::fit(*block_table, 2) || block_table->size(0) != B)) return {};

  const int64_t pages = block_table ? block_table->size(1) : 0;
  a.keys = block_table ? pages * room : room;
  const Buffer integers((B + B * pages) * sizeof(int32_t));
  auto* const totals = static_cast<int32_t*>(integers.get());
  int32_t* const table = totals + B;
  const Integers lengths(cache_seqlens);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = lengths.at(0, b);
    if (length < 0 || length > a.keys - more) return {};
    totals[b] = length + more;
  }
  if (block_table) {
    // pages that something is read from or written to
    const Integers entries(*block_table);
    for (int64_t b = 0; b < B; ++b) {
      const int64_t first_seen = left >= 0 ? totals[b] - T - left : 0, first = std::max<int64_t>(0, std::min(first_seen, totals[b] - more));
      for (int64_t p = first / room; p * room < totals[b]; ++p) {
        const int32_t page = table[b * pages + p] = entries.at(b * block_table->stride(0), p);
        if (page < 0 || page >= places) return {};
      }
    }
    a.block_table = table, a.block_table_b = pages, a.page_size = room, a.pages = places;
  }

  a.q = rows_of<ConstRows>(q, data(q), time_first);
  a.k = rows_of<ConstRows>(k_cache, data(k_cache), time_first);
  a.v = rows_of<ConstRows>(v_cache, data(v_cache), time_first);
  if (more) {
    const int64_t bytes = bytes_of(a.type);
    append(a, a.k, rows_of<ConstRows>(*k_new, data(*k_new), time_first), totals, more, bytes, E * bytes);
    append(a, a.v, rows_of<ConstRows>(*v_new, data(*v_new), time_first), totals, more, bytes, Ev * bytes);
  }
  const Tensor out = time_first ? empty({B, T, H, Ev}, narrow) : empty({B, H, T, Ev}, narrow, true);
  const Tensor lse = empty({B, H, T}, wide);
  a.out = rows_of<MutableRows>(out, mutable_data(out), time_first);
  a.k_lengths = totals;
  a.left = left, a.right = right, a.bottom_right = true;
  a.scale = scale ? *scale : E ? 1 / std::sqrt(static_cast<double>(E)) : 1, a.softcap = softcap;
  a.slopes = data(slopes), a.slopes_b = slopes && slopes->dim() == 2 && slopes->size(0) > 1 ? H : 0;
  a.sinks = data(sinks), a.sinks_type = sinks ? type_of(sinks->scalar_type()) : a.type;
  a.lse = mutable_data(lse), a.lse_b = H * T, a.lse_h = T;
  attention_few(a, num_splits);
  return {out, lse};
}

}  // namespace fastseq::cpu
