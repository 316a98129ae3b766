// Runs the attention kernels of one instruction set without torch: forward, weights, gradients, few queries in parts and from pages, at odd
// sizes, against plain loops in double.
//
// Linked with csrc/cpu/attention_<level>.cpp and attention_few_<level>.cpp; LEVEL is the level's name, TYPES a list of X(storage type).

#include <memory>

#include "cpu/attention_few.h"
#include "cpu/attention_kernel.h"
#include "cpu_harness.h"

namespace fastseq::cpu {
namespace {

#include "cpu_harness.inl"

constexpr double kNone = -std::numeric_limits<double>::infinity();

struct Options {
  int64_t B, heads, key_heads, queries, keys, features, value_features;
  bool causal = false, lengths = false, mask = false, bias = false, time_first = false;
  int64_t left = -1, page = 0;  // 0: none
  double softcap = 0;
  bool slopes = false, sinks = false;
};

template <class S>
class Trial {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  static constexpr Type kType = kTypeOf<S>;
#if defined(TILES)
  static constexpr bool kForwardAlone = std::is_same_v<S, float>;  // in parts of bfloat16
#else
  static constexpr bool kForwardAlone = false;
#endif

 public:
  Trial(const Options& o, unsigned seed) : o_(o), random_(seed) {}

  // false, and says so, if something is wrong
  bool run(bool whole) {
    make();
    loops();
    if constexpr (kForwardAlone) return forward();
    return few() & (!whole || (forward() & weights() & gradients()));
  }

 private:
  // of the storage type; sums of 16-bit numbers have digits to spare
  static double epsilon() { return std::ldexp(1.0, (sizeof(S) == 2 ? 0 : 3) - kDigits<S>); }

  Doubles numbers(int64_t count, double scale) {
    std::normal_distribution<double> normal(0, scale);
    Doubles values(count);
    for (double& x : values) x = value(stored<S>(normal(random_)));
    return values;
  }

  void make() {
    const int64_t of_q = o_.B * o_.heads * o_.queries, of_k = o_.B * o_.key_heads * o_.keys;
    q_ = numbers(of_q * o_.features, 1), k_ = numbers(of_k * o_.features, 1), v_ = numbers(of_k * o_.value_features, 1);
    dout_ = numbers(of_q * o_.value_features, 1);
    dweights_ = numbers(of_q * o_.keys, 1), dmean_ = numbers(o_.B * o_.queries * o_.keys, 1);
    if (o_.bias) bias_ = numbers(o_.heads * o_.queries * o_.keys, 1);
    if (o_.sinks) sinks_ = numbers(o_.heads, 1);
    if (o_.slopes)
      for (int64_t h = 0; h < o_.heads; ++h) slopes_.push_back(0.25 / (1 + h));
    for (int64_t i = 0; o_.mask && i < o_.B * o_.queries * o_.keys; ++i) mask_.push_back(random_() % 4 > 0);
    for (int64_t b = 0; o_.lengths && b < o_.B; ++b) lengths_.push_back(b ? random_() % (o_.keys + 1) : o_.keys);
    scale_ = 1 / std::sqrt(double(o_.features));
  }

  int64_t valid(int64_t b) const { return o_.lengths ? lengths_[b] : o_.keys; }
  int64_t shift(int64_t b) const { return valid(b) - o_.queries; }  // bottom right

  // What kernels are given: the numbers as they are stored.
  template <class T>
  struct Given : Array<T> {
    explicit Given(const Doubles& values) : Array<T>(values.size()) {
      for (size_t i = 0; i < values.size(); ++i) (*this)[i] = stored<T>(values[i]);
    }
  };
  // Rows [B, H, T, E], in memory so or with time first.
  struct Rows : Array<S> {
    int64_t B, H, T, E;
    bool time_first;
    Rows(const Options& o, int64_t heads, int64_t steps, int64_t features, const Doubles* values = nullptr)
        : Array<S>(o.B * heads * steps * features), B(o.B), H(heads), T(steps), E(features), time_first(o.time_first) {
      for (int64_t i = 0; values && i < this->count(); ++i) (*this)[place(i)] = stored<S>((*values)[i]);
    }
    int64_t of_b() const { return H * T * E; }
    int64_t of_h() const { return time_first ? E : T * E; }
    int64_t of_t() const { return time_first ? H * E : E; }
    int64_t place(int64_t i) const { return i / E / T / H * of_b() + i / E / T % H * of_h() + i / E % T * of_t() + i % E; }
    ConstRows rows() const { return {this->data(), of_b(), of_h(), of_t()}; }
    MutableRows results() const { return {this->data(), of_b(), of_h(), of_t()}; }
    Doubles values() const {
      Doubles all;
      for (int64_t i = 0; i < this->count(); ++i) all.push_back(value((*this)[place(i)]));
      return all;
    }
  };

