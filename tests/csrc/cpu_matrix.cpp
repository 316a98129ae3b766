// Runs the kernels for products of whole matrices, csrc/cpu/matrix_product_<LEVEL>.cpp, without torch: odd sizes, several matrices at once,
// rows anywhere, blocks of the result in turn, numbers that are none, against plain loops in double.

#include <deque>

#include "cpu/matrix_product.h"
#include "cpu_harness.h"

namespace {

#include "cpu_harness.inl"

using namespace fastseq::cpu;

#if defined(TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

enum class Odd { kNothing, kNan, kInfinite, kSubnormal };

struct Trial {
  int64_t rows, depth, columns;
  int count;  // of right-hand matrices
  bool transposed, by_columns, ones;  // ones: the last matrix is a column of ones, as for sums of rows
  bool scattered, gaps;  // rows where pointers say; more from a row to the next than its elements
  bool bias, relu, two_parts;
  Odd odd;
};

// Rows of a matrix, and where each lies.
template <class S>
class Rows {
 public:
  Rows(int64_t rows, int64_t width, bool gaps, bool scattered, std::mt19937& random)
      : width_(width), stride_(width + 3 * gaps), values_((rows - 1) * stride_ + width) {
    for (int64_t r = 0; r < rows; ++r) at_.push_back(values_.data() + r * stride_);
    if (scattered) {
      std::shuffle(at_.begin(), at_.end(), random);
      pointers_.assign(at_.begin(), at_.end());
    }
  }

  S* row(int64_t r) const { return at_[r]; }
  int64_t stride() const { return stride_ * sizeof(S); }
  S* begin() const { return values_.data(); }
  MatrixRows rows() const { return {values_.data(), stride(), pointers_.empty() ? nullptr : pointers_.data()}; }
  // whether what lies between the rows is as it was
  bool is_clean() const {
    for (size_t r = 0; r + 1 < at_.size(); ++r)
      for (int64_t i = width_; i < stride_; ++i)
        if (!std::isnan(value(values_[r * stride_ + i]))) return false;
    return true;
  }

 private:
  int64_t width_, stride_;
  Array<S> values_;
  std::vector<S*> at_;
  std::vector<const void*> pointers_;
};

template <class S>
S odd_number(Odd odd) {
  if constexpr (std::is_same_v<S, float>) {
    return odd == Odd::kNan ? NAN : odd == Odd::kInfinite ? INFINITY : 3e-40f;
  } else {
    return {uint16_t(odd == Odd::kNan ? 0x7fc0 : odd == Odd::kInfinite ? 0x7f80 : 0x0041)};
  }
}

template <class S>
class Run {
 public:
  Run(const Trial& trial, unsigned seed) : t_(trial), random_(seed) {}

  bool right() {
    const MatrixKernels& kernels = OF_LEVEL(matrix_kernels_, LEVEL)();
    const Type type = std::is_same_v<S, float> ? Type::kFloat : Type::kBfloat16;
    const Rows<S> left(t_.transposed ? t_.depth : t_.rows, t_.transposed ? t_.rows : t_.depth, t_.gaps, t_.scattered, random_);
    const auto of_left = [&](int64_t r, int64_t k) -> S& { return t_.transposed ? left.row(k)[r] : left.row(r)[k]; };
    for (int64_t r = 0; r < t_.rows; ++r)
      for (int64_t k = 0; k < t_.depth; ++k) of_left(r, k) = number();

    MatrixProduct product{type, t_.rows, t_.depth, left.rows(), t_.transposed, {}, t_.count, t_.two_parts};
    std::deque<Rows<S>> rights, outs;
    std::deque<Array<S>> biases;
    for (int i = 0; i < t_.count; ++i) {
      const bool ones = t_.ones && i == t_.count - 1;
      const int64_t columns = ones ? 1 : i ? 1 + random_() % 70 : t_.columns;
      const bool by_columns = !ones && (t_.by_columns != (i == 1));
      const int64_t lying = ones ? 1 : by_columns ? columns : t_.depth, width = ones ? 1 : by_columns ? t_.depth : columns;
      const Rows<S>& own = rights.emplace_back(lying, width, t_.gaps && !ones, t_.scattered && !ones, random_);
      for (int64_t r = 0; r < lying; ++r)
        for (int64_t j = 0; j < width; ++j) own.row(r)[j] = ones ? stored<S>(1) : number();
      const Rows<S>& out = outs.emplace_back(t_.rows, columns, t_.gaps, false, random_);
      MatrixRows rows = own.rows();
      if (ones) rows.stride = 0;
      const Array<S>& bias = biases.emplace_back(t_.bias && !ones && kernels.finishes ? columns : 0);
      for (int64_t j = 0; j < bias.count(); ++j) bias[j] = number();
      product.right[i] = {rows, columns, out.begin(), out.stride(), by_columns, bias.data(), t_.relu && !ones && kernels.finishes};
    }
    if (t_.odd != Odd::kNothing) {  // in a row and in a column
      of_left(t_.rows / 2, t_.depth - 1) = odd_number<S>(t_.odd);
      rights[0].row(0)[t_.by_columns ? t_.depth - 1 : t_.columns - 1] = odd_number<S>(t_.odd);
    }

    if (!multiply(kernels, product)) {
      // only floats in parts are declined, of which some may be too large or too small
      return (kTiles && type == Type::kFloat && t_.odd != Odd::kNothing) || wrong("declined", 0, 0, 0, 0, 0);
    }
    for (int i = 0; i < t_.count; ++i) {
      const MatrixProduct::Right& own = product.right[i];
      for (int64_t r = 0; r < t_.rows; ++r)
        for (int64_t j = 0; j < own.columns; ++j) {
          double sum = 0, size = 0;
          for (int64_t k = 0; k < t_.depth; ++k) {
            const bool ones = own.matrix.stride == 0;
            const double term = value(of_left(r, k)) * (ones ? 1 : value(own.by_columns ? rights[i].row(j)[k] : rights[i].row(k)[j]));
            sum += term, size += std::fabs(term);
          }
          if (own.bias) sum += value(biases[i][j]), size += std::fabs(value(biases[i][j]));
          if (own.relu && sum < 0) sum = 0;
          const double found = value(outs[i].row(r)[j]);
          if (!near(found, sum, size)) return wrong("wrong result", i, r, j, found, sum);
        }
      if (!outs[i].is_clean()) return wrong("wrong result between rows", i, 0, 0, 0, 0);
    }
    return true;
  }

