// The loops of layer_norm.h for one instruction set. Included by layer_norm_<level>.cpp, which defines FASTSEQ_LEVEL and
// FASTSEQ_VECTOR_BYTES.

#include <cmath>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/portable.h"
#include "layer_norm.h"

namespace fastseq::cpu::FASTSEQ_LEVEL {
namespace {

#include "vector.inl"

template <class V>
auto total(V v) {
  auto sum = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

template <class S, class A>
void add_norm_of(const AddNorm& n, int64_t begin, int64_t end, A* row) {
  using V = typename Lanes<A>::V;
  using In = Memory<S, A>;
  using Own = Memory<A, A>;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  const int64_t E = n.features;
  const auto *x = static_cast<const S*>(n.x), *y = static_cast<const S*>(n.y);
  const auto *weight = static_cast<const S*>(n.weight), *bias = static_cast<const S*>(n.bias);
  for (int64_t r = begin; r < end; ++r) {
    V sums{};
    for (int64_t e = 0; e < E; e += W) {  // lanes beyond the end are 0
      V s = In::load(x + r * E + e, E - e);
      if (y) s += In::load(y + r * E + e, E - e);
      if (n.sum) In::store(static_cast<S*>(n.sum) + r * E + e, s, E - e);
      Own::store(row + e, s, E - e);
      sums += s;
    }
    if (!n.normalized) continue;
    const A mean = total(sums) / static_cast<A>(E);
    V squares{};
    for (int64_t e = 0; e + W <= E; e += W) {
      const V d = Own::load(row + e, W) - mean;
      squares += d * d;
    }
    A square = total(squares);
    for (int64_t e = E / W * W; e < E; ++e) square += (row[e] - mean) * (row[e] - mean);
    const A scale = 1 / std::sqrt(square / static_cast<A>(E) + static_cast<A>(n.eps));
    for (int64_t e = 0; e < E; e += W) {
      const V d = (Own::load(row + e, E - e) - mean) * scale;
      In::store(static_cast<S*>(n.normalized) + r * E + e, d * In::load(weight + e, E - e) + In::load(bias + e, E - e), E - e);
    }
  }
}

void add_norm(const AddNorm& n, int64_t begin, int64_t end, void* row) {
  switch (n.type) {
    case Type::kFloat: return add_norm_of<float, float>(n, begin, end, static_cast<float*>(row));
    case Type::kDouble: return add_norm_of<double, double>(n, begin, end, static_cast<double*>(row));
    case Type::kBfloat16: return add_norm_of<bfloat16, float>(n, begin, end, static_cast<float*>(row));
    case Type::kHalf: return add_norm_of<float16, float>(n, begin, end, static_cast<float*>(row));
  }
}

template <class S, class A>
void add_bias_of(S* rows, const S* bias, int64_t features, int64_t begin, int64_t end, bool relu) {
  using V = typename Lanes<A>::V;
  using In = Memory<S, A>;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  for (int64_t r = begin; r < end; ++r)
    for (int64_t e = 0; e < features; e += W) {
      const V sum = In::load(rows + r * features + e, features - e) + In::load(bias + e, features - e);
      In::store(rows + r * features + e, relu ? Math<A>::relu(sum) : sum, features - e);
    }
}

void add_bias(Type type, void* rows, const void* bias, int64_t features, int64_t begin, int64_t end, bool relu) {
  const auto add = [&]<class S, class A>() {
    add_bias_of<S, A>(static_cast<S*>(rows), static_cast<const S*>(bias), features, begin, end, relu);
  };
  switch (type) {
    case Type::kFloat: return add.template operator()<float, float>();
    case Type::kDouble: return add.template operator()<double, double>();
    case Type::kBfloat16: return add.template operator()<bfloat16, float>();
    case Type::kHalf: return add.template operator()<float16, float>();
  }
}

}  // namespace

constexpr LayerNormKernels kLayerNormKernels{add_norm, add_bias};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
