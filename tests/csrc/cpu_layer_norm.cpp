// Runs the loops of csrc/cpu/layer_norm_<LEVEL>.cpp without torch: odd sizes, a part of the rows, with and without what may be
// absent, in place, dropouts, rows of numbers that hardly differ, against plain loops in double.

#include "cpu/layer_norm.h"
#include "cpu_harness.h"

namespace {

#include "cpu_harness.inl"

using namespace fastseq::cpu;

// Philox 4x32-10 (Salmon et al., 2011)
uint32_t random_number(uint64_t seed, uint32_t first, uint32_t second, uint32_t third, int which) {
  uint32_t c[4] = {first, second, third, 0}, keys[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53) * c[0], b = uint64_t(0xCD9E8D57) * c[2];
    const uint32_t next[] = {uint32_t(b >> 32) ^ c[1] ^ keys[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ keys[1], uint32_t(a)};
    std::copy_n(next, 4, c);
    keys[0] += 0x9E3779B9, keys[1] += 0xBB67AE85;
  }
  return c[which];
}

double factor(const Dropout& dropout, int64_t row, int64_t e) {
  const double number = random_number(dropout.seed, e / 64 * 16 + e % 16, row, dropout.which, e / 16 % 4);
  return number < std::floor(dropout.probability * 0x1p32) ? 0 : 1 / (1 - dropout.probability);
}

// Of one row, as torch.nn.LayerNorm has it, in more than double, whose own rounding of the mean would be all that is left of some.
struct Normal {
  long double mean = 0, variance = 0;
  double scale, furthest = 0;  // from the mean
  double rounding;  // what is allowed of the mean's, in normalized numbers

  template <class Row>
  Normal(int64_t n, double eps, double unit, const Row& row) {
    for (int64_t i = 0; i < n; ++i) mean += row(i);
    mean /= n;
    for (int64_t i = 0; i < n; ++i) {
      variance += (row(i) - mean) * (row(i) - mean) / n;
      furthest = std::max(furthest, double(std::fabs(row(i) - mean)));
    }
    scale = 1 / std::sqrt(variance + eps);
    // the mean is rounded once, however long the row; what is left of it is as exact as the distances are
    rounding = unit * (2.5 * std::fabs(double(mean)) + 64 * furthest) * scale;
  }
  double operator()(double x) const { return (x - mean) * scale; }
};

template <class S>
class Run {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  static constexpr double kUnit = std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;  // half of a last place of 1, of numbers A
  static constexpr Type kType = kTypeOf<S>;

 public:
  Run(int64_t features, int64_t rows, unsigned seed) : E_(features), R_(rows), random_(seed) {
    begin_ = random_() % 2, end_ = std::max<int64_t>(begin_ + 1, R_ - random_() % 2);
    for (int64_t r = 0; r < R_; ++r) hardly_.push_back(random_() % 3 == 0);
  }

  bool right() {
    add_norm();
    norm_gradient();
    activation(false), activation(true);
    add_bias();
    add_vectors(false), add_vectors(true);
    return good_;
  }

 private:
  const LayerNormKernels& kernels() const { return OF_LEVEL(layer_norm_, LEVEL)(); }
  bool one_in(unsigned n) { return random_() % n == 0; }
  double number() { return normal_(random_); }

  template <class T>
  void fill(const Array<T>& array, double size = 1) {
    for (int64_t i = 0; i < array.count(); ++i) array[i] = stored<T>(size * number());
  }
  // some rows of numbers that differ by as much as a rounding or not at all
  template <class T>
  void fill_rows(const Array<T>& rows, int64_t n, int64_t stride, int64_t first) {
    for (int64_t r = 0; r < R_; ++r) {
      const double all = 3 * number(), noise = hardly_[r] ? r % 2 * 1e-6 : 1;
      for (int64_t i = 0; i < n; ++i) rows[r * stride + first + i] = stored<T>((hardly_[r] ? all : 0) + noise * number());
    }
  }

  Dropout a_dropout(double probability) {
    return {probability, uint64_t(random_()) << 32 | random_(), uint32_t(random_() % 4)};
  }
  // what a result of S may be wrong by for being stored
  static double storing(double x) {
    return std::ldexp(std::fabs(x), -kDigits<S>) + (std::is_same_v<S, float16> ? 0x1p-25 : 1e-37);
  }

