// Runs the CPU kernels of one instruction set without torch: odd sizes, layouts, zoneout, projections, several participants, against
// plain loops in double. Gradients are compared with differences of the loss along a random direction.
//
// Compiled with the macros and flags of one of csrc/cpu/recurrent_<level>.cpp, and with CASES, a list of X(storage type, cell): only
// these kernels are compiled.

#include <numeric>
#include <thread>
#include <tuple>

#include "cpu/recurrent_kernel.inl"
#include "cpu_harness.h"

namespace fastseq::cpu::FASTSEQ_LEVEL {
namespace {

#include "cpu_harness.inl"

enum class Layout { kPadded, kLengths, kPacked };

struct Options {
  int64_t T, B, H, I, P;  // I: 0: the input comes projected; P: 0: no projection
  Layout layout;
  int zoneout;  // 0: none, 1: proportions, 2: masks
  int64_t members, participants;
  bool state, in_place;  // in_place: weights as PyTorch stores them
  int resets;  // 0: none, 1: to zeros, 2: to states
  bool alike = false;  // rows of R, and so the units of R h, of which a norm leaves nothing; forward alone
};

// What the loops take and give, in double: rows are [rows, D, n].
struct Numbers {
  Doubles x, w_ih, b_ih, x_gates, weight, vectors, projection, h0, c0, reset_h, reset_c;
  std::vector<char> hold_h, hold_c, resets;
  Doubles y, h_n, c_n, c;
};

// In more than double, whose own rounding of the mean would be all that is left of numbers that are alike.
void normalize(double* x, int64_t count) {
  long double mean = 0, variance = 0;
  for (int64_t i = 0; i < count; ++i) mean += x[i];
  mean /= count;
  for (int64_t i = 0; i < count; ++i) variance += (x[i] - mean) * (x[i] - mean) / count;
  for (int64_t i = 0; i < count; ++i) x[i] = (x[i] - mean) / std::sqrt(variance + 1e-5);
}

// One step of one row: gates x and r = R h [G*H], vectors [V*H], h [H], c [K*H] -> m [H], c.
void plain_step(fastseq::cpu::Cell cell, int64_t H, const double* x, double* r, const double* v, const double* h, double* c, double* m) {
  using fastseq::cpu::Cell;
  if (cell == Cell::kLayerNormLstm) normalize(r, 4 * H);
  if (cell == Cell::kLayerNormGru) normalize(r, 3 * H);
  Doubles o(H);
  for (int64_t u = 0; u < H; ++u) {
    const auto gate = [&](int g) { return x[g * H + u] + r[g * H + u]; };
    const auto scaled = [&](int g) { return x[g * H + u] + v[g * H + u] * r[g * H + u]; };
    const double old = c[u];
    switch (cell) {
      case Cell::kRnnTanh: m[u] = std::tanh(gate(0)); break;
      case Cell::kRnnRelu: m[u] = std::max(0.0, gate(0)); break;
      case Cell::kLstm:
        c[u] = sigmoid(gate(1)) * old + sigmoid(gate(0)) * std::tanh(gate(2));
        m[u] = sigmoid(gate(3)) * std::tanh(c[u]);
        break;
      case Cell::kCoupledLstm:
        c[u] = (1 - sigmoid(gate(0))) * old + sigmoid(gate(0)) * std::tanh(gate(1));
        m[u] = sigmoid(gate(2)) * std::tanh(c[u]);
        break;
      case Cell::kPeepholeLstm:
        c[u] = sigmoid(gate(1) + v[H + u] * old) * old + sigmoid(gate(0) + v[u] * old) * std::tanh(gate(2));
        m[u] = sigmoid(gate(3) + v[2 * H + u] * c[u]) * std::tanh(c[u]);
        break;
      case Cell::kGru: {
        const double n = std::tanh(x[2 * H + u] + sigmoid(gate(0)) * (r[2 * H + u] + v[u])), z = sigmoid(gate(1));
        m[u] = (1 - z) * n + z * h[u];
        break;
      }
      case Cell::kLayerNormGru: {
        const double n = std::tanh(x[2 * H + u] + sigmoid(scaled(0)) * (v[2 * H + u] * r[2 * H + u] + v[3 * H + u]));
        m[u] = (1 - sigmoid(scaled(1))) * n + sigmoid(scaled(1)) * h[u];
        break;
      }
      case Cell::kLayerNormLstm:
        c[u] = sigmoid(scaled(1)) * old + sigmoid(scaled(0)) * std::tanh(scaled(2));
        o[u] = sigmoid(scaled(3));
        break;
      case Cell::kSlstm: {
        double &n = c[H + u], &stabilizer = c[2 * H + u];
        const double decayed = std::log(sigmoid(gate(1))) + stabilizer, most = std::max(decayed, gate(0));
        const double i = std::exp(gate(0) - most), f = std::exp(decayed - most);
        c[u] = f * old + i * std::tanh(gate(2)), n = f * n + i, stabilizer = most;
        m[u] = sigmoid(gate(3)) * c[u] / n;
      }
    }
  }
  if (cell == Cell::kLayerNormLstm) {
    Doubles normal(c, c + H);
    normalize(normal.data(), H);
    for (int64_t u = 0; u < H; ++u) m[u] = o[u] * std::tanh(v[4 * H + u] * normal[u] + v[5 * H + u]);
  }
}

constexpr int64_t D = 2;  // lanes: one in either direction
#if defined(FASTSEQ_TILES)
constexpr bool kTiles = true, kPairs = false;
#elif defined(FASTSEQ_PAIRS)
constexpr bool kTiles = false, kPairs = true;
#else
constexpr bool kTiles = false, kPairs = false;
#endif

// The rows of a call.
struct Batch {
  std::vector<int64_t> length, index, lengths, start;  // of a sequence; of slots: place and length; of steps
  std::vector<int32_t> active;
  int64_t rows = 0;

