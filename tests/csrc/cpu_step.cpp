// Runs the kernels of single steps, csrc/cpu/recurrent_step_<LEVEL>.cpp, without torch: odd sizes, with and without biases and states, in
// parts, against plain loops in double.

#include "cpu/recurrent_step.h"
#include "cpu_harness.h"

namespace {

#include "cpu_harness.inl"

using namespace fastseq::cpu;

struct Trial {
  const char* name;
  Cell cell;
  int64_t gates, B, I, H;
  bool bias, state, strided;
};

template <class A>
bool right(const Trial& t, unsigned seed) {
  const StepKernels& kernels = OF_LEVEL(step_kernels_, LEVEL)();
  const Type type = std::is_same_v<A, double> ? Type::kDouble : Type::kFloat;
  const bool lstm = t.cell == Cell::kLstm, gru = t.cell == Cell::kGru;
  const int64_t B = t.B, I = t.I, H = t.H, GH = t.gates * H, W = kernels.width(type), stride = H + 3 * t.strided;
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const auto fill = [&](const Array<A>& array, double size) {
    for (int64_t i = 0; i < array.count(); ++i) array[i] = A(size * normal(random));
  };
  const double size = 1 / std::sqrt(double(H));
  Array<A> x(B * I), h0(t.state ? B * H : 0), c0(t.state && lstm ? B * H : 0), w_ih(GH * I), w_hh(GH * H), bias(t.bias ? GH : 0);
  Array<A> vectors(t.bias && gru ? H : 0), y((B - 1) * stride + H), h_n(B * H), c_n(lstm ? B * H : 0);
  Array<A> operands(kernels.sequences_of(type, B) * (I + H) + 64 / sizeof(A));  // whose vectors are aligned
  fill(x, 1), fill(h0, 1), fill(c0, 1), fill(w_ih, size), fill(w_hh, size), fill(bias, size), fill(vectors, size);
  void* aligned = operands.data() + (64 - reinterpret_cast<uintptr_t>(operands.data()) % 64) % 64 / sizeof(A);
  const Step step{t.cell, type, B, I, H, x.data(), h0.data(), c0.data(), w_ih.data(), w_hh.data(), bias.data(), vectors.data(),
                  y.data(), stride, h_n.data(), c_n.data(), aligned};
  const auto in_parts = [&](int64_t count, auto&& body) {
    const int64_t part = seed % count;
    body(step, 0, part), body(step, part, count);
  };
  in_parts((I + W - 1) / W + (H + W - 1) / W, kernels.transpose);
  in_parts((H + W - 1) / W, kernels.run);

  const auto at = [](const Array<A>& array, int64_t i) { return array.count() ? double(array[i]) : 0.0; };
  const double bound = 64 * (type == Type::kDouble ? 0x1p-52 : 0x1p-23) * (1 + size * std::sqrt(double(I)));
  bool good = true;
  const auto expect = [&](const char* what, int64_t b, int64_t u, double found, double expected) {
    if (!good || std::fabs(found - expected) <= bound * (1 + std::fabs(expected))) return;
    std::printf("%s %s B%lld I%lld H%lld: wrong result: %s[%lld][%lld] is %.9g, expected %.9g\n", t.name, type == Type::kDouble ? "double" : "float",
                (long long)B, (long long)I, (long long)H, what, (long long)b, (long long)u, found, expected);
    good = false;
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t u = 0; u < H; ++u) {
      double gx[4] = {}, gr[4] = {};
      for (int64_t g = 0; g < t.gates; ++g) {
        gx[g] = at(bias, g * H + u);
        for (int64_t k = 0; k < I; ++k) gx[g] += double(x[b * I + k]) * w_ih[(g * H + u) * I + k];
        for (int64_t k = 0; k < H; ++k) gr[g] += at(h0, b * H + k) * w_hh[(g * H + u) * H + k];
      }
      const auto gate = [&](int g) { return gx[g] + gr[g]; };
      double h = 0, c = 0;
      if (lstm) {
        c = sigmoid(gate(1)) * at(c0, b * H + u) + sigmoid(gate(0)) * std::tanh(gate(2));
        h = sigmoid(gate(3)) * std::tanh(c);
        expect("c_n", b, u, c_n[b * H + u], c);
      } else if (gru) {
        const double n = std::tanh(gx[2] + sigmoid(gate(0)) * (gr[2] + at(vectors, u)));
        h = n + sigmoid(gate(1)) * (at(h0, b * H + u) - n);
      } else {
        h = t.cell == Cell::kRnnRelu ? std::max(0.0, gate(0)) : std::tanh(gate(0));
      }
      expect("y", b, u, y[b * stride + u], h), expect("h_n", b, u, h_n[b * H + u], h);
    }
  for (int64_t b = 0; b + 1 < B; ++b)
    for (int64_t u = H; u < stride; ++u)
      if (!std::isnan(double(y[b * stride + u]))) std::printf("%s: wrong result: y is written between its rows\n", t.name), good = false;
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t most = count > 1 ? std::atoll(arguments[1]) : INT64_MAX;
  const int64_t widths[] = {1, 7, 16, 33, 130}, batches[] = {1, 16, 31, 49, 64, 100};
  struct {
    const char* name;
    Cell cell;
    int64_t gates;
  } const cells[] = {{"RnnTanh", Cell::kRnnTanh, 1}, {"RnnRelu", Cell::kRnnRelu, 1}, {"Lstm", Cell::kLstm, 4}, {"Gru", Cell::kGru, 3}};
  int failed = 0;
  unsigned seed = 0;
  for (const auto& cell : cells)
    for (const int64_t H : widths)
      for (const int64_t I : widths)
        for (const int64_t B : batches) {
          ++seed;
          if (std::max(std::max(H, I), B) > most) continue;
          const Trial trial{cell.name, cell.cell, cell.gates, B, I, H, seed % 3 > 0, seed % 5 > 0, seed % 2 > 0};
          for (const bool end : {true, false}) {
            at_the_end = end;
            failed += !right<float>(trial, seed);
            failed += !right<double>(trial, seed);
          }
        }
  std::printf("%d failed\n", failed);
  return failed > 0;
}
