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

// (v - mean) * scale, as torch.nn.LayerNorm normalizes a row
template <class A>
struct Normal {
  using V = typename Lanes<A>::V;
  A mean, scale;

  template <class S>
  Normal(const S* row, int64_t n) {
    constexpr int64_t W = sizeof(V) / sizeof(A);
    V sums{}, squares{};
    for (int64_t i = 0; i < n; i += W) sums += Memory<S, A>::load(row + i, n - i);
    mean = total(sums) / static_cast<A>(n);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const V d = Memory<S, A>::load(row + i, W) - mean;
      squares += d * d;
    }
    if (i < n) {
      const V d = Memory<S, A>::load(row + i, n - i) - mean;
      for (int64_t lane = 0; i + lane < n; ++lane) squares[lane] += d[lane] * d[lane];
    }
    scale = static_cast<A>(1 / std::sqrt(static_cast<double>(total(squares) / static_cast<A>(n)) + 1e-5));
  }
  V operator()(V v) const { return (v - mean) * scale; }
};

template <class S, class A>
void add_vectors_of(const NormVectors& n, int64_t begin, int64_t end, A* sums, A* run) {
  using V = typename Lanes<A>::V;
  using In = Memory<S, A>;
  using Own = Memory<A, A>;
  constexpr int64_t W = sizeof(V) / sizeof(A), kRun = 64;
  const int64_t H = n.hidden, G = n.lstm ? 4 : 3, size = kNormVectors[n.lstm] * H;
  const auto add = [&](int64_t at, V v, int64_t count) { Own::store(run + at, Own::load(run + at, count) + v, count); };
  for (; begin < end; begin += kRun) {
    for (int64_t i = 0; i < size; ++i) run[i] = 0;
    for (int64_t r = begin; r < (begin + kRun < end ? begin + kRun : end); ++r) {
      const S* dgates = static_cast<const S*>(n.dgates.data) + r * n.dgates.stride;
      const S* gates = static_cast<const S*>(n.gates.data) + r * n.gates.stride;
      const S* product = gates + G * H;
      const Normal<A> normal(product, G * H);
      const int64_t plain = n.lstm ? 4 * H : 2 * H;  // gates into which the normalized product goes as it is
      for (int64_t i = 0; i < plain; i += W)
        add(i, In::load(dgates + i, plain - i) * normal(In::load(product + i, plain - i)), plain - i);
      if (!n.lstm) {  // into n it goes times r, with its bias
        for (int64_t u = 0; u < H; u += W) {
          const V dq = In::load(dgates + 2 * H + u, H - u) * In::load(gates + u, H - u);
          add(2 * H + u, dq * normal(In::load(product + 2 * H + u, H - u)), H - u);
          add(3 * H + u, dq, H - u);
        }
        continue;
      }
      const A* c = static_cast<const A*>(n.c.data) + r * n.c.stride;
      const A* dm = static_cast<const A*>(n.dm.data) + r * n.dm.stride;
      const A* scale = static_cast<const A*>(n.vectors) + 4 * H;
      const Normal<A> of_c(c, H);
      for (int64_t u = 0; u < H; u += W) {
        const V normal_c = of_c(Own::load(c + u, H - u));
        const V s = Math<A>::tanh(Own::load(scale + u, H - u) * normal_c + Own::load(scale + H + u, H - u));
        const V ds = Own::load(dm + u, H - u) * In::load(gates + 3 * H + u, H - u) * (A(1) - s * s);
        add(4 * H + u, ds * normal_c, H - u);
        add(5 * H + u, ds, H - u);
      }
    }
    for (int64_t i = 0; i < size; ++i) sums[i] += run[i];
  }
}

void add_vectors(const NormVectors& n, int64_t begin, int64_t end, void* sums, void* run) {
  const auto by = [&]<class S, class A>() {
    add_vectors_of<S, A>(n, begin, end, static_cast<A*>(sums), static_cast<A*>(run));
  };
  switch (n.type) {
    case Type::kFloat: return by.template operator()<float, float>();
    case Type::kDouble: return by.template operator()<double, double>();
    case Type::kBfloat16: return by.template operator()<bfloat16, float>();
    case Type::kHalf: return by.template operator()<float16, float>();
  }
}

}  // namespace

constexpr LayerNormKernels kLayerNormKernels{add_norm, add_bias, add_vectors};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