  // whose gradients: the output alone, beside the weights or their average, the weights alone
  enum Of { kOutput, kBoth, kMean, kWeights, kGradients };

  // out, lse, weights and the gradients, as the definition says
  void loops() {
    const int64_t Tq = o_.queries, Tk = o_.keys, E = o_.features, F = o_.value_features, group = o_.heads / o_.key_heads;
    out_.assign(o_.B * o_.heads * Tq * F, 0), lse_.assign(o_.B * o_.heads * Tq, kNone);
    weights_.assign(o_.B * o_.heads * Tq * Tk, 0), mean_.assign(o_.B * Tq * Tk, 0);
    for (auto& dq : dq_) dq.assign(q_.size(), 0);
    for (auto& dk : dk_) dk.assign(k_.size(), 0);
    for (auto& delta : delta_) delta.assign(lse_.size(), 0);
    dv_.assign(v_.size(), 0);
    for (int64_t b = 0; b < o_.B; ++b)
      for (int64_t h = 0; h < o_.heads; ++h)
        for (int64_t i = 0; i < Tq; ++i) {
          const int64_t row = (b * o_.heads + h) * Tq + i, place = i + shift(b), of_k = (b * o_.key_heads + h / group) * Tk;
          Doubles score(Tk, kNone), slope(Tk, 1);
          double highest = o_.sinks ? sinks_[h] : kNone;
          for (int64_t j = 0; j < valid(b); ++j) {
            if ((o_.causal && j > place) || (o_.left >= 0 && j < place - o_.left)) continue;
            if (o_.mask && !mask_[(b * Tq + i) * Tk + j]) continue;
            double s = 0;
            for (int64_t e = 0; e < E; ++e) s += q_[row * E + e] * k_[(of_k + j) * E + e];
            s *= scale_;
            if (o_.softcap) {
              const double t = std::tanh(s / o_.softcap);
              s = o_.softcap * t, slope[j] = 1 - t * t;
            }
            if (o_.bias) s += bias_[(h * Tq + i) * Tk + j];
            if (o_.slopes) s -= slopes_[h] * std::fabs(double(place - j));
            score[j] = s, highest = std::max(highest, s);
          }
          if (highest == kNone) continue;
          double total = o_.sinks ? std::exp(sinks_[h] - highest) : 0;
          for (const double s : score) total += std::exp(s - highest);
          lse_[row] = highest + std::log(total);
          Doubles given(Tk, 0);
          for (int64_t j = 0; j < Tk; ++j) {
            const double w = std::exp(score[j] - lse_[row]);
            weights_[row * Tk + j] = w, mean_[(b * Tq + i) * Tk + j] += w / o_.heads;
            for (int64_t f = 0; f < F; ++f) {
              out_[row * F + f] += w * v_[(of_k + j) * F + f], given[j] += dout_[row * F + f] * v_[(of_k + j) * F + f];
              dv_[(of_k + j) * F + f] += w * dout_[row * F + f];
            }
          }
          for (int of = 0; of < kGradients; ++of) {
            const auto gradient = [&](int64_t j) {
              const double own = of == kMean ? dmean_[(b * Tq + i) * Tk + j] / o_.heads : dweights_[row * Tk + j];
              return (of == kWeights ? 0 : given[j]) + (of == kOutput ? 0 : own);
            };
            for (int64_t j = 0; j < Tk; ++j) delta_[of][row] += weights_[row * Tk + j] * gradient(j);
            for (int64_t j = 0; j < Tk; ++j) {
              const double ds = weights_[row * Tk + j] * (gradient(j) - delta_[of][row]) * slope[j] * scale_;
              for (int64_t e = 0; e < E; ++e) {
                dq_[of][row * E + e] += ds * k_[(of_k + j) * E + e], dk_[of][(of_k + j) * E + e] += ds * q_[row * E + e];
              }
            }
          }
        }
  }

  // What all kernels are told, with arrays that live as long as this.
  struct Call {
    const Rows q, k, v;
    const Given<S> bias, sinks;
    const Given<A> slopes;
    const Array<uint8_t> mask;
    const Array<int32_t> lengths;
    Attention a{};

