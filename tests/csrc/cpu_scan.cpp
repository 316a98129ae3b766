// Runs the loops of csrc/cpu/scan_<LEVEL>.cpp without torch: every cell and kind of states, odd sizes, layouts, lengths, resets,
// parts of the rows and channels, against plain loops in double. Derivatives of a cell's step are taken by differences.

#include "cpu/scan_kernel.h"
#include "cpu_harness.h"

namespace {

#include "cpu_harness.inl"

using namespace fastseq::cpu;

enum class Layout { kPadded, kLengths, kPacked };

struct Options {
  ScanKind kind;
  ScanCell cell;
  int64_t T, B, C;
  Layout layout;
  bool each, constant;  // as in Scan
  bool reverse, time_first, initial, resets;
  bool dh, dfinal, db, da, dgate, dvector;  // what a backward pass is given, and asked for
  bool streams;
};

// What a cell makes of a step: coefficient and addend.
struct Step {
  double coefficient, addend;
};

Step step_of(ScanCell cell, double a, double b, double gate, double vector, bool alone) {
  const double candidate = b >= 0 ? b + 0.5 : sigmoid(b);
  switch (cell) {
    case ScanCell::kGiven: return {a, b};
    case ScanCell::kLog: return {std::exp(a), b};
    case ScanCell::kMinGru: return {sigmoid(-a), sigmoid(a) * candidate};
    case ScanCell::kMinLstm: {
      const double kept = sigmoid(a) / (sigmoid(a) + sigmoid(gate));
      return {kept, (1 - kept) * candidate};
    }
    case ScanCell::kHgrn: {
      const double f = vector + (1 - vector) * sigmoid(a);
      return {f, (1 - f) * b * sigmoid(b)};
    }
    case ScanCell::kRgLru: {
      const double f = std::exp(-vector * sigmoid(a));
      return {f, (alone ? 1 : std::sqrt(1 - f * f)) * sigmoid(gate) * b};
    }
    case ScanCell::kQrnn: return {sigmoid(a), sigmoid(-a) * std::tanh(b)};
    case ScanCell::kQrnnIfo: return {sigmoid(a), sigmoid(gate) * std::tanh(b)};
  }
  return {};
}

// E: the type of a.
template <class S, class E>
class Run {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  static constexpr Type kType = kTypeOf<S>;

  // [steps, rows, width], more from a row to the next than its elements
  template <class T>
  struct Tensor {
    int64_t width, step, row;
    Array<T> values;

    Tensor(int64_t steps, int64_t rows, int64_t width, int64_t gap, bool time_first)
        : width(width), step(steps == 1 ? 0 : time_first ? rows * (width + gap) : width + gap),
          row(time_first || steps == 1 ? width + gap : steps * (width + gap)),
          values(width ? (steps * rows - 1) * (width + gap) + width : 0) {}
    T* at(int64_t t, int64_t r) const { return values.data() + t * step + r * row; }
    ScanRows rows() const { return {values.data(), step, row}; }
  };

 public:
  Run(const Options& options, unsigned seed) : o(options), random_(seed) {}