  Batch(const Options& o, std::mt19937& random) : length(o.B, o.T), index(o.B) {
    std::iota(index.begin(), index.end(), 0);
    if (o.layout != Layout::kPadded) {
      for (int64_t b = 1; b < o.B; ++b) length[b] = o.layout == Layout::kPacked ? 1 + random() % o.T : random() % (o.T + 1);
      if (o.layout == Layout::kPacked) std::sort(length.rbegin(), length.rend());
      std::stable_sort(index.begin(), index.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
      for (const int64_t b : index) lengths.push_back(length[b]);
    }
    for (int64_t t = 0; t < o.T; ++t) {
      const int64_t count = std::count_if(length.begin(), length.end(), [&](int64_t n) { return n > t; });
      active.push_back(count);
      start.push_back(o.layout == Layout::kPacked ? rows : t * o.B);
      rows += o.layout == Layout::kPacked ? count : o.B;
    }
  }
  Rows of(const Options& o, const bool* resets, const bool* begins) const {
    const bool padded = o.layout == Layout::kPadded;
    return {o.T, o.B, o.layout == Layout::kPacked ? start.data() : nullptr, index.data(), padded ? nullptr : active.data(),
            padded ? nullptr : lengths.data(), o.B, resets, begins};
  }
};

template <class S, template <class> class Cell>
class Trial {
#if defined(FASTSEQ_TILES)
  using Product = TileProduct<S>;
#elif defined(FASTSEQ_PAIRS)
  using Product = MultiplyPairs;
#else
  using Product = MultiplyAdd<std::conditional_t<std::is_same_v<S, double>, double, float>>;
#endif
  using A = typename Product::A;
  using C = Cell<Math<A>>;
  static constexpr int64_t G = C::kGates, K = C::kStates, V = C::kVectors;

 public:
  Trial(const char* name, fastseq::cpu::Cell cell, fastseq::cpu::Type type, const Options& o, unsigned seed)
      : name_(name), o_(o), P_(o.P ? o.P : o.H), random_(seed), batch_(o, random_) {
    shape_ = {cell, type, D, o.H, P_, o.P > 0, o.zoneout > 0};
  }

  // false, and says so, if something is wrong
  bool run() {
    make_inputs();
    loops(numbers_);
    Array<S> y(batch_.rows * D * P_), h_n(D * o_.B * P_), gates(batch_.rows * D * saved() * o_.H);
    Array<A> c_n(D * o_.B * K * o_.H), c(batch_.rows * D * K * o_.H);
    forward(y, h_n, c_n, c, gates);
    const double lost = kNormalized<C> ? 400 : 24;  // roundings: a norm over a row of small numbers makes them large
    const bool good = compare("y", y, numbers_.y, lost * epsilon()) & compare("h_n", h_n, numbers_.h_n, lost * epsilon()) &
                compare("c_n", c_n, numbers_.c_n, lost * epsilon()) & compare("c", c, numbers_.c, lost * epsilon());
    return good & (o_.alike || gradients(y, c, gates));
  }

 private:
  static double epsilon() { return std::ldexp(1.0, -kDigits<S>); }
  int64_t saved() const { return o_.zoneout ? saved_of<C, true>() : C::kSaved; }