    explicit Call(const Trial& t)
        : q(t.o_, t.o_.heads, t.o_.queries, t.o_.features, &t.q_), k(t.o_, t.o_.key_heads, t.o_.keys, t.o_.features, &t.k_),
          v(t.o_, t.o_.key_heads, t.o_.keys, t.o_.value_features, &t.v_), bias(t.bias_), sinks(t.sinks_), slopes(t.slopes_),
          mask(t.mask_.size()), lengths(t.lengths_.size()) {
      const Options& o = t.o_;
      std::copy(t.mask_.begin(), t.mask_.end(), mask.data());
      std::copy(t.lengths_.begin(), t.lengths_.end(), lengths.data());
      a.type = kType, a.batch = o.B, a.heads = o.heads, a.key_heads = o.key_heads, a.queries = o.queries, a.keys = o.keys;
      a.features = o.features, a.value_features = o.value_features, a.q = q.rows(), a.k = k.rows(), a.v = v.rows();
      if (o.mask) a.mask = {mask.data(), o.queries * o.keys, 0, o.keys, 1};
      if (o.bias) a.bias = {bias.data(), 0, o.queries * o.keys, o.keys, 1}, a.bias_type = kType;
      a.k_lengths = lengths.data(), a.left = o.left, a.right = o.causal ? 0 : -1, a.bottom_right = true;
      a.scale = t.scale_, a.softcap = o.softcap, a.slopes = slopes.data(), a.slopes_b = 0;
      a.sinks = sinks.data(), a.sinks_type = kType, a.lse_b = o.heads * o.queries, a.lse_h = o.queries;
    }
  };

  static Array<char> workspace(int64_t bytes) { return Array<char>((bytes + 63) / 64 * 64); }

  std::vector<AttentionTask> tasks(const Attention& a, int64_t heads) const {
    std::vector<AttentionTask> all;
    const int64_t lanes = kernels().lanes(a);
    for (int64_t b = 0; b < o_.B; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < o_.queries; i += lanes) all.push_back({b, h, i, std::min(lanes, o_.queries - i)});
    return all;
  }

  static const AttentionKernels& kernels() { return OF_LEVEL(attention_kernels_, LEVEL)(); }
  static const FewKernels& few_kernels() { return OF_LEVEL(few_, LEVEL)(); }

  bool forward() const {
    Call call(*this);
    const Rows out(o_, o_.heads, o_.queries, o_.value_features);
    const Array<A> lse(lse_.size());
    call.a.out = out.results(), call.a.lse = lse.data();
    std::vector<AttentionTask> all = tasks(call.a, o_.heads);
    const auto memory = workspace(kernels().forward_workspace(call.a));
    if (kernels().forward(call.a, all.data(), all.size(), memory.data())) return complain("forward declines", 0, 0, 0, 0);
    return compare("out", out.values(), out_, 8) & compare("lse", lse, lse_);
  }

  bool weights() const {
    bool good = true;
    for (const bool average : {false, true}) {
      if (o_.lengths) break;  // a caller clears what no query sees
      Call call(*this);
      const Rows out(o_, o_.heads, o_.queries, o_.value_features);
      const Array<A> lse(lse_.size());
      const Array<S> found(average ? mean_.size() : weights_.size());
      call.a.out = out.results(), call.a.lse = lse.data();
      const AttentionWeights w{call.a, found.data(), average};
      const auto all = tasks(call.a, average ? 1 : o_.heads);
      const auto memory = workspace(kernels().weights_workspace(w));
      kernels().weights(w, all.data(), all.size(), memory.data());
      Doubles values;
      for (int64_t i = 0; i < found.count(); ++i) values.push_back(value(found[i]));
      good &= compare(average ? "averaged weights" : "weights", values, average ? mean_ : weights_, 4) & compare("lse", lse, lse_);
      good &= compare("out beside weights", out.values(), out_, 8);
    }
    return good;
  }