  bool right() {
    const ScanKernels& kernels = OF_LEVEL(scan_, LEVEL)();
    const ScanCellRow made = row_of(o.cell);
    const int64_t n = kScanState[int(o.kind)], m = kScanCoefficient[int(o.kind)], N = o.C * n, M = o.C * m;
    const bool packed = o.layout == Layout::kPacked;
    std::vector<int64_t> length(o.B, o.T), start(o.B);
    Array<int32_t> lengths(o.layout == Layout::kLengths ? o.B : 0), starts(packed ? o.B + 1 : 0);
    int64_t steps = packed ? 0 : o.T;
    for (int64_t r = 0; r < o.B; ++r) {
      if (o.layout != Layout::kPadded && r) length[r] = random_() % (o.T + 1);
      if (lengths.count()) lengths[r] = length[r];
      if (packed) starts[r] = start[r] = steps, starts[r + 1] = steps += length[r];
    }
    const int64_t rows = packed ? 1 : o.B, gap = random_() % 2 * 3, of_a = o.each ? M : m;
    const auto tensor = [&]<class T>(T, int64_t width) { return Tensor<T>(steps, rows, width, gap, o.time_first); };
    const auto b = tensor(S{}, N), gate = tensor(S{}, made.gate ? N : 0), h = tensor(S{}, N), dh = tensor(S{}, o.dh ? N : 0);
    const auto db = tensor(S{}, o.db ? N : 0), dgate = tensor(S{}, made.gate && o.dgate ? N : 0);
    const Tensor<E> a(o.constant ? 1 : steps, rows, of_a, gap, o.time_first);
    const Tensor<E> da(o.constant ? 1 : steps, o.constant ? o.B : rows, o.da ? M : 0, o.constant ? 0 : gap, o.time_first);
    const Array<A> vector(made.vector ? N : 0), dvector(made.vector && o.dvector ? o.B * N : 0);
    const Array<A> initial(o.initial ? o.B * N : 0), final(o.B * N), dfinal(o.dfinal ? o.B * N : 0), dinitial(o.B * N);
    const Array<bool> resets(o.resets ? steps * rows : 0);
    const auto fill = [&](const auto& array, double size, double around = 0) {
      using T = std::decay_t<decltype(array[0])>;
      for (int64_t i = 0; i < array.count(); ++i) array[i] = stored<T>(around + size * normal_(random_));
    };
    // coefficients that are given are below 1, so that nothing grows
    const double size = o.kind != ScanKind::kReal ? 0.3 : o.cell == ScanCell::kGiven ? 0.4 : 1;
    fill(b.values, 1), fill(gate.values, 1), fill(a.values, size, o.cell == ScanCell::kLog ? -2.5 : 0), fill(dh.values, 1);
    fill(initial, 1), fill(dfinal, 1);
    for (int64_t i = 0; i < vector.count(); ++i) vector[i] = A(0.1 + 0.8 * (random_() % 1000) / 1000);
    for (int64_t i = 0; i < resets.count(); ++i) resets[i] = random_() % 4 == 0;

    Scan s{};
    s.kind = o.kind, s.type = kType, s.cell = o.cell, s.wide_a = std::is_same_v<E, A>, s.each = o.each, s.constant = o.constant;
    s.reverse = o.reverse, s.streams = o.streams, s.steps = steps, s.rows = o.B, s.channels = o.C;
    s.a = a.rows(), s.b = b.rows(), s.h = h.rows(), s.gate = gate.rows(), s.vector = vector.data(), s.initial = initial.data();
    s.final = final.data(), s.resets = resets.data(), s.reset_step = rows, s.reset_row = 1;
    s.lengths = lengths.data(), s.starts = starts.data();
    const auto in_parts = [&](auto&& body) {
      const int64_t row = random_() % o.B, channel = random_() % o.C;
      for (const auto& [r, count] : {std::pair(int64_t(0), row), std::pair(row, o.B - row)})
        for (const auto& [c, channels] : {std::pair(int64_t(0), channel), std::pair(channel, o.C - channel)}) {
          if (!count || !channels) continue;
          const ScanPart part{r, count, c, channels};
          const Array<char> scratch(kernels.scratch(s, part));
          body(s, part, scratch.data());
        }
    };
    in_parts(kernels.forward);
    s.dh = dh.rows(), s.db = db.rows(), s.da = da.rows(), s.dgate = dgate.rows(), s.dvector = dvector.data();
    s.dfinal = dfinal.data(), s.dinitial = dinitial.data();
    if (!made.reads_b && o.db) s.b = {};
    in_parts(kernels.backward);

    for (int64_t r = 0; r < o.B && good_; ++r) {
      const int64_t own = packed ? 0 : r, L = length[r], walked = packed ? L : steps;
      Doubles state(N), carry(N), of_vector(N), of_a_sum(M);
      for (int64_t i = 0; i < N; ++i) state[i] = o.initial ? initial[r * N + i] : 0, carry[i] = o.dfinal ? dfinal[r * N + i] : 0;
      const auto time = [&](int64_t i) { return o.reverse ? L - 1 - i : i; };
      const auto alone = [&](int64_t i) {
        const int64_t t = start[r] + time(i) + o.reverse;
        return i == 0 ? !o.initial || (o.resets && !o.reverse && resets[t * rows + own]) : o.resets && resets[t * rows + own];
      };
      const auto coefficient = [&](int64_t t, int64_t c) { return a.at(o.constant ? 0 : t, own) + (o.each ? c * m : 0); };
      const auto given = [&](const Tensor<S>& tensor, int64_t t, int64_t i) {
        return tensor.width ? value(tensor.at(t, own)[i]) : 0.0;
      };
      const auto of_vector_at = [&](int64_t c) { return vector.count() ? double(vector[c]) : 0.0; };
      for (int64_t i = 0; i < L; ++i) {
        const int64_t t = start[r] + time(i);
        for (int64_t c = 0; c < o.C; ++c) {
          const E* k = coefficient(t, c);
          double* x = &state[c * n];
          if (alone(i)) x[0] = x[n - 1] = 0;
          if (o.kind == ScanKind::kReal) {
            const Step made = step_of(o.cell, value(k[0]), given(b, t, c), given(gate, t, c), of_vector_at(c), alone(i));
            x[0] = made.addend + (alone(i) ? 0 : made.coefficient * x[0]);
          } else {
            const bool block = o.kind == ScanKind::kBlocks;
            const double old[] = {x[0], x[1]}, k0 = value(k[0]), k1 = value(k[1]);
            x[0] = given(b, t, 2 * c) + k0 * old[0] + (block ? k1 : -k1) * old[1];
            x[1] = given(b, t, 2 * c + 1) + (block ? value(k[m - 2]) : k1) * old[0] + (block ? value(k[m - 1]) : k0) * old[1];
          }
        }
        for (int64_t j = 0; j < N; ++j) expect("h", r, t, j, given(h, t, j), state[j], kDigits<S>);
      }
      for (int64_t j = 0; j < N; ++j) expect("final", r, 0, j, final[r * N + j], state[j], kDigits<A>);

      for (int64_t i = L - 1; i >= 0; --i) {
        const int64_t t = start[r] + time(i), before_t = o.reverse ? t + 1 : t - 1;
        for (int64_t c = 0; c < o.C; ++c) {
          const E* k = coefficient(t, c);
          double before[2] = {}, lambda[2], of_k[4] = {}, through[2] = {};
          for (int64_t j = 0; j < n; ++j) {
            if (!alone(i)) before[j] = i ? given(h, before_t, c * n + j) : double(initial[r * N + c * n + j]);
            lambda[j] = carry[c * n + j] + given(dh, t, c * n + j);
          }
          if (o.kind == ScanKind::kReal) {
            double x[] = {value(k[0]), given(b, t, c), given(gate, t, c), of_vector_at(c)}, of[4];
            const auto at = [&] { return step_of(o.cell, x[0], x[1], x[2], x[3], alone(i)); };
            through[0] = alone(i) ? 0 : at().coefficient * lambda[0];
            for (int j = 0; j < 4; ++j) {
              constexpr double kStep = 1e-5;
              const double middle = x[j];
              const bool near_zero = j == 1 && std::fabs(middle) < kStep;  // where the slope of a candidate jumps
              const double up = near_zero && middle < 0 ? 0 : kStep, down = near_zero && middle >= 0 ? 0 : kStep;
              x[j] = middle + up;
              const Step more = at();
              x[j] = middle - down;
              const Step less = at();
              x[j] = middle;
              const double of_coefficient = more.coefficient - less.coefficient, of_addend = more.addend - less.addend;
              of[j] = lambda[0] * (before[0] * of_coefficient + of_addend) / (up + down);
            }
            if (o.db) expect("db", r, t, c, given(db, t, c), of[1], kDigits<S>);
            if (dgate.width) expect("dgate", r, t, c, given(dgate, t, c), of[2], kDigits<S>);
            of_k[0] = of[0], of_vector[c] += of[3];
          } else {
            const double u = lambda[0], v = lambda[1], k0 = value(k[0]), k1 = value(k[1]), x = before[0], y = before[1];
            const bool block = o.kind == ScanKind::kBlocks;
            const double products[] = {u * x + (block ? 0 : v * y), block ? u * y : v * x - u * y, v * x, v * y};
            std::copy_n(products, m, of_k);
            if (!alone(i)) {
              through[0] = k0 * u + (block ? value(k[m - 2]) : k1) * v;
              through[1] = block ? k1 * u + value(k[m - 1]) * v : k0 * v - k1 * u;
            }
            for (int64_t j = 0; o.db && j < 2; ++j) expect("db", r, t, 2 * c + j, given(db, t, 2 * c + j), lambda[j], kDigits<S>);
          }
          for (int64_t j = 0; j < m; ++j) {
            of_a_sum[c * m + j] += of_k[j];
            if (o.da && !o.constant) expect("da", r, t, c * m + j, value(da.at(t, own)[c * m + j]), of_k[j], kDigits<E>);
          }
          for (int64_t j = 0; j < n; ++j) carry[c * n + j] = through[j];
        }
      }
      for (int64_t j = 0; j < N; ++j) expect("dinitial", r, 0, j, dinitial[r * N + j], carry[j], kDigits<A>);
      for (int64_t j = 0; j < N && dvector.count(); ++j) expect("dvector", r, 0, j, dvector[r * N + j], of_vector[j], kDigits<A>);
      for (int64_t j = 0; j < M && o.da && o.constant; ++j)
        expect("da of all steps", r, 0, j, value(da.at(0, r)[j]), of_a_sum[j], kDigits<A>);
      for (int64_t t = L; t < walked; ++t) {
        for (int64_t j = 0; j < N; ++j)
          for (const Tensor<S>* tensor : {&h, &db, &dgate}) expect("what is beyond the end", r, t, j, given(*tensor, t, j), 0);
        for (int64_t j = 0; j < M && o.da && !o.constant; ++j) expect("da beyond the end", r, t, j, value(da.at(t, own)[j]), 0);
      }
    }
    expect_gaps("h", h), expect_gaps("db", db), expect_gaps("dgate", dgate), expect_gaps("da", da);
    return good_;
  }