  Doubles random_values(int64_t count, double scale) {
    std::normal_distribution<double> normal(0, scale);
    Doubles values(count);
    for (double& x : values) x = value(stored<S>(normal(random_)));
    return values;
  }

  void make_inputs() {
    const int64_t H = o_.H;
    const double scale = 1 / std::sqrt(double(H));
    numbers_.weight = random_values(D * G * H * P_, o_.alike ? 8 : scale);
    for (int64_t i = 0; o_.alike && i < D * G * H * P_; ++i) numbers_.weight[i] = numbers_.weight[i % P_];
    if (o_.I) {
      numbers_.x = random_values(batch_.rows * o_.I, 1);
      numbers_.w_ih = random_values(D * G * H * o_.I, scale);
      numbers_.b_ih = random_values(D * G * H, scale);
    } else {
      numbers_.x_gates = random_values(batch_.rows * D * G * H, 1);
    }
    numbers_.vectors = random_values(D * V * H, 1);
    if (o_.P) numbers_.projection = random_values(D * P_ * H, scale);
    numbers_.h0 = o_.state ? random_values(D * o_.B * P_, 1) : Doubles(D * o_.B * P_);
    numbers_.c0 = o_.state || K > 1 ? random_values(D * o_.B * K * H, 1) : Doubles(D * o_.B * K * H);
    numbers_.reset_h = o_.resets == 2 ? random_values(D * o_.B * P_, 1) : Doubles(D * o_.B * P_);
    numbers_.reset_c = o_.resets == 2 ? random_values(D * o_.B * K * H, 1) : Doubles(D * o_.B * K * H);
    if (K == 3)  // a normalizer is positive
      for (Doubles* c : {&numbers_.c0, &numbers_.reset_c})
        for (int64_t i = 0; (c == &numbers_.c0 || o_.resets == 2) && i < D * o_.B; ++i)
          for (int64_t u = 0; u < H; ++u) (*c)[(i * K + 1) * H + u] = 1 + std::fabs((*c)[(i * K + 1) * H + u]);
    for (int64_t t = 0; o_.resets && t < o_.T; ++t) {
      const bool quiet = random_() % 3 == 0;  // a step in which nobody starts anew
      const int64_t end = t + 1 < o_.T ? batch_.start[t + 1] : batch_.rows;
      for (int64_t row = batch_.start[t]; row < end; ++row) numbers_.resets.push_back(!quiet && random_() % 3 == 0);
    }
    if (o_.zoneout == 2) {
      for (int64_t i = 0; i < batch_.rows * D * P_; ++i) numbers_.hold_h.push_back(random_() % 3 == 0);
      if (K == 1)
        for (int64_t i = 0; i < batch_.rows * D * H; ++i) numbers_.hold_c.push_back(random_() % 3 == 0);
    }
  }

  double keep(const std::vector<char>& hold, double proportion, int64_t place) const {
    return o_.zoneout == 0 ? 0 : o_.zoneout == 1 ? proportion : hold.empty() ? 0 : hold[place];
  }

  // Whether a lane starts a sequence anew before a step.
  bool anew(int64_t d, int64_t b, int64_t t) const {
    const int64_t begin = d ? t + 1 : t;
    return o_.resets && begin < batch_.length[b] && numbers_.resets[batch_.start[begin] + b];
  }