  bool gradients() const {
    bool good = true;
    for (int of = 0; of < kGradients; ++of) good &= gradients(static_cast<Of>(of), 1 + of % 2);
    return good;
  }
  bool gradients(Of of, int64_t parts) const {
    Call call(*this);
    const Rows dout(o_, o_.heads, o_.queries, o_.value_features, &dout_), out(o_, o_.heads, o_.queries, o_.value_features, &out_);
    const Rows dq(o_, o_.heads, o_.queries, o_.features), dk(o_, o_.key_heads, o_.keys, o_.features);
    const Rows dv(o_, o_.key_heads, o_.keys, o_.value_features);
    const Given<A> lse(lse_);
    const Given<S> dweights(of == kMean ? dmean_ : dweights_);
    const Array<A> delta(lse_.size());
    std::fill_n(delta.data(), delta.count(), A(0));
    AttentionBackward g{};
    call.a.saves = true;
    g.attention = call.a, g.lse = lse.data(), g.delta = delta.data(), g.dq = dq.results(), g.dk = dk.results();
    if (of == kWeights)
      g.attention.v = {}, g.attention.value_features = 0;
    else
      g.dout = dout.rows(), g.out = out.rows(), g.dv = dv.results();
    const int64_t pairs = o_.queries * o_.keys;
    if (of == kMean) g.dweights = {dweights.data(), pairs, 0, o_.keys, 1}, g.dweights_factor = 1.0 / o_.heads;
    if (of == kBoth || of == kWeights) g.dweights = {dweights.data(), o_.heads * pairs, pairs, o_.keys, 1}, g.dweights_factor = 1;
    const std::vector<void*> none(parts, nullptr);
    g.dbias = g.drelative_bias = g.drelative_k = none.data();
    const int64_t of_part = kernels().sums_bytes(g.attention);
    const auto memory = workspace(kernels().backward_workspace(g)), sums = workspace(parts * of_part);
    for (int64_t b = 0; b < o_.B; ++b)
      for (int64_t h = 0; h < o_.key_heads; ++h) {
        for (int64_t part = 0; part < parts; ++part)
          kernels().backward(g, b, h, part, parts, sums.data() + part * of_part, part, memory.data());
        kernels().store_gradients(g, b, h, sums.data(), parts);
      }
    Doubles deltas;
    for (int64_t i = 0; i < delta.count(); ++i) deltas.push_back(delta[i]);
    const bool good = of == kWeights || compare("dv", dv.values(), dv_, 16);
    return good & compare("dq", dq.values(), dq_[of], 16) & compare("dk", dk.values(), dk_[of], 16) & compare("delta", deltas, delta_[of], 16);
  }

  // Whole, and in two parts that are merged; from pages in disorder too.
  bool few() const {
    bool good = true;
    const FewKernels& kernel = few_kernels();
    for (const int64_t count : {1, 2})
      for (const bool paged : {false, true}) {
        if (paged != (o_.page > 0)) continue;
        Call call(*this);
        Attention& a = call.a;
        const int64_t pages_of = paged ? (o_.keys + o_.page - 1) / o_.page : 0, pages = o_.B * pages_of;
        const auto in_pages = [&](const Doubles& given, int64_t features) {  // [pages, Hkv, page, features], NaN where there is no key
          auto memory = std::make_unique<Array<S>>(pages * o_.key_heads * o_.page * features);
          for (int64_t i = 0; i < int64_t(given.size()) && paged; ++i) {
            const int64_t j = i / features % o_.keys, h = i / features / o_.keys % o_.key_heads, b = i / features / o_.keys / o_.key_heads;
            const int64_t page = pages - 1 - (b * pages_of + j / o_.page);
            (*memory)[((page * o_.key_heads + h) * o_.page + j % o_.page) * features + i % features] = stored<S>(given[i]);
          }
          return memory;
        };
        const auto k = in_pages(k_, o_.features), v = in_pages(v_, o_.value_features);
        const Array<int32_t> table(pages);
        for (int64_t i = 0; i < pages; ++i) table[i] = pages - 1 - i;
        const auto rows_in_pages = [&](const Array<S>& of, int64_t features) {
          return ConstRows{of.data(), o_.key_heads * o_.page * features, o_.page * features, features};
        };
        if (paged) {
          a.k = rows_in_pages(*k, o_.features), a.v = rows_in_pages(*v, o_.value_features);
          a.block_table = table.data(), a.block_table_b = pages_of, a.page_size = o_.page, a.pages = pages;
        }
        const Rows out(o_, o_.heads, o_.queries, o_.value_features);
        const Array<A> lse(lse_.size());
        a.out = out.results(), a.lse = lse.data();
        const auto memory = workspace(kernel.scratch(a));
        const int64_t of_part = kernel.partial(a), block = kernel.block(a), rows = o_.heads / o_.key_heads * o_.queries;
        const auto partials = workspace(count * of_part);
        for (int64_t b = 0; b < o_.B; ++b)
          for (int64_t h = 0; h < o_.key_heads; ++h)
            for (int64_t first = 0; first < rows; first += kFewRows) {
              const FewPart all{b, h, first, std::min(kFewRows, rows - first), 0, valid(b)};
              if (count == 1) {
                kernel.run(a, all, memory.data(), nullptr);
                continue;
              }
              const int64_t middle = std::min(all.end, (all.end + block) / 2 / block * block);
              FewPart part = all;
              part.end = middle, kernel.run(a, part, memory.data(), partials.data());
              part.begin = middle, part.end = all.end, kernel.run(a, part, memory.data(), partials.data() + of_part);
              kernel.merge(a, all, partials.data(), 2, memory.data());
            }
        good &= compare("out of few", out.values(), out_, 8) & compare("lse of few", lse, lse_);
      }
    return good;
  }

