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
#include "philox.inl"

template <class V>
auto total(V v) {
  auto sum = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

template <class A>
struct Moments {
  A mean, variance;
};

// Of a row, whose mean is `first` but for the rounding of its sum. That may be more than what is left of numbers that hardly
// differ, whose mean joins it.
template <class S, class A>
Moments<A> moments(const S* row, int64_t n, A first) {
  using V = typename Lanes<A>::V;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  V rest{}, squares{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V d = Memory<S, A>::load(row + i, W) - first;
    rest += d, squares += d * d;
  }
  if (i < n) {
    const V d = Memory<S, A>::load(row + i, n - i) - first;
    for (int64_t lane = 0; i + lane < n; ++lane) rest[lane] += d[lane], squares[lane] += d[lane] * d[lane];
  }
  const A left = total(rest) / static_cast<A>(n), variance = total(squares) / static_cast<A>(n) - left * left;
  return {first + left, variance < 0 ? A(0) : variance};
}

// What a dropout multiplies the numbers of a row by, into a row of scratch.
template <class A>
void fill_factors(const Dropout& dropout, int64_t row, int64_t features, A* factors) {
  using V = typename Lanes<A>::V;
  using I = typename Lanes<A>::I;
  using R = typename Philox::Of<A>;
  using U = typename R::U;
  constexpr int64_t W = Math<A>::kWidth;
  typedef int32_t Narrow __attribute__((vector_size(4 * W)));
  const auto threshold = static_cast<uint32_t>(dropout.probability * 4294967296.0);
  const V kept = V{} + A(1 / (1 - dropout.probability));
  U lane;
  for (int64_t i = 0; i < W; ++i) lane[i] = uint32_t(i);
  for (int64_t group = 0; group < features; group += 64)
    for (int64_t part = 0; part < 16; part += W) {
      U numbers[4];
      R::random(dropout.seed, lane + uint32_t(group / 4 + part), U{} + uint32_t(row), U{} + dropout.which, numbers);
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const V factor = (V)(__builtin_convertvector((Narrow)(numbers[i] >= threshold), I) & (I)kept);
        __builtin_memcpy(factors + group + 16 * i + part, &factor, sizeof factor);
      }
    }
}