  // y, h_n, c_n and c of some inputs
  void loops(Numbers& n) const {
    const int64_t H = o_.H, rows = batch_.rows;
    n.y.assign(rows * D * P_, 0), n.c.assign(rows * D * K * H, 0), n.h_n.assign(D * o_.B * P_, 0), n.c_n.assign(D * o_.B * K * H, 0);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t b = 0; b < o_.B; ++b) {
        Doubles h(&n.h0[(d * o_.B + b) * P_], &n.h0[(d * o_.B + b) * P_] + P_), c(std::max<int64_t>(K, 1) * H), m(H), x(G * H), r(G * H);
        for (int64_t i = 0; i < K * H; ++i) c[i] = n.c0[(d * o_.B + b) * K * H + i];
        for (int64_t step = 0; step < batch_.length[b]; ++step) {
          const int64_t t = d ? batch_.length[b] - 1 - step : step, row = batch_.start[t] + b;
          if (anew(d, b, t)) {
            std::copy_n(&n.reset_h[(d * o_.B + b) * P_], P_, h.begin());
            for (int64_t i = 0; i < K * H; ++i) c[i] = n.reset_c[(d * o_.B + b) * K * H + i];
          }
          for (int64_t j = 0; j < G * H; ++j) {
            x[j] = o_.I ? n.b_ih[d * G * H + j] : n.x_gates[(row * D + d) * G * H + j];
            for (int64_t i = 0; i < o_.I; ++i) x[j] += n.x[row * o_.I + i] * n.w_ih[(d * G * H + j) * o_.I + i];
            r[j] = 0;
            for (int64_t i = 0; i < P_; ++i) r[j] += h[i] * n.weight[(d * G * H + j) * P_ + i];
          }
          const Doubles before = c;
          plain_step(shape_.cell, H, x.data(), r.data(), V ? &n.vectors[d * V * H] : nullptr, h.data(), c.data(), m.data());
          if (o_.P) {
            Doubles projected(P_);
            for (int64_t j = 0; j < P_; ++j)
              for (int64_t u = 0; u < H; ++u) projected[j] += m[u] * n.projection[(d * P_ + j) * H + u];
            m = projected;
          }
          for (int64_t j = 0; j < P_; ++j) {
            const double kept = keep(n.hold_h, kHoldH, (row * D + d) * P_ + j);
            h[j] = n.y[(row * D + d) * P_ + j] = kept * h[j] + (1 - kept) * m[j];
          }
          for (int64_t i = 0; i < K * H; ++i) {
            if (K == 1) {
              const double kept = keep(n.hold_c, kHoldC, (row * D + d) * H + i);
              c[i] = kept * before[i] + (1 - kept) * c[i];
            }
            n.c[(row * D + d) * K * H + i] = c[i];
          }
        }
        std::copy(h.begin(), h.end(), &n.h_n[(d * o_.B + b) * P_]);
        if (K) std::copy(c.begin(), c.end(), &n.c_n[(d * o_.B + b) * K * H]);
      }
  }

  template <class T>
  struct Given : Array<T> {
    explicit Given(const Doubles& values) : Array<T>(values.size()) {
      for (size_t i = 0; i < values.size(); ++i) (*this)[i] = stored<T>(values[i]);
    }
  };

  Zoneout zoneout(const Array<bool>& hold_h, const Array<bool>& hold_c) const {
    if (o_.zoneout == 1) return {nullptr, nullptr, kHoldH, K == 1 ? kHoldC : 0};
    return {hold_h.data(), hold_c.data(), 0, 0};
  }

  struct Resets {  // of rows, of steps; null: none
    Array<bool> rows, steps;

    Resets(const Trial& of) : rows(of.numbers_.resets.size()), steps(of.o_.resets ? of.o_.T : 0) {
      copy(of.numbers_.resets, rows);
      for (int64_t t = 0; t < steps.count(); ++t) {
        const auto begin = of.numbers_.resets.begin();
        steps[t] = std::count(begin + of.batch_.start[t], t + 1 < of.o_.T ? begin + of.batch_.start[t + 1] : of.numbers_.resets.end(), 1);
      }
    }
    const bool* of_rows() const { return steps.count() ? rows.data() : nullptr; }
    const bool* of_steps() const { return steps.count() ? steps.data() : nullptr; }
  };

  static void copy(const std::vector<char>& from, const Array<bool>& to) {
    for (size_t i = 0; i < from.size(); ++i) to[i] = from[i];
  }

  int64_t tiles_of(int64_t columns, int64_t tile) const { return (columns + tile - 1) / tile; }

  // every participant in its thread; they share `members` shares of the tiles
  template <class Body>
  void participate(int64_t lane, int64_t unit_tiles, int64_t output_tiles, const Resets& resets, void* workspace, const Body& body) const {
    const int64_t members = std::min({o_.members, unit_tiles, output_tiles}), count = std::min(o_.participants, members);
    fastseq::cpu::Barrier barrier(members);
    const auto participant = [&](int64_t i) {
      const int64_t begin = members * i / count, end = members * (i + 1) / count;
      Work w{};
      w.lane = lane, w.reverse = lane == 1, w.rows = batch_.of(o_, resets.of_rows(), resets.of_steps());
      w.unit_tiles[0] = unit_tiles * begin / members, w.unit_tiles[1] = unit_tiles * end / members;
      w.output_tiles[0] = output_tiles * begin / members, w.output_tiles[1] = output_tiles * end / members;
      w.first = begin == 0, w.weight = end - begin, w.barrier = count == 1 ? nullptr : &barrier, w.workspace = workspace;
      body(w);
    };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < count; ++i) threads.emplace_back(participant, i);
    participant(0);
    for (auto& thread : threads) thread.join();
  }