  void expect(const char* what, int64_t r, int64_t e, double found, double expected, double bound) {
    if (!good_ || std::fabs(found - expected) <= bound) return;
    const char* const types[] = {"float", "double", "bfloat16", "float16"};
    std::printf("%s of %lld features: wrong result: %s[%lld][%lld] is %.9g, expected %.9g within %.2g\n", types[int(kType)],
                (long long)E_, what, (long long)r, (long long)e, found, expected, bound);
    good_ = false;
  }
  // that nobody wrote the rows before `begin` and from `end` on
  template <class T>
  void expect_untouched(const char* what, const Array<T>& rows, int64_t width) {
    for (int64_t r = 0; r < R_ && rows.count(); ++r)
      for (int64_t e = 0; e < width && (r < begin_ || r >= end_); ++e)
        if (!std::isnan(value(rows[r * width + e]))) expect(what, r, e, 0, 1, 0);
  }

  static Doubles values(const Array<S>& array) {
    Doubles all(array.count());
    for (int64_t i = 0; i < array.count(); ++i) all[i] = value(array[i]);
    return all;
  }

  void add_norm() {
    const bool norms = !one_in(4), with_x = !one_in(3), with_y = !with_x || one_in(2);
    enum { kNone, kOwn, kX, kY } to = one_in(2) && norms ? kNone : one_in(2) ? kOwn : with_x ? kX : kY;
    const bool over_x = norms && !with_y && to == kNone && one_in(2);
    // what is not stored is told from outside if its terms are rounded once
    const Dropout dropout = a_dropout(!with_y || one_in(2) ? 0 : to == kNone ? 0.75 : 0.3);
    const Array<S> x(with_x ? R_ * E_ : 0), y(with_y ? R_ * E_ : 0), weight(norms ? E_ : 0), bias(norms ? E_ : 0);
    const Array<S> own_sum(to == kOwn ? R_ * E_ : 0), own_normalized(norms && !over_x ? R_ * E_ : 0);
    const Array<A> mean(norms ? R_ : 0), scale(norms ? R_ : 0), scratch(dropout.probability > 0 ? 2 * scratch_row(E_) : E_);
    if (with_x) fill_rows(x, E_, E_, 0);
    if (with_y) fill_rows(y, E_, E_, 0);
    fill(weight), fill(bias);
    const Doubles of_x = values(x), of_y = values(y);
    const double eps[] = {1e-5, 1e-2, 1e-12};
    const Array<S>& sum = to == kX ? x : to == kY ? y : own_sum;
    const Array<S>& normalized = over_x ? x : own_normalized;
    const AddNorm n{kType, E_, x.data(), y.data(), weight.data(), bias.data(), eps[random_() % 3], to ? sum.data() : nullptr,
                    norms ? normalized.data() : nullptr, mean.data(), scale.data(), dropout};
    kernels().add_norm(n, begin_, end_, scratch.data());

    Doubles s(E_);
    for (int64_t r = begin_; r < end_; ++r) {
      for (int64_t e = 0; e < E_; ++e) {
        const int64_t i = r * E_ + e;
        const double term = with_x ? of_x[i] : 0, kept = dropout.probability > 0 ? factor(dropout, r, e) : 1;
        const double of_dropped = with_y ? of_y[i] * kept : 0;
        s[e] = value(stored<S>(A(term + of_dropped)));
        if (!to) continue;
        const double found = value(sum[i]);
        const double bound = 2 * storing(s[e]) + 4 * kUnit * (std::fabs(term) + std::fabs(of_dropped));
        expect("sum", r, e, found, s[e], with_y ? bound : 0);
        s[e] = found;
      }
      if (!norms) continue;
      const Normal normal(E_, n.eps, kUnit, [&](int64_t e) { return s[e]; });
      expect("mean", r, 0, mean[r], normal.mean, normal.rounding / normal.scale);
      expect("scale", r, 0, scale[r], normal.scale, 64 * kUnit * normal.scale);
      for (int64_t e = 0; e < E_; ++e) {
        const double w = value(weight[e]), b = value(bias[e]), expected = normal(s[e]) * w + b;
        expect("normalized", r, e, value(normalized[r * E_ + e]), expected,
               std::fabs(w) * normal.rounding + 4 * kUnit * std::fabs(b) + storing(expected));
      }
    }
    if (!over_x) expect_untouched("normalized", own_normalized, E_);
    expect_untouched("sum", own_sum, E_), expect_untouched("mean", mean, 1), expect_untouched("scale", scale, 1);
  }