 private:
  S number() { return stored<S>(normal_(random_)); }

  // Part by part of the result, each with memory of its own; what a block has of columns may begin and end within a matrix.
  bool multiply(const MatrixKernels& kernels, const MatrixProduct& product) {
    const auto panels_of = [](int64_t n) { return (n + kPanel - 1) / kPanel; };
    int64_t columns = 0;
    for (int i = 0; i < product.count; ++i) columns += panels_of(product.right[i].columns);
    const int64_t rows = panels_of(product.rows), of_rows = 1 + random_() % rows, of_columns = 1 + random_() % columns;
    bool within = true;
    for (int64_t c = 0; c < of_columns; ++c)
      for (int64_t r = 0; r < of_rows; ++r) {
        const MatrixBlock block{{rows * r / of_rows, rows * (r + 1) / of_rows}, {columns * c / of_columns, columns * (c + 1) / of_columns}};
        const Array<char> scratch((kernels.scratch(product, block) + 63) / 64 * 64);
        within &= kernels.multiply(product, block, scratch.data());
      }
    return within;
  }

  // size: of the terms, absolute; what is subnormal may count as zero
  bool near(double found, double expected, double size) const {
    if (std::isnan(expected)) return std::isnan(found);
    if (std::isinf(expected)) return found == expected;
    const double of_sum = t_.two_parts && kTiles ? 0x1p-15 : 0x1p-21;
    return std::fabs(found - expected) <= of_sum * size + std::ldexp(std::fabs(expected), -kDigits<S>) + t_.depth * 0x1p-122;
  }

  bool wrong(const char* what, int i, int64_t r, int64_t j, double found, double expected) const {
    std::printf("%s rows %lld depth %lld columns %lld%s%s%s%s%s%s%s of %d, odd %d: %s: [%d][%lld][%lld] is %.9g, expected %.9g\n",
                std::is_same_v<S, float> ? "float" : "bfloat16", (long long)t_.rows, (long long)t_.depth, (long long)t_.columns,
                t_.transposed ? " transposed" : "", t_.by_columns ? " by columns" : "", t_.ones ? " ones" : "",
                t_.scattered ? " scattered" : "", t_.gaps ? " gaps" : "", t_.bias ? " bias" : "", t_.relu ? " relu" : "", t_.count,
                int(t_.odd), what, i, (long long)r, (long long)j, found, expected);
    return false;
  }

  const Trial t_;
  std::mt19937 random_;
  std::normal_distribution<double> normal_;
};

}  // namespace

int main(int count, char** arguments) {
  if (!tiles_are_allowed()) return 2;
  const int64_t most = count > 1 ? std::atoll(arguments[1]) : INT64_MAX;
  const int64_t rows[] = {1, 13, 15, 29, 33, 70}, depths[] = {1, 2, 3, 31, 33, 127, 129, 255, 257, 513, 1030};
  const int64_t columns[] = {1, 16, 17, 31, 33, 100};
  int failed = 0;
  unsigned seed = 0;
  for (const int64_t r : rows)
    for (const int64_t k : depths)
      for (const int64_t j : columns) {
        ++seed;
        if (std::max(std::max(r, k), j) > most) continue;
        std::mt19937 random(seed);
        const auto one_in = [&](unsigned n) { return random() % n == 0; };
        Trial trial{r, k, j, 1 + int(random() % 3), one_in(2), one_in(2), one_in(3), one_in(3), one_in(2), one_in(2), one_in(2), one_in(3),
                    one_in(3) ? Odd(random() % 4) : Odd::kNothing};
        trial.ones &= trial.count > 1;
        for (const bool end : {true, false}) {
          at_the_end = end;
          failed += !Run<float>(trial, seed).right();
          failed += !Run<bfloat16>(trial, seed).right();
        }
      }
  std::printf("%d failed\n", failed);
  return failed > 0;
}