  void forward(const Array<S>& y, const Array<S>& h_n, const Array<A>& c_n, const Array<A>& c, const Array<S>& gates) const {
    const int64_t H = o_.H, unit_tile = unit_blocks<C>() * Product::W, units = tiles_of(H, unit_tile);
    const int64_t outputs = tiles_of(P_, kTileVectors * Product::W);
    const Given<S> x(numbers_.x), w_ih(numbers_.w_ih), b_ih(numbers_.b_ih), x_gates(numbers_.x_gates), weight(numbers_.weight);
    const Given<S> vectors(numbers_.vectors), projection(numbers_.projection), h0(numbers_.h0);
    const Given<A> c0(numbers_.c0), reset_c(numbers_.reset_c);
    const Given<S> reset_h(numbers_.reset_h);
    const Array<bool> hold_h(numbers_.hold_h.size()), hold_c(numbers_.hold_c.size());
    copy(numbers_.hold_h, hold_h), copy(numbers_.hold_c, hold_c);
    const Resets resets(*this);

    const auto packed_units = [&](const Array<S>& from, int64_t depth, const Array<char>& to) {
      for (int64_t d = 0; d < D; ++d)
        for (int64_t tile = 0; tile < units; ++tile)
          pack_units(shape_, from.data() + d * G * H * depth, depth, tile, to.data() + (d * units + tile) * unit_tile_bytes(shape_, depth));
    };
    const Array<char> packed(D * units * unit_tile_bytes(shape_, P_)), packed_input(o_.I ? D * units * unit_tile_bytes(shape_, o_.I) : 0);
    const Array<A> projected(o_.I && o_.in_place ? batch_.rows * D * G * H : 0);
    const Array<char> packed_projection(o_.P ? D * outputs * column_tile_bytes(shape_, H) : 0);
    packed_units(weight, P_, packed);
    if (o_.I) packed_units(w_ih, o_.I, packed_input);
    for (int64_t d = 0; o_.P && d < D; ++d)
      for (int64_t tile = 0; tile < outputs; ++tile)
        pack_columns(shape_, projection.data() + d * P_ * H, P_, H, tile,
                     packed_projection.data() + (d * outputs + tile) * column_tile_bytes(shape_, H));
    const void* in_place[D];
    for (int64_t d = 0; d < D; ++d) {
      in_place[d] = weight.data() + d * G * H * P_;
      if (projected.count())
        project(shape_,
                {x.data(), w_ih.data() + d * G * H * o_.I, Stored::kAsGiven, nullptr, b_ih.data() + d * G * H, batch_.rows, o_.I,
                 projected.data() + d * G * H, true, D * G * H},
                0, G * H);
    }
    Forward a{};
    a.shape = shape_, a.x_gates = x_gates.data(), a.x = x.data(), a.input = o_.I, a.input_weights = packed_input.data();
    a.input_bias = b_ih.data(), a.batch = o_.B, a.vectors = vectors.data(), a.h0 = o_.state ? h0.data() : nullptr;
    a.c0 = o_.state || K > 1 ? c0.data() : nullptr, a.weights = packed.data(), a.projection = packed_projection.data();
    if (o_.resets == 2) a.reset_h = reset_h.data(), a.reset_c = reset_c.data();
    if (o_.in_place) {
      a.in_place = in_place, a.weights = nullptr;
      if (o_.I) a.x = nullptr, a.x_gates = projected.data(), a.wide_x_gates = true;
    }
    a.zoneout = zoneout(hold_h, hold_c);
    a.y = y.data(), a.h_n = h_n.data(), a.c_n = c_n.data(), a.c = c.data(), a.gates = gates.data();
    with_zoneout([&]<bool kZoned>() {
      for (int64_t d = 0; d < D; ++d) {
        const Array<char> workspace(ForwardKernel<Product, S, Cell, kZoned>::workspace(shape_, o_.B));
        participate(d, units, outputs, resets, workspace.data(), [&](Work& w) {
          const auto run = [&]<bool kFew>() {
            using Kernel = ForwardKernel<Product, S, Cell, kZoned, kFew>;
            const Array<char> scratch(Kernel::scratch(a, w));
            w.scratch = scratch.data();
            Kernel(a, w).run();
          };
          if constexpr (!kZoned && has_few<Product, C>())
            if (w.rows.slots <= Product::kFewRows) return run.template operator()<true>();
          run.template operator()<false>();
        });
      }
    });
  }