 private:
  // digits: of the type that it is stored in; 0: exact
  void expect(const char* what, int64_t row, int64_t t, int64_t j, double found, double expected, int digits = 0) {
    const double computed = std::is_same_v<A, double> ? 1e-8 : 0x1p-24 * 32 * std::sqrt(double(o.T) + 8);
    const double bound = digits ? (computed + std::ldexp(1, -digits)) * (1 + std::fabs(expected)) : 0;
    if (!good_ || std::fabs(found - expected) <= bound) return;
    const char* const kinds[] = {row_of(o.cell).name, "complex", "blocks"};
    std::printf("%s type %d T%lld B%lld C%lld layout %d%s%s: wrong result: %s[%lld][%lld][%lld] is %.9g, expected %.9g\n",
                kinds[int(o.kind)],
                int(kType), (long long)o.T, (long long)o.B, (long long)o.C, int(o.layout), o.reverse ? " backwards" : "",
                o.constant ? " constant" : "", what, (long long)row, (long long)t, (long long)j, found, expected);
    good_ = false;
  }
  // that what lies between rows is as it was
  template <class T>
  void expect_gaps(const char* what, const Tensor<T>& tensor) {
    const int64_t pitch = std::min(tensor.row, tensor.step ? tensor.step : tensor.row);
    for (int64_t i = 0; good_ && tensor.width && i < tensor.values.count(); ++i)
      if (i % pitch >= tensor.width && !std::isnan(value(tensor.values[i])))
        std::printf("wrong result: %s is written between its rows\n", what), good_ = false;
  }