  void norm_gradient() {
    const bool drops = one_in(2);
    const Dropout dropout = a_dropout(drops ? 0.4 : 0);
    const Array<S> dout(R_ * E_), more(one_in(2) ? R_ * E_ : 0), sum(R_ * E_), weight(E_), beside(one_in(2) ? R_ * E_ : 0);
    const Array<S> dsum(R_ * E_), dy(drops ? R_ * E_ : 0);
    const Array<A> mean(R_), scale(R_), sums(2 * E_), scratch(2 * scratch_row(E_));
    fill(dout), fill(more), fill_rows(sum, E_, E_, 0), fill(weight), fill(beside), fill(sums);
    for (int64_t r = 0; r < R_; ++r) {
      const Normal normal(E_, 1e-5, kUnit, [&](int64_t e) { return value(sum[r * E_ + e]); });
      mean[r] = A(normal.mean), scale[r] = A(normal.scale);
    }
    Doubles expected(2 * E_), size(2 * E_);
    for (int64_t i = 0; i < 2 * E_; ++i) expected[i] = sums[i], size[i] = std::fabs(expected[i]);
    const NormGradient n{kType,         E_,            dout.data(),   more.data(), sum.data(), mean.data(), scale.data(),
                         weight.data(), beside.data(), dsum.data(), dy.data(),   dropout};
    kernels().norm_gradient(n, begin_, end_, sums.data(), scratch.data());

    const auto at = [](const Array<S>& array, int64_t i) { return array.count() ? value(array[i]) : 0; };
    for (int64_t r = begin_; r < end_; ++r) {
      Doubles g(E_), normal(E_);
      double of_mean = 0, of_scale = 0, size_of_mean = 0, size_of_scale = 0;
      for (int64_t e = 0; e < E_; ++e) {
        const double first = at(dout, r * E_ + e), second = at(more, r * E_ + e), d = first + second;
        const double size_of_d = std::fabs(first) + std::fabs(second);
        normal[e] = (value(sum[r * E_ + e]) - mean[r]) * scale[r], g[e] = d * value(weight[e]);
        expected[e] += d * normal[e], size[e] += size_of_d * std::fabs(normal[e]);
        expected[E_ + e] += d, size[E_ + e] += size_of_d;
        of_mean += g[e] / E_, of_scale += g[e] * normal[e] / E_;
        const double size_of_g = size_of_d * std::fabs(value(weight[e]));
        size_of_mean += size_of_g / E_, size_of_scale += size_of_g * std::fabs(normal[e]) / E_;
      }
      for (int64_t e = 0; e < E_; ++e) {
        const double b = at(beside, r * E_ + e), d = (g[e] - of_mean - normal[e] * of_scale) * scale[r] + b;
        const double size_of_g = std::fabs(g[e]) + size_of_mean + std::fabs(normal[e]) * size_of_scale;
        const double size_of_d = size_of_g * scale[r] + std::fabs(b);
        expect("dsum", r, e, value(dsum[r * E_ + e]), d, 64 * kUnit * size_of_d + storing(d));
        if (!drops) continue;
        const double f = factor(dropout, r, e);
        expect("dy", r, e, value(dy[r * E_ + e]), d * f, 66 * kUnit * size_of_d * f + storing(d * f));
      }
    }
    for (int64_t e = 0; e < E_; ++e)
      for (int i = 0; i < 2; ++i)
        expect(i ? "dbias" : "dweight", 0, e, sums[i * E_ + e], expected[i * E_ + e], (R_ + 4) * kUnit * size[i * E_ + e]);
    expect_untouched("dsum", dsum, E_), expect_untouched("dy", dy, E_);
  }