  // The loss is a sum of the outputs, each times a random factor. Its derivative along a direction of all inputs and weights, by
  // differences of the loops and by the kernel's gradients.
  bool gradients(const Array<S>& y, const Array<A>& c, const Array<S>& gates) {
    const int64_t H = o_.H, rows = batch_.rows, tile = kTileVectors * Product::W, units = tiles_of(H, tile), outputs = tiles_of(P_, tile);
    const Doubles dy = random_values(rows * D * P_, 1), dh_n = random_values(D * o_.B * P_, 1), dc_n = random_values(D * o_.B * K * H, 1);
    const Doubles dc = random_values(rows * D * K * H, 1);
    const Given<S> given_dy(dy), given_dh_n(dh_n), h0(numbers_.h0), weight(numbers_.weight), vectors(numbers_.vectors);
    const Given<S> projection(numbers_.projection);
    const Given<A> given_dc_n(dc_n), given_dc(dc), c0(numbers_.c0), reset_c(numbers_.reset_c);
    const Given<S> reset_h(numbers_.reset_h);
    const Resets resets(*this);
    const Array<bool> hold_h(numbers_.hold_h.size()), hold_c(numbers_.hold_c.size());
    copy(numbers_.hold_h, hold_h), copy(numbers_.hold_c, hold_c);
    constexpr int64_t own = C::kOwnRecurrent;
    const bool gives_output = o_.P || kNormalized<C>;
    const Array<S> dgates(rows * D * G * H), drecurrent(rows * D * own * H), doutput(gives_output ? rows * D * P_ : 0), dh0(D * o_.B * P_);
    const Array<A> dc0(D * o_.B * K * H), dreset_h(numbers_.reset_h.size()), dreset_c(numbers_.reset_c.size());
    std::fill_n(dreset_h.data(), dreset_h.count(), A(0)), std::fill_n(dreset_c.data(), dreset_c.count(), A(0));
    const Array<char> packed(D * outputs * column_tile_bytes(shape_, G * H)), packed_projection(o_.P ? D * units * column_tile_bytes(shape_, P_) : 0);
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t t = 0; t < outputs; ++t)
        pack_rows(shape_, weight.data() + d * G * H * P_, G * H, P_, t, packed.data() + (d * outputs + t) * column_tile_bytes(shape_, G * H));
      for (int64_t t = 0; o_.P && t < units; ++t)
        pack_rows(shape_, projection.data() + d * P_ * H, P_, H, t, packed_projection.data() + (d * units + t) * column_tile_bytes(shape_, P_));
    }
    Backward a{};
    a.shape = shape_, a.dy = given_dy.data(), a.dh_n = given_dh_n.data(), a.dc_n = given_dc_n.data(), a.dc = given_dc.data();
    a.vectors = vectors.data(), a.h0 = o_.state ? h0.data() : nullptr, a.c0 = o_.state || K > 1 ? c0.data() : nullptr, a.batch = o_.B;
    a.zoneout = zoneout(hold_h, hold_c), a.y = y.data(), a.c = c.data(), a.gates = gates.data(), a.weights = packed.data();
    a.projection = packed_projection.data(), a.dgates = dgates.data(), a.drecurrent = drecurrent.data(), a.doutput = doutput.data();
    a.dh0 = dh0.data(), a.dc0 = dc0.data();
    if (o_.resets == 2) a.reset_h = reset_h.data(), a.reset_c = reset_c.data(), a.dreset_h = dreset_h.data(), a.dreset_c = dreset_c.data();
    with_zoneout([&]<bool kZoned>() {
      using Kernel = BackwardKernel<Product, S, Cell, kZoned>;
      for (int64_t d = 0; d < D; ++d) {
        const Array<char> workspace(Kernel::workspace(shape_, o_.B));
        participate(d, units, outputs, resets, workspace.data(), [&](const Work& w) { Kernel(a, w).run(); });
      }
    });

