// The kernels for products of whole matrices, and how their work is shared out.
#include "matrix_product.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "host.h"
#include "level.h"

namespace fastseq::cpu {

const MatrixKernels* matrix_kernels([[maybe_unused]] Type type) {
#if defined(__x86_64__)
  if (type != Type::kBfloat16 && type != Type::kFloat) return nullptr;
  if (level() == Level::kAmx) return &matrix_kernels_amx();
  if (level() == Level::kAvx512Bf16) return &matrix_kernels_avx512_bf16();
#endif
  return nullptr;
}

namespace {

int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }

// Panels of a block of the result: its sums and packed operands stay in the second-level cache. One or two more are no block of their own,
// for which the other matrix would be packed again.
constexpr int64_t kBlock = 16, kSpare = 2;
constexpr double kWorkOfBlock = 1 << 22;  // multiply-adds worth a thread

}  // namespace

bool multiply(const MatrixKernels& kernels, const std::vector<MatrixProduct>& products) {
  struct Part {
    const MatrixProduct* product;
    MatrixBlock block;
    double work;
  };
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<Part> parts;
  double total = 0;
  for (const MatrixProduct& product : products) {
    int64_t columns = 0;
    for (int i = 0; i < product.count; ++i) columns += panels_of(product.right[i].columns);
    const int64_t rows = panels_of(product.rows);
    const auto blocks = [](int64_t panels) { return std::max<int64_t>(1, (panels - kSpare + kBlock - 1) / kBlock); };
    int64_t of_rows = blocks(rows), of_columns = blocks(columns);
    // smaller blocks if some threads would have fewer; which these are changes no sum
    const double work = double(product.rows) * product.depth * columns * kPanel;
    total += work;
    while (of_rows * of_columns % threads && of_rows < rows && work / (of_rows * of_columns) > kWorkOfBlock) ++of_rows;
    for (int64_t c = 0; c < of_columns; ++c)
      for (int64_t r = 0; r < of_rows; ++r)
        parts.push_back({&product,
                         {{rows * r / of_rows, rows * (r + 1) / of_rows}, {columns * c / of_columns, columns * (c + 1) / of_columns}},
                         work / (of_rows * of_columns)});
  }
  // A thread that is done takes the next, the largest first: those of one product may be many times those of another.
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.work > b.work; });
  std::atomic<bool> within = true;
  std::atomic<size_t> next = 0;
  const int64_t grain = total < 2 * kWorkOfBlock ? parts.size() : 1;
  torch::stable::parallel_for(0, parts.size(), grain, [&](int64_t, int64_t) {
    for (size_t i; within && (i = next++) < parts.size();) {
      const Part& part = parts[i];
      const Buffer scratch(kernels.scratch(*part.product, part.block));
      if (!kernels.multiply(*part.product, part.block, scratch.get())) within = false;
    }
  });
  return within;
}

}  // namespace fastseq::cpu