  void activation(bool gelu) {
    const bool in_place = !gelu && one_in(2);
    const Dropout dropout = a_dropout(one_in(2) ? 0 : 0.3);
    const bool drops = dropout.probability > 0;
    const double kept = 1 / (1 - dropout.probability);
    const Array<S> before(R_ * E_), own(in_place ? 0 : R_ * E_), gradients(R_ * E_);
    const Array<A> scratch(drops ? scratch_row(E_) : 0);
    const Array<S>& after = in_place ? before : own;
    fill(before, 2), fill(gradients);
    for (int64_t i = 0; i < R_ * E_; i += 5) before[i] = stored<S>(i % 2 ? 0.0 : -0.0);
    const Doubles x = values(before), given = values(gradients);
    const Activation a{kType, E_, gelu, before.data(), after.data(), dropout};
    kernels().activate(a, begin_, end_, scratch.data());
    kernels().activation_gradient(a, gradients.data(), begin_, end_);

    for (int64_t i = 0; i < R_ * E_; ++i) {
      const int64_t r = i / E_, e = i % E_;
      if (r < begin_ || r >= end_) {
        expect("gradients", r, e, value(gradients[i]), given[i], 0);
        continue;
      }
      const double found = value(after[i]), below = std::erfc(-x[i] * std::sqrt(0.5)) / 2, error = kUnit * (32 + 4 * x[i] * x[i]);
      if (drops && factor(dropout, r, e) == 0) {
        expect("dropped", r, e, found == 0 && std::signbit(found), 1, 0);
        expect("gradients", r, e, value(gradients[i]), 0, 0);
        continue;
      }
      const double y = (gelu ? x[i] * below : std::max(0.0, x[i])) * kept;
      const double density = std::exp(x[i] * x[i] / -2) / std::sqrt(2 * M_PI);
      const double slope = gelu ? below + x[i] * density : x[i] > 0, gradient = given[i] * slope * kept;
      expect("after", r, e, found, y, error * std::fabs(y) + storing(y));
      // what is too small for its type may be taken for dropped
      const bool vanished = found == 0 && std::signbit(found);
      if (drops && x[i] == 0) expect("the sign of a zero that stays", r, e, vanished, 0, 0);
      const double of_slope = error * (below + std::fabs(x[i])) + (drops && vanished ? 1e-6 : 0);
      expect("gradients", r, e, value(gradients[i]), gradient, of_slope * std::fabs(given[i]) * kept + storing(gradient));
    }
    expect_untouched("after", own, E_);
  }

  void add_bias() {
    const bool relu = one_in(2);
    const Array<S> rows(R_ * E_), bias(E_);
    fill(rows), fill(bias);
    const Doubles given = values(rows);
    kernels().add_bias(kType, rows.data(), bias.data(), E_, begin_, end_, relu);
    for (int64_t i = 0; i < R_ * E_; ++i) {
      const bool within = i / E_ >= begin_ && i / E_ < end_;
      const double sum = given[i] + (within ? value(bias[i % E_]) : 0);
      const double bound = within ? storing(sum) + kUnit * std::fabs(sum) : 0;
      expect("rows", i / E_, i % E_, value(rows[i]), relu && within ? std::max(0.0, sum) : sum, bound);
    }
  }