  const Options o;
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
  bool good_ = true;
};

template <class S>
bool right(const Options& options, unsigned seed) {
  using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const bool wide = options.cell == ScanCell::kGiven || (options.cell == ScanCell::kLog && seed % 2);
  return wide ? Run<S, A>(options, seed).right() : Run<S, S>(options, seed).right();
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t most = count > 1 ? std::atoll(arguments[1]) : INT64_MAX;
  constexpr int kCells = sizeof(kScanCells) / sizeof(kScanCells[0]);
  int failed = 0;
  unsigned seed = 0;
  for (int which = 0; which < kCells + 2; ++which)  // cells of real numbers, complex numbers, blocks
    for (const int64_t C : {1, 7, 16, 33, 100})
      for (const int64_t T : {1, 5, 70})
        for (int i = 0; i < 8; ++i) {
          ++seed;
          if (std::max(C, T) > most) continue;
          std::mt19937 random(seed);
          const auto one_in = [&](unsigned n) { return random() % n == 0; };
          Options o{};
          o.kind = which < kCells ? ScanKind::kReal : which == kCells ? ScanKind::kComplex : ScanKind::kBlocks;
          o.cell = which < kCells ? ScanCell(which) : ScanCell::kGiven;
          o.T = T, o.B = 1 + i % 3, o.C = C, o.layout = Layout(random() % 3), o.each = true;
          if (o.cell == ScanCell::kGiven) o.each = !one_in(3), o.constant = one_in(3) && T > 1;
          for (bool* each : {&o.reverse, &o.time_first, &o.initial, &o.resets, &o.dfinal, &o.streams}) *each = one_in(2);
          for (bool* each : {&o.dh, &o.db, &o.da, &o.dgate, &o.dvector}) *each = !one_in(4);
          for (const bool end : {true, false}) {
            at_the_end = end;
            failed += !right<float>(o, seed);
            failed += !right<double>(o, seed);
            if (o.kind != ScanKind::kReal) continue;
            failed += !right<bfloat16>(o, seed);
            failed += !right<float16>(o, seed);
          }
        }
  std::printf("%d failed\n", failed);
  return failed > 0;
}