    const auto loss = [&](const Numbers& n) {
      return std::inner_product(dy.begin(), dy.end(), n.y.begin(), 0.0) + std::inner_product(dh_n.begin(), dh_n.end(), n.h_n.begin(), 0.0) +
             std::inner_product(dc_n.begin(), dc_n.end(), n.c_n.begin(), 0.0) + std::inner_product(dc.begin(), dc.end(), n.c.begin(), 0.0);
    };
    bool good = true;
    for (int kind = 0; kind < 6; ++kind) {
      // of the input gates, of R, of h0, of c0, of what a reset puts in their place
      const auto of_kind = [&](Numbers& n) -> Doubles& {
        Doubles* each[] = {o_.I ? &n.b_ih : &n.x_gates, &n.weight, &n.h0, &n.c0, &n.reset_h, &n.reset_c};
        return *each[kind];
      };
      Doubles direction = random_values(of_kind(numbers_).size(), 1);
      if ((kind > 1 && kind < 4 && !o_.state) || (kind > 3 && o_.resets < 2)) continue;
      const auto shifted = [&](double by) {
        Numbers n = numbers_;
        Doubles& to = of_kind(n);
        for (size_t i = 0; i < to.size(); ++i) to[i] += by * direction[i];
        loops(n);
        return loss(n);
      };
      constexpr double step = 1e-6;
      const double expected = (shifted(step) - shifted(-step)) / (2 * step);
      double found = 0, size = 0;
      const auto add = [&](double gradient, double along) { found += gradient * along, size += gradient * along * gradient * along; };
      if (kind < 2)
        for (int64_t d = 0; d < D; ++d)
          for (int64_t b = 0; b < o_.B; ++b)
            for (int64_t t = 0; t < o_.T; ++t) {
              if (o_.layout == Layout::kPacked && t >= batch_.length[b]) continue;
              const int64_t row = batch_.start[t] + b, before = d ? t + 1 : t - 1;
              for (int64_t j = 0; j < G * H; ++j) {
                const double gradient = kind && j >= (G - own) * H ? value(drecurrent[(row * D + d) * own * H + j - (G - own) * H])
                                                                   : value(dgates[(row * D + d) * G * H + j]);
                if (t >= batch_.length[b]) {
                  good &= gradient == 0;  // beyond a row's length
                  continue;
                }
                if (kind == 0) {
                  add(gradient, direction[o_.I ? d * G * H + j : (row * D + d) * G * H + j]);
                  continue;
                }
                double along = 0;
                for (int64_t i = 0; i < P_; ++i) {
                  const bool first = before < 0 || before >= batch_.length[b];
                  const double h = anew(d, b, t) ? numbers_.reset_h[(d * o_.B + b) * P_ + i]
                                   : first       ? numbers_.h0[(d * o_.B + b) * P_ + i]
                                                 : value(y[((batch_.start[before] + b) * D + d) * P_ + i]);
                  along += h * direction[(d * G * H + j) * P_ + i];
                }
                add(gradient, along);
              }
            }
      for (int64_t i = 0; kind == 2 && i < dh0.count(); ++i) add(value(dh0[i]), direction[i]);
      for (int64_t i = 0; kind == 3 && i < dc0.count(); ++i) add(value(dc0[i]), direction[i]);
      for (int64_t i = 0; kind == 4 && i < dreset_h.count(); ++i) add(value(dreset_h[i]), direction[i]);
      for (int64_t i = 0; kind == 5 && i < dreset_c.count(); ++i) add(value(dreset_c[i]), direction[i]);
      const double bound = std::max((kNormalized<C> ? 1000 : 64) * epsilon(), 1e-6) * (1 + std::sqrt(size) * 4) * std::sqrt(o_.T + 1.0);
      if (!(std::fabs(found - expected) <= bound)) good = false, complain("gradient", kind, found, expected, bound);
    }
    if (!good) std::printf("%s: wrong gradients\n", label().c_str());
    return good;
  }

  template <class Body>
  void with_zoneout(const Body& body) const {
    if (o_.zoneout)
      body.template operator()<true>();
    else
      body.template operator()<false>();
  }

  template <class T>
  bool compare(const char* what, const Array<T>& found, const Doubles& expected, double bound) const {
    for (int64_t i = 0; i < found.count(); ++i)
      if (!(std::fabs(value(found[i]) - expected[i]) <= bound * (1 + std::fabs(expected[i])))) {
        complain(what, i, value(found[i]), expected[i], bound);
        return false;
      }
    return true;
  }

  void complain(const char* what, int64_t place, double found, double expected, double bound) const {
    std::printf("%s: wrong result: %s[%lld] is %.9g, expected %.9g, bound %.3g\n", label().c_str(), what, (long long)place, found, expected, bound);
  }

  std::string label() const {
    char text[200];
    std::snprintf(text, sizeof text, "%s T%lld B%lld H%lld I%lld P%lld layout %d zoneout %d resets %d members %lld participants %lld%s", name_,
                  (long long)o_.T, (long long)o_.B, (long long)o_.H, (long long)o_.I, (long long)o_.P, int(o_.layout), o_.zoneout, o_.resets,
                  (long long)o_.members, (long long)o_.participants, o_.in_place ? " in place" : "");
    return text;
  }

  static constexpr double kHoldH = 0.25, kHoldC = 0.375;
  const char* name_;
  const Options o_;
  const int64_t P_;
  Shape shape_;
  std::mt19937 random_;
  const Batch batch_;
  Numbers numbers_;
};