  void add_vectors(bool lstm) {
    const int64_t H = E_, G = lstm ? 4 : 3, V = kNormVectors[lstm];
    const auto gap = [&] { return int64_t(random_() % 4); };  // from a row to the next
    const int64_t of_dgates = G * H + gap(), of_gates = 2 * G * H + gap(), of_dm = H + gap(), of_c = H + gap();
    const auto rows_of = [&](int64_t stride, int64_t width) { return (R_ - 1) * stride + width; };
    const Array<S> dgates(rows_of(of_dgates, G * H)), gates(rows_of(of_gates, 2 * G * H));
    const Array<A> dm(lstm ? rows_of(of_dm, H) : 0), c(lstm ? rows_of(of_c, H) : 0);
    const Array<A> vectors(V * H), sums(V * H), run(V * H);
    const auto fill_strided = [&](const auto& rows, int64_t stride, int64_t width) {
      for (int64_t r = 0; r < R_; ++r)
        for (int64_t i = 0; i < width; ++i) rows[r * stride + i] = stored<std::decay_t<decltype(rows[0])>>(number());
    };
    fill_strided(dgates, of_dgates, G * H), fill_strided(gates, of_gates, G * H), fill_rows(gates, G * H, of_gates, G * H);
    if (lstm) fill_strided(dm, of_dm, H), fill_rows(c, H, of_c, 0);
    fill(vectors), fill(sums);
    Doubles expected(V * H), bound(V * H);
    for (int64_t i = 0; i < V * H; ++i) expected[i] = sums[i], bound[i] = 2 * kUnit * std::fabs(expected[i]);
    NormVectors n{kType, lstm, H, {dgates.data(), of_dgates}, {gates.data(), of_gates}, {}, {}, vectors.data()};
    if (lstm) n.dm = {dm.data(), of_dm}, n.c = {c.data(), of_c};
    kernels().add_vectors(n, begin_, end_, sums.data(), run.data());

    for (int64_t r = begin_; r < end_; ++r) {
      const auto gate = [&](int64_t i) { return value(gates[r * of_gates + i]); };
      const auto product = [&](int64_t i) { return gate(G * H + i); };
      const auto add = [&](int64_t i, double factor, double factor_error, double x, double x_error) {
        expected[i] += factor * x;
        bound[i] += std::fabs(factor) * x_error + factor_error * (std::fabs(x) + x_error);
        bound[i] += (R_ + 8) * kUnit * std::fabs(factor * x);
      };
      const Normal normal(G * H, 1e-5, kUnit, product);
      for (int64_t i = 0; i < G * H; ++i) {
        const double gradient = value(dgates[r * of_dgates + i]) * (lstm || i < 2 * H ? 1 : gate(i - 2 * H));
        add(i, gradient, kUnit * std::fabs(gradient), normal(product(i)), normal.rounding);
        if (!lstm && i >= 2 * H) add(H + i, gradient, kUnit * std::fabs(gradient), 1, 0);
      }
      if (!lstm) continue;
      const auto cell = [&](int64_t u) { return double(c[r * of_c + u]); };
      const Normal of_row(H, 1e-5, kUnit, cell);
      for (int64_t u = 0; u < H; ++u) {
        const double normal_c = of_row(cell(u)), scale = vectors[4 * H + u], s = std::tanh(scale * normal_c + vectors[5 * H + u]);
        const double through = dm[r * of_dm + u] * gate(3 * H + u), gradient = through * (1 - s * s);
        const double error = 2 * std::fabs(through) * (std::fabs(scale) * of_row.rounding + 32 * kUnit);
        add(4 * H + u, gradient, error, normal_c, of_row.rounding);
        add(5 * H + u, gradient, error, 1, 0);
      }
    }
    const char* const what = lstm ? "vectors of an LSTM" : "vectors of a GRU";
    for (int64_t i = 0; i < V * H; ++i) expect(what, i / H, i % H, sums[i], expected[i], bound[i]);
  }

  const int64_t E_, R_;
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
  int64_t begin_, end_;
  std::vector<char> hardly_;  // of a row, whether its numbers differ
  bool good_ = true;
};

}  // namespace

int main(int count, char** arguments) {
  const int64_t most = count > 1 ? std::atoll(arguments[1]) : INT64_MAX;
  const int64_t features[] = {1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 130, 257};
  int failed = 0;
  unsigned seed = 0;
  for (const int64_t E : features)
    for (int i = 0; i < 12; ++i) {
      const int64_t rows = i % 6 ? 1 + i : 135;  // more than what is summed by itself, twice
      ++seed;
      if (E > most) continue;
      for (const bool end : {true, false}) {
        at_the_end = end;
        failed += !Run<float>(E, rows, seed).right();
        failed += !Run<double>(E, rows, seed).right();
        failed += !Run<bfloat16>(E, rows, seed).right();
        failed += !Run<float16>(E, rows, seed).right();
      }
    }
  std::printf("%d failed\n", failed);
  return failed > 0;
}