template <class S, class A>
void add_norm_of(const AddNorm& n, int64_t begin, int64_t end, A* row) {
  using V = typename Lanes<A>::V;
  using In = Memory<S, A>;
  using Own = Memory<A, A>;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  const int64_t E = n.features;
  const bool drops = n.y && n.dropout.probability > 0;
  A* const factors = row + scratch_row(E);
  const auto *x = static_cast<const S*>(n.x), *y = static_cast<const S*>(n.y);
  const auto *weight = static_cast<const S*>(n.weight), *bias = static_cast<const S*>(n.bias);
  for (int64_t r = begin; r < end; ++r) {
    if (drops) fill_factors(n.dropout, r, E, factors);
    V sums{};
    for (int64_t e = 0; e < E; e += W) {  // lanes beyond the end are 0
      V s = x ? In::load(x + r * E + e, E - e) : V{};
      if (drops)
        s += In::load(y + r * E + e, E - e) * Own::load(factors + e, E - e);
      else if (y)
        s += In::load(y + r * E + e, E - e);
      // as it is stored, so that the gradients, which are formed of that, are those of what is normalized here
      if (y) s = In::rounded(s);
      if (n.sum) In::store(static_cast<S*>(n.sum) + r * E + e, s, E - e);
      Own::store(row + e, s, E - e);
      sums += s;
    }
    if (!n.normalized) continue;
    const auto [mean, variance] = moments<A>(row, E, total(sums) / static_cast<A>(E));
    const A scale = 1 / std::sqrt(variance + static_cast<A>(n.eps));
    if (n.mean) static_cast<A*>(n.mean)[r] = mean, static_cast<A*>(n.scale)[r] = scale;
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
void norm_gradient_of(const NormGradient& n, int64_t begin, int64_t end, A* sums, A* row) {
  using V = typename Lanes<A>::V;
  using In = Memory<S, A>;
  using Own = Memory<A, A>;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  const int64_t E = n.features;
  A *const factors = row + scratch_row(E), *const dweight = sums, *const dbias = sums + E;
  const auto *weight = static_cast<const S*>(n.weight);
  for (int64_t r = begin; r < end; ++r) {
    const auto at = [&](const void* rows) { return rows ? static_cast<const S*>(rows) + r * E : nullptr; };
    const S *dout = at(n.dout), *more = at(n.more), *sum = at(n.sum), *beside = at(n.beside);
    S *const dsum = static_cast<S*>(n.dsum) + r * E, *const dy = n.dy ? static_cast<S*>(n.dy) + r * E : nullptr;
    const A mean = static_cast<const A*>(n.mean)[r], scale = static_cast<const A*>(n.scale)[r];
    V first{}, second{};
    for (int64_t e = 0; e < E; e += W) {  // lanes of d beyond the end are 0
      V d = In::load(dout + e, E - e);
      if (more) d += In::load(more + e, E - e);
      const V normal = (In::load(sum + e, E - e) - mean) * scale, g = d * In::load(weight + e, E - e);
      Own::store(dweight + e, Own::load(dweight + e, E - e) + d * normal, E - e);
      Own::store(dbias + e, Own::load(dbias + e, E - e) + d, E - e);
      Own::store(row + e, g, E - e);
      first += g, second += g * normal;
    }
    const A of_mean = total(first) / static_cast<A>(E), of_scale = total(second) / static_cast<A>(E);
    if (dy) fill_factors(n.dropout, r, E, factors);
    for (int64_t e = 0; e < E; e += W) {
      const V normal = (In::load(sum + e, E - e) - mean) * scale;
      V d = (Own::load(row + e, E - e) - of_mean - normal * of_scale) * scale;
      if (beside) d += In::load(beside + e, E - e);
      In::store(dsum + e, d, E - e);
      if (dy) In::store(dy + e, d * Own::load(factors + e, E - e), E - e);
    }
  }
}

void norm_gradient(const NormGradient& n, int64_t begin, int64_t end, void* sums, void* row) {
  const auto by = [&]<class S, class A>() {
    norm_gradient_of<S, A>(n, begin, end, static_cast<A*>(sums), static_cast<A*>(row));
  };
  switch (n.type) {
    case Type::kFloat: return by.template operator()<float, float>();
    case Type::kDouble: return by.template operator()<double, double>();
    case Type::kBfloat16: return by.template operator()<bfloat16, float>();
    case Type::kHalf: return by.template operator()<float16, float>();
  }
}

// The normal distribution: its function below x, and its density there.
template <class A>
struct Gaussian {
  using V = typename Lanes<A>::V;
  V below, density;

  explicit FASTSEQ_HOST_DEVICE Gaussian(V x) {
    constexpr A kDensity = A(0.39894228040143267794);  // 1 / sqrt(2 pi)
    const V size = x < 0 ? -x : x, e = Math<A>::exp(size * size * A(-0.5));
    density = e * kDensity;
    V tail;  // what is further from 0 on the same side
    if constexpr (sizeof(A) == 4) {
      const V t = Math<A>::divide(V{} + A(1), size * kNear + A(1));
      constexpr int last = sizeof(kTail) / sizeof(float) - 1;
      V q = V{} + kTail[last];
#pragma GCC unroll 16
      for (int i = last - 1; i >= 0; --i) q = q * t + kTail[i];
      tail = e * t * q;
    } else {
      for (unsigned i = 0; i < sizeof(V) / sizeof(A); ++i) tail[i] = std::erfc(size[i] * A(0.70710678118654752440)) / 2;
    }
    below = x < 0 ? tail : A(1) - tail;
  }

 private:
  // minimax of the tail / (e^(-x^2 / 2) t) over t = 1 / (1 + kNear x) on [0, 1], relative error 3.4e-8
  static constexpr float kNear = 0.25f;
  static constexpr float kTail[] = {0.0997355655f, 0.0997364298f, 0.0934663564f, 0.0816031098f, 0.0589751303f,
                                    0.0636991933f, -0.0317176953f, 0.0955972821f, -0.0808774307f, 0.0197820365f};
};

template <class S, class A>
void activate_of(const Activation& a, int64_t begin, int64_t end, A* row) {
  using V = typename Lanes<A>::V;
  using I = typename Lanes<A>::I;
  using In = Memory<S, A>;
  using Own = Memory<A, A>;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  const int64_t F = a.features;
  const bool drops = a.dropout.probability > 0;
  for (int64_t r = begin; r < end; ++r) {
    if (drops) fill_factors(a.dropout, r, F, row);
    const S* before = static_cast<const S*>(a.before) + r * F;
    S* after = static_cast<S*>(a.after) + r * F;
    for (int64_t f = 0; f < F; f += W) {
      const V x = In::load(before + f, F - f);
      V y = a.gelu ? x * Gaussian<A>(x).below : Math<A>::relu(x);
      if (drops) {
        const V factor = Own::load(row + f, F - f);
        y = y * factor + A(0);  // of a zero with a sign: one without
        y = factor > 0 ? y : (V)(I{} + Lanes<A>::kSign);
      }
      In::store(after + f, y, F - f);
    }
  }
}

void activate(const Activation& a, int64_t begin, int64_t end, void* row) {
  const auto by = [&]<class S, class A>() { activate_of<S, A>(a, begin, end, static_cast<A*>(row)); };
  switch (a.type) {
    case Type::kFloat: return by.template operator()<float, float>();
    case Type::kDouble: return by.template operator()<double, double>();
    case Type::kBfloat16: return by.template operator()<bfloat16, float>();
    case Type::kHalf: return by.template operator()<float16, float>();
  }
}

template <class S, class A>
void activation_gradient_of(const Activation& a, S* gradients, int64_t begin, int64_t end) {
  using V = typename Lanes<A>::V;
  using I = typename Lanes<A>::I;
  using In = Memory<S, A>;
  constexpr int64_t W = sizeof(V) / sizeof(A);
  const int64_t F = a.features;
  const bool drops = a.dropout.probability > 0;
  const A kept = A(1 / (1 - a.dropout.probability));
  for (int64_t i = begin * F; i < end * F; i += W) {
    const int64_t n = end * F - i;
    const V after = In::load(static_cast<const S*>(a.after) + i, n);
    V d = In::load(gradients + i, n) * kept;
    if (a.gelu) {
      const V x = In::load(static_cast<const S*>(a.before) + i, n);
      const Gaussian<A> of_x(x);
      d *= of_x.below + x * of_x.density;
      if (drops) d = (I)after == Lanes<A>::kSign ? V{} : d;
    } else {
      d = after <= 0 ? V{} : d;
    }
    In::store(gradients + i, d, n);
  }
}

void activation_gradient(const Activation& a, void* gradients, int64_t begin, int64_t end) {
  const auto by = [&]<class S, class A>() { activation_gradient_of<S, A>(a, static_cast<S*>(gradients), begin, end); };
  switch (a.type) {
    case Type::kFloat: return by.template operator()<float, float>();
    case Type::kDouble: return by.template operator()<double, double>();
    case Type::kBfloat16: return by.template operator()<bfloat16, float>();
    case Type::kHalf: return by.template operator()<float16, float>();
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
    V sums{};
    for (int64_t i = 0; i < n; i += W) sums += Memory<S, A>::load(row + i, n - i);
    const Moments<A> found = moments(row, n, total(sums) / static_cast<A>(n));
    mean = found.mean, scale = static_cast<A>(1 / std::sqrt(static_cast<double>(found.variance) + 1e-5));
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

constexpr LayerNormKernels kLayerNormKernels{add_norm, norm_gradient, activate, activation_gradient, add_bias, add_vectors};

}  // namespace fastseq::cpu::FASTSEQ_LEVEL