template <class S, template <class> class Cell>
int failures(const char* name, fastseq::cpu::Cell cell, int64_t most) {
  using C = Cell<Math<float>>;
  const int64_t sizes[] = {1, 3, 17, 33, 40};
  int failed = 0;
  unsigned seed = 0;
  const auto try_out = [&](const Options& o) {
    for (const bool end : {true, false}) {
      at_the_end = end;
      failed += !Trial<S, Cell>(name, cell, kTypeOf<S>, o, seed).run();
    }
  };
  for (const int64_t H : sizes)
    for (const int64_t B : sizes)
      for (int variant = 0; variant < 3; ++variant, ++seed) {
        if (std::max(H, B) > most) continue;
        Options o{};
        o.T = 1 + seed % 5, o.B = B, o.H = H, o.I = seed % 3 == 0 ? 0 : sizes[(seed / 3) % 5];
        // tiles and pairs take no projection, nor parts zoneout
        o.P = C::kStates == 1 && !kTiles && !kPairs && seed % 4 == 1 ? sizes[(seed / 4) % 5] : 0;
        o.layout = Layout(seed % 3), o.zoneout = kTiles && std::is_same_v<S, float> ? 0 : (seed / 2) % 3, o.members = 1 + seed % 4, o.participants = 1 + (seed / 2) % 3;
        o.state = seed % 5 > 0, o.in_place = !kTiles && seed % 7 < 2, o.resets = seed * 7 / 4 % 3;
        try_out(o);
      }
  if constexpr (kNormalized<C>)
    for (const int64_t H : sizes)
      if (H <= most) try_out({1, 3, H, 7, 0, Layout::kPadded, 0, 1 + ++seed % 2, 1, true, false, 0, true});
  if (!kTiles)  // few sequences, whose tiles finish together, and one, of which a chunk is projected between the products of another
    for (const auto& [B, H, layout] :
         {std::tuple(1, 70, Layout::kLengths), std::tuple(1, 192, Layout::kPadded), std::tuple(3, 70, Layout::kPadded)})
      if (H <= most) try_out({B == 1 ? 45 : 3, B, H, 41, 0, layout, 0, 1 + ++seed % 2, 1, true, false, int(seed % 3)});
  if (kTiles && std::is_same_v<S, bfloat16>)  // sizes of which tiles take rows as they lie, and next to these
    for (const int64_t H : {32, 64})
      for (const int64_t B : {1, 16, 17, 20, 48})
        for (const int resets : {0, 2}) {
          if (std::max(H, B) > most) continue;
          try_out({4, B, H, 96 - H, 0, Layout::kPadded, 0, 1 + ++seed % 2, 1, true, false, resets});
        }
  return failed;
}

// All numbers of binary16, those between two of them, and those beside these.
int conversion_failures() {
  using V = Lanes<float>::V;
  const auto widened = [](uint16_t bits) { return Halves<float16>::widened(Halves<float16>::H{bits})[0]; };
  const auto narrowed = [](float x) { return Halves<float16>::narrowed(V{x})[0]; };
  int failed = 0;
  for (int bits = 0; bits < 0x8000; ++bits)
    for (const int sign : {0, 0x8000}) {
      const float16 number{uint16_t(bits | sign)};
      const double x = value(number);
      const float wide = widened(number.bits);
      if (bits > 0x7c00) {
        failed += !(wide != wide) + !(narrowed(wide) & 0x3ff && (narrowed(wide) & 0x7c00) == 0x7c00);
        continue;
      }
      failed += wide != x || std::signbit(wide) != std::signbit(x) || narrowed(wide) != number.bits;
      if (bits == 0x7c00) continue;
      const float above = bits == 0x7bff ? 65536 : std::fabs(value(float16{uint16_t(bits + 1)})), half = (std::fabs(wide) + above) / 2;
      const auto expect = [&](float magnitude, int next) { failed += narrowed(sign ? -magnitude : magnitude) != ((bits + next) | sign); };
      expect(half, bits & 1), expect(std::nextafterf(half, 0), 0), expect(std::nextafterf(half, 1e9f), 1);
    }
  if (failed) std::printf("wrong result: %d conversions of binary16\n", failed);
  return failed;
}

}  // namespace
}  // namespace fastseq::cpu::FASTSEQ_LEVEL

int main(int count, char** arguments) {
  using namespace fastseq::cpu::FASTSEQ_LEVEL;
  if (!tiles_are_allowed()) return 2;
  const int64_t most = count > 1 ? std::atoll(arguments[1]) : INT64_MAX;
  int failed = conversion_failures();
#define X(type, cell) failed += failures<type, fastseq::cell>(#type " " #cell, fastseq::cpu::Cell::k##cell, most);
  CASES
#undef X
  std::printf("%d failed\n", failed);
  return failed > 0;
}