  bool compare(const char* what, const Array<A>& lse, const Doubles& expected) const {
    for (int64_t i = 0; i < lse.count(); ++i)
      if (!(lse[i] == expected[i] || std::fabs(lse[i] - expected[i]) <= 1e-5 * (1 + std::fabs(expected[i]))))
        return complain(what, i, lse[i], expected[i], 1e-5);
    return true;
  }
  // to `lost` roundings of what is largest
  bool compare(const char* what, const Doubles& found, const Doubles& expected, double lost) const {
    double largest = 1;
    for (const double x : expected) largest = std::max(largest, std::fabs(x));
    for (size_t i = 0; i < found.size(); ++i)
      if (!(std::fabs(found[i] - expected[i]) <= lost * epsilon() * largest))
        return complain(what, i, found[i], expected[i], lost * epsilon() * largest);
    return true;
  }

  bool complain(const char* what, int64_t place, double found, double expected, double bound) const {
    std::printf("B%lld H%lld:%lld T%lld S%lld E%lld:%lld causal %d lengths %d mask %d bias %d time first %d left %lld page %lld softcap %g "
                "slopes %d sinks %d: wrong result: %s[%lld] is %.9g, expected %.9g, bound %.3g\n",
                (long long)o_.B, (long long)o_.heads, (long long)o_.key_heads, (long long)o_.queries, (long long)o_.keys,
                (long long)o_.features, (long long)o_.value_features, o_.causal, o_.lengths, o_.mask, o_.bias, o_.time_first,
                (long long)o_.left, (long long)o_.page, o_.softcap, o_.slopes, o_.sinks, what, (long long)place, found, expected, bound);
    return false;
  }

  const Options o_;
  std::mt19937 random_;
  double scale_;
  Doubles q_, k_, v_, dout_, dweights_, dmean_, bias_, sinks_, slopes_, out_, lse_, weights_, mean_, dv_;
  Doubles dq_[kGradients], dk_[kGradients], delta_[kGradients];
  std::vector<uint8_t> mask_;
  std::vector<int32_t> lengths_;
};

// most: keys
template <class S>
int failures(int64_t most) {
  // heads, key heads; queries, keys; features, of values: ones, and beside vectors, tiles and chunks of 16 to 128
  constexpr int64_t kHeads[][2] = {{1, 1}, {3, 1}, {8, 1}, {10, 2}}, kSteps[][2] = {{1, 1}, {1, 33}, {2, 17}, {3, 70}, {19, 19}, {37, 131}, {1, 290}};
  constexpr int64_t kFeatures[][2] = {{1, 1}, {7, 5}, {32, 33}, {65, 64}, {96, 130}};
  int failed = 0;
  unsigned seed = 0;
  for (const auto& heads : kHeads)
    for (const auto& steps : kSteps)
      for (const auto& features : kFeatures) {
        if (steps[1] > most) continue;
        ++seed;
        const int64_t few = heads[0] / heads[1] * steps[0];
        Options o{2, heads[0], heads[1], steps[0], steps[1], features[0], features[1]};
        o.causal = seed % 2, o.lengths = seed % 3 == 0, o.mask = seed % 5 == 1, o.bias = seed % 4 == 2, o.time_first = seed % 7 < 3;
        o.left = seed % 4 == 3 ? int64_t(seed % 40) : -1, o.page = seed % 3 == 1 ? 1 + seed % 20 : 0, o.softcap = seed % 6 == 5 ? 1.5 : 0;
        o.slopes = seed % 5 == 2, o.sinks = seed % 4 == 1;
        for (const bool end : {true, false}) {
          at_the_end = end;
          failed += !Trial<S>(o, seed).run(few <= 120);
        }
      }
  return failed;
}

}  // namespace
}  // namespace fastseq::cpu

int main(int count, char** arguments) {
  using namespace fastseq::cpu;
  if (!tiles_are_allowed()) return 2;
  const int64_t most = count > 1 ? std::atoll(arguments[1]) : INT64_MAX;
  int failed = 0;
#define X(type) failed += failures<type>(most);
  TYPES
#undef X
  std::printf("%d failed\n", failed);
  return failed > 0;
}
