// Runs the kernels of single steps, csrc/cpu/recurrent_step_<LEVEL>.cpp, without torch: odd sizes, with and without biases and states, in
// parts, against plain loops in double; of few sequences by weights as they lie and by packed ones.

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

enum class Way { kAtOnce, kInPlace, kPacked };

// Tiles of whole units as Kernels::pack_units makes them: in panels [depth][vectors][W], of two vectors where 32 registers hold four.
template <class A>
void pack(const Array<A>& weights, int64_t gates, int64_t H, int64_t depth, int64_t W, int64_t UB, A* to) {
  for (int64_t u0 = 0; u0 < H; u0 += UB * W, to += gates * UB * W * depth) {
    const int64_t blocks = std::min(UB, (H - u0 + W - 1) / W), vectors = gates * blocks;
    const int64_t panel = W * sizeof(A) == 64 && vectors == 4 ? 2 : vectors;
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t lane = 0; lane < W; ++lane) {
          const int64_t u = u0 + v % blocks * W + lane;
          to[(v / panel * depth * panel + k * panel + v % panel) * W + lane] = u < H ? weights[(v / blocks * H + u) * depth + k] : A(0);
        }
  }
}

// memory for `count` elements at a line's beginning
template <class A>
struct Aligned {
  explicit Aligned(int64_t count) : array(count ? count + 64 / int64_t(sizeof(A)) : 0) {}
  A* data() const {
    return array.count() ? array.data() + (64 - reinterpret_cast<uintptr_t>(array.data()) % 64) % 64 / sizeof(A) : nullptr;
  }
  Array<A> array;
};

template <class A>
bool right(const Trial& t, Way way, unsigned seed) {
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
  fill(x, 1), fill(h0, 1), fill(c0, 1), fill(w_ih, size), fill(w_hh, size), fill(bias, size), fill(vectors, size);
  const bool packed = way == Way::kPacked;
  const int64_t UB = packed && t.gates == 1 ? kTileVectors : 1, tiles = (H + UB * W - 1) / (UB * W), unit = t.gates * UB * W * tiles;
  const Aligned<A> packed_ih(packed ? unit * I : 0), packed_hh(packed ? unit * H : 0);
  if (packed) pack(w_ih, t.gates, H, I, W, UB, packed_ih.data()), pack(w_hh, t.gates, H, H, W, UB, packed_hh.data());
  Step step{t.cell, type, B, I, H, x.data(), h0.data(), c0.data(), packed ? nullptr : w_ih.data(), packed ? nullptr : w_hh.data(),
            bias.data(), vectors.data(), y.data(), stride, h_n.data(), c_n.data(), nullptr, packed_ih.data(), packed_hh.data()};
  const Aligned<A> operands(way == Way::kAtOnce ? kernels.sequences_of(type, B) * (I + H)
                            : packed            ? kernels.bytes_of_few(step) / int64_t(sizeof(A))
                                                : 0);
  step.operands = operands.data();
  const auto in_parts = [&](int64_t count, auto&& body) {
    const int64_t part = seed % count;
    body(step, 0, part), body(step, part, count);
  };
  if (way == Way::kAtOnce) in_parts((I + W - 1) / W + (H + W - 1) / W, kernels.transpose);
  if (packed) kernels.gather_few(step);
  in_parts(tiles, way == Way::kAtOnce ? kernels.run : kernels.run_few);

  const auto at = [](const Array<A>& array, int64_t i) { return array.count() ? double(array[i]) : 0.0; };
  const double bound = 64 * (type == Type::kDouble ? 0x1p-52 : 0x1p-23) * (1 + size * std::sqrt(double(I)));
  bool good = true;
  const auto expect = [&](const char* what, int64_t b, int64_t u, double found, double expected) {
    if (!good || std::fabs(found - expected) <= bound * (1 + std::fabs(expected))) return;
    std::printf("%s %s way %d B%lld I%lld H%lld: wrong result: %s[%lld][%lld] is %.9g, expected %.9g\n", t.name, type == Type::kDouble ? "double" : "float",
                int(way), (long long)B, (long long)I, (long long)H, what, (long long)b, (long long)u, found, expected);
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
  const int64_t widths[] = {1, 7, 16, 33, 130}, batches[] = {1, 2, 5, 15, 16, 31, 49, 64, 100};
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
            for (const Way way : {Way::kAtOnce, Way::kInPlace, Way::kPacked}) {
              if (way != Way::kAtOnce && B >= kSequencesOfStep) continue;
              failed += !right<float>(trial, way, seed);
              failed += !right<double>(trial, way, seed);
            }
          }
        }
  std::printf("%d failed\n", failed);
  return failed > 0;
}
