// Whole stacks of layers without gradients in one call, and their weights packed beforehand; one layer with what its gradients need.

#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <tuple>

#include "layer_norm.h"
#include "level.h"
#include "recurrent_run.h"

namespace fastseq::cpu {

namespace {

using torch::headeronly::BFloat16;

// to[0 .. n) = a + b, of the type of both; without b, zeros
void add(Type type, const void* a, const void* b, int64_t n, void* to) {
  with_storage(type, [&]<class S>() {
    for (int64_t i = 0; i < n; ++i) static_cast<S*>(to)[i] = static_cast<const S*>(a)[i] + (b ? static_cast<const S*>(b)[i] : S(0));
  });
}

// n elements of a type in memory to fp32, and back
void widen(Type type, const void* from, int64_t n, float* to) {
  with_storage(type, [&]<class S>() { std::copy_n(static_cast<const S*>(from), n, to); });
}
void narrow_to(Type type, const float* from, int64_t n, void* to) {
  with_storage(type, [&]<class S>() { std::transform(from, from + n, static_cast<S*>(to), [](float x) { return S(x); }); });
}

bool fits(const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  if (tensor.scalar_type() != type || tensor.dim() != static_cast<int64_t>(sizes.size()) || !tensor.is_contiguous()) return false;
  int64_t dim = 0;
  for (int64_t size : sizes)
    if (tensor.size(dim++) != size) return false;
  return true;
}

// The parameters of a stack of layers, as torch.nn.RNNBase lists them.
struct Stack {
  ScalarType narrow;
  Shape shape;  // of each layer
  Tiling tiling;
  int64_t layers, each, input;  // parameters of a lane; I of the first layer
  bool biases;
  std::vector<int64_t> besides;  // sizes of the parameters of a lane beside weights and biases, in units
  const std::vector<Tensor>& params;

  int64_t gates() const { return tiling.gates * shape.hidden; }
  int64_t depth(int64_t layer) const { return layer ? shape.lanes * shape.output : input; }
  // the parameters of a lane of a layer
  const Tensor* of(int64_t layer, int64_t lane) const { return &params[(layer * shape.lanes + lane) * each]; }
  const Tensor& projection(int64_t layer, int64_t lane) const { return of(layer, lane)[2 + 2 * biases]; }
  const Tensor& beside(int64_t layer, int64_t lane, int64_t i) const { return of(layer, lane)[2 + 2 * biases + shape.projected + i]; }
  // whether the last gate's recurrent bias acts inside a step
  bool inside() const { return tiling.own_recurrent > 0 && tiling.states == 0; }

  // Nothing if they are no plain stack.
  static std::optional<Stack> make(const std::vector<Tensor>& params, Cell cell, int64_t layers, bool biases, bool bidirectional) {
    if (layers < 1 || params.size() < 2) return {};
    for (const Tensor& param : params)
      if (!plain(param)) return {};
    const ScalarType narrow = params[0].scalar_type();
    if (!is_stored(narrow)) return {};
    Shape shape{cell, type_of(narrow), bidirectional ? 2 : 1, 0, 0, false, false};
    const Tiling tiling = kernels_of(shape).tiling(shape);
    std::vector<int64_t> besides;
    if (tiling.normalized) {
      besides = {tiling.gates, tiling.gates};                   // scales of W x and of R h
      if (tiling.states) besides.insert(besides.end(), 1 + biases, 1);  // scale and shift of c
    } else if (tiling.own_recurrent == 0 && tiling.vectors > 0) {
      besides = {tiling.vectors};
    }
    const int64_t lanes = layers * shape.lanes, count = params.size(), each = count / lanes, least = 2 + 2 * biases + besides.size();
    if (count % lanes || each < least || each > least + (tiling.states == 1)) return {};
    if (params[0].dim() != 2 || params[1].dim() != 2 || params[1].size(0) % tiling.gates) return {};
    shape.projected = each > least, shape.hidden = params[1].size(0) / tiling.gates, shape.output = params[1].size(1);
    const Stack stack{narrow, shape, tiling, layers, each, params[0].size(1), biases, besides, params};
    const int64_t GH = stack.gates(), H = shape.hidden, P = shape.output;
    if (H == 0 || P == 0 || stack.input == 0 || (!shape.projected && P != H)) return {};
    for (int64_t l = 0; l < layers; ++l)
      for (int64_t d = 0; d < shape.lanes; ++d) {
        const Tensor* given = stack.of(l, d);
        if (!fits(given[0], narrow, {GH, stack.depth(l)}) || !fits(given[1], narrow, {GH, P})) return {};
        if (biases && (!fits(given[2], narrow, {GH}) || !fits(given[3], narrow, {GH}))) return {};
        if (shape.projected && !fits(stack.projection(l, d), narrow, {P, H})) return {};
        for (size_t i = 0; i < besides.size(); ++i)
          if (!fits(stack.beside(l, d, i), narrow, {besides[i] * H})) return {};
      }
    return stack;
  }
};

// A layer's weights as `recurrent_pack` keeps them, in one tensor of bytes: this head, then the parts that it tells of.
struct Kept {
  static constexpr uint64_t kMark = 0x31636170'71657366;

  uint64_t mark;
  int64_t level, stored, sizes[8];   // of the machine, of the weights, of the layer: cell, whether there are biases, D, I, ..
  int64_t w_ih, w_hh, w_hr, scales_ih, scales_hh, bytes;  // where the parts begin, in bytes; all of it
  uint64_t sources;                  // of the parameters that it was made from

  // What it is made of: a layer's sizes and formats, and what tells its weights from others.
  struct Source {
    const Shape& shape;
    const Tiling& tiling;
    int64_t input;  // I
    bool biases;
    uint64_t digest;
  };

  // What tells weights from others, and from themselves after most writes that PyTorch does not count (to `.data`): where they lie, and a
  // few of their values.
  class Digest {
   public:
    void mix(const void* weights, int64_t bytes) {
      const auto* values = static_cast<const char*>(weights);
      const int64_t word = std::min<int64_t>(bytes, 8), count = bytes / word;
      mix(reinterpret_cast<uintptr_t>(values));
      for (int64_t place = 0; place < count; place += std::max<int64_t>(1, count / 16)) {
        uint64_t value = 0;
        std::memcpy(&value, values + place * word, word);
        mix(value);
      }
    }
    uint64_t sum() const { return sum_; }

   private:
    void mix(uint64_t value) { sum_ = (sum_ ^ value) * 0x9e3779b97f4a7c15, sum_ ^= sum_ >> 29; }

    uint64_t sum_ = 0xcbf29ce484222325;
  };

  static Source source(const Stack& stack, int64_t layer) {
    Digest digest;
    for (int64_t d = 0; d < stack.shape.lanes; ++d)
      for (int64_t i = 0; i < 2 + stack.shape.projected; ++i) {
        const Tensor& weights = i < 2 ? stack.of(layer, d)[i] : stack.projection(layer, d);
        digest.mix(data(weights), weights.numel() * bytes_of(stack.shape.type));
      }
    return {stack.shape, stack.tiling, stack.depth(layer), stack.biases, digest.sum()};
  }

  static Kept make(const Source& source, Stored stored) {
    const Shape& shape = source.shape;
    const int64_t I = source.input, D = shape.lanes, GH = source.tiling.gates * shape.hidden, P = shape.output;
    Kept head{};
    head.mark = kMark, head.level = static_cast<int64_t>(cpu::level()), head.stored = static_cast<int64_t>(stored);
    const int64_t sizes[] = {static_cast<int64_t>(shape.cell), source.biases,   D, I, GH, P,
                             shape.projected,                  static_cast<int64_t>(shape.type)};
    std::copy(std::begin(sizes), std::end(sizes), head.sizes);
    const Packer packer(shape, kernels_of(shape));
    int64_t used = sizeof(Kept);
    const auto part = [&](int64_t bytes) {
      const int64_t begin = (used + 63) / 64 * 64;
      used = begin + bytes;
      return begin;
    };
    const bool tiles = stored == Stored::kAsGiven, whole = stored == Stored::kInt8;
    // what is normalized is projected by itself, by the parameters as they are
    head.w_ih = part(tiles && source.tiling.normalized ? 0 : tiles ? packer.units_bytes(I) : D * GH * I * (whole ? 1 : 2));
    head.w_hh = part(tiles ? packer.units_bytes(P) : D * GH * P * (whole ? 1 : 2));
    head.w_hr = part(shape.projected ? packer.columns_bytes() : 0);
    head.scales_ih = part(whole ? D * GH * sizeof(float) : 0);
    head.scales_hh = part(whole ? D * GH * sizeof(float) : 0);
    head.bytes = part(0);
    head.sources = source.digest;
    return head;
  }

  static std::optional<Kept> of(const Tensor& kept) {
    if (!plain(kept) || kept.scalar_type() != ScalarType::Byte) return {};
    return of(data(kept), kept.numel());
  }
  // of so many bytes
  static std::optional<Kept> of(const void* kept, int64_t bytes) {
    if (bytes < static_cast<int64_t>(sizeof(Kept))) return {};
    Kept head;
    std::memcpy(&head, kept, sizeof head);
    if (head.mark != kMark || head.stored < 0 || head.stored > static_cast<int64_t>(Stored::kInt8) || head.bytes != bytes) return {};
    return head;
  }

  // The weights that begin at `base`, if they are those of this layer as it is now.
  static bool take(const Source& source, const void* kept, int64_t bytes, Layer& to) {
    const auto found = of(kept, bytes);
    if (!found) return false;
    const Kept& head = *found;
    const Kept expected = make(source, static_cast<Stored>(head.stored));
    if (std::memcmp(&head, &expected, sizeof head)) return false;
    const Shape& shape = source.shape;
    const auto* base = static_cast<const char*>(kept);
    to.stored = static_cast<Stored>(head.stored);
    to.scales_ih.clear(), to.scales_hh.clear();
    to.tiles_hr = shape.projected ? base + head.w_hr : nullptr;
    if (to.stored == Stored::kAsGiven) {
      to.tiles_ih = base + head.w_ih, to.tiles_hh = base + head.w_hh;
      return true;
    }
    const int64_t GH = source.tiling.gates * shape.hidden, size = to.stored == Stored::kInt8 ? 1 : 2;
    for (int64_t d = 0; d < shape.lanes; ++d) {
      to.w_ih[d] = base + head.w_ih + d * GH * source.input * size;
      to.w_hh[d] = base + head.w_hh + d * GH * shape.output * size;
      to.scales_ih.push_back(base + head.scales_ih + d * GH * sizeof(float));
      to.scales_hh.push_back(base + head.scales_hh + d * GH * sizeof(float));
    }
    return true;
  }
};

// Weights [n, depth] in fp32 to another type; whole numbers to nearest, the largest of a row 127 or -127.
void round_weights(Stored stored, const float* weights, int64_t n, int64_t depth, void* to, float* scales) {
  for (int64_t r = 0; r < n; ++r) {
    const float* row = weights + r * depth;
    if (stored == Stored::kBfloat16) {
      for (int64_t k = 0; k < depth; ++k) static_cast<BFloat16*>(to)[r * depth + k] = BFloat16(row[k]);
      continue;
    }
    float most = 0;
    for (int64_t k = 0; k < depth; ++k) most = std::max(most, std::abs(row[k]));
    scales[r] = most / 127;
    for (int64_t k = 0; k < depth; ++k)
      static_cast<int8_t*>(to)[r * depth + k] = most > 0 ? static_cast<int8_t>(std::nearbyint(row[k] / most * 127)) : 0;
  }
}

// The input gates [rows, D, G*H] of a layer-normalized cell: of every lane its projection, normalized, scaled, and shifted by the biases
// [D, G*H].
Buffer normalized_input(const Stack& stack, int64_t l, const Layer& layer, const void* x, const char* biases) {
  constexpr double kNormEpsilon = 1e-5;  // as torch.nn.LayerNorm
  const Type type = stack.shape.type;
  const int64_t D = stack.shape.lanes, GH = stack.gates(), I = stack.depth(l), rows = layer.rows, stored = bytes_of(type);
  const Kernels& kernels = kernels_of(stack.shape);
  Buffer gates(rows * D * GH * stored), lane(D > 1 ? rows * GH * stored : 0);
  for (int64_t d = 0; d < D; ++d) {
    void* own = D > 1 ? lane.get() : gates.get();
    const bool kept = layer.stored != Stored::kAsGiven;
    if (kept ? reads_kept_in_place(rows, layer.a.batch, I, GH) : reads_in_place(rows, I, false)) {
      const Projection p{x, layer.w_ih[d], layer.stored, layer.stored == Stored::kInt8 ? layer.scales_ih[d] : nullptr,
                         nullptr, rows, I, own, false, GH};
      const int64_t width = stack.tiling.width, grain = std::max<int64_t>(1, kWorkOfMember / (rows * I * width));
      torch::stable::parallel_for(0, tiles_of(GH, width), grain, [&](int64_t begin, int64_t end) {
        kernels.project(stack.shape, p, begin * width, std::min(end * width, GH));
      });
    } else {
      Buffer restored;
      const void* weights = layer.w_ih[d];
      if (kept) {
        restored = Buffer(GH * I * sizeof(float));
        const auto* scales = layer.stored == Stored::kInt8 ? static_cast<const float*>(layer.scales_ih[d]) : nullptr;
        restore(layer.stored, weights, scales, GH, I, static_cast<float*>(restored.get()));
        weights = restored.get();
      }
      const Tensor product = torch::stable::matmul(matrix(x, rows, I, I, stack.narrow), matrix(weights, GH, I, I, stack.narrow, true));
      std::memcpy(own, data(product), rows * GH * stored);
    }
    const AddNorm norm{type, GH, own, nullptr, data(stack.beside(l, d, 0)), biases + d * GH * stored, kNormEpsilon, nullptr, own};
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kWorkOfMember / GH), [&](int64_t begin, int64_t end) {
      const Buffer row(GH * wide_bytes(type));
      layer_norm_kernels().add_norm(norm, begin, end, row.get());
    });
    for (int64_t r = 0; D > 1 && r < rows; ++r)
      std::memcpy(static_cast<char*>(gates.get()) + (r * D + d) * GH * stored, offset(own, r * GH * stored), GH * stored);
  }
  return gates;
}

// What a call leaves for its gradients, of one layer: nothing, c of every step, or also the gates. Of a single step [B, I], whose one
// direction it is then, c_n is c.
enum class Saves { kNothing, kCells, kGates };

// As recurrent_layers and recurrent_layer.
std::vector<Tensor> run_stack(const Tensor& input, const std::optional<Tensor>& h0, const std::optional<Tensor>& c0,
                              const std::vector<Tensor>& params, const std::optional<Tensor>& lengths,
                              const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& hold_h,
                              const std::optional<Tensor>& hold_c, const std::optional<Tensor>& resets, Cell cell,
                              int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first, double zoneout_h,
                              double zoneout_c, const std::optional<std::vector<Tensor>>& kept, Saves saves, bool two_parts) {
  // Whatever is odd is declined: the long way says what is wrong with it, or deals with it.
  if (!plain(input) || !plain(h0) || !plain(c0) || !plain(lengths) || !plain(batch_sizes) || !plain(resets)) return {};
  const auto stack = Stack::make(params, cell, num_layers, has_biases, bidirectional);
  if (!stack || input.scalar_type() != stack->narrow || (kept && kept->size() != static_cast<size_t>(num_layers))) return {};
  // with layer norm, the ops are the way but for weights that were packed; and they know the gradients
  if (stack->tiling.normalized ? !kept : stack->tiling.states > 1 && saves != Saves::kNothing) return {};
  Layer layer;
  Forward& a = layer.a;
  a.two_parts = two_parts;
  a.zoneout = zoneout_of(hold_h, hold_c, zoneout_h, zoneout_c);
  a.shape = stack->shape, a.shape.zoned = any(a.zoneout);
  const Tiling& tiling = stack->tiling;
  const ScalarType narrow = stack->narrow;
  const Type type = a.shape.type;
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden, GH = stack->gates(), lanes = num_layers * D;
  const int64_t K = tiling.states;
  const bool inside = stack->inside();

  // the input [T, B, I], [B, T, I], [N, I], or of one step [B, I]
  const bool step = input.dim() == 2 && !batch_sizes;
  if (input.dim() != (step || batch_sizes ? 2 : 3) || input.numel() == 0 || input.size(input.dim() - 1) != stack->input) return {};
  const int64_t time = batch_first ? 1 : 0;
  int64_t T = step ? 1 : input.size(time), B = step ? input.size(0) : input.dim() == 3 ? input.size(1 - time) : 0;
  const int64_t I = input.size(input.dim() - 1), stored = bytes_of(type), wide = wide_bytes(type);
  if (batch_sizes) {
    if (batch_sizes->dim() != 1 || batch_sizes->scalar_type() != ScalarType::Long || !batch_sizes->is_contiguous() || lengths)
      return {};
    const int64_t* sizes = layer.batch_sizes = integers(batch_sizes);
    T = batch_sizes->numel(), B = T ? sizes[0] : 0;
    if (T == 0 || sizes[T - 1] < 1 || std::accumulate(sizes, sizes + T, int64_t(0)) != input.size(0)) return {};
    if (!std::is_sorted(sizes, sizes + T, std::greater<int64_t>())) return {};
    if (sizes[T - 1] == B) layer.batch_sizes = nullptr;  // sequences of one length lie as padded ones do
  }
  std::vector<int64_t> steps_of;
  if (lengths) {
    if (lengths->dim() != 1 || lengths->numel() != B || !lengths->is_contiguous() || step) return {};
    const bool narrow_lengths = lengths->scalar_type() == ScalarType::Int;
    if (!narrow_lengths && lengths->scalar_type() != ScalarType::Long) return {};
    for (int64_t b = 0; b < B; ++b) {
      const void* given = data(*lengths);
      steps_of.push_back(narrow_lengths ? static_cast<const int32_t*>(given)[b] : static_cast<const int64_t*>(given)[b]);
      if (steps_of[b] < 0 || steps_of[b] > T) return {};
    }
    layer.lengths = steps_of.data();
  }
  const int64_t rows = layer.rows = input.numel() / I;
  layer.steps = T, layer.reverse = D > 1 ? 2 : 0, a.batch = B;
  expect(hold_h, ScalarType::Bool, rows * D * P, "hold_h"), expect(hold_c, ScalarType::Bool, tiling.states == 1 ? rows * D * H : 0, "hold_c");

  Buffer ordered_resets;
  if (resets) {
    if (resets->scalar_type() != ScalarType::Bool || step || resets->dim() != input.dim() - 1) return {};
    if (resets->size(0) != (batch_sizes ? rows : T) || (!batch_sizes && resets->size(1) != B)) return {};
    layer.resets = flags(resets);
    if (!resets->is_contiguous()) {
      ordered_resets = Buffer(rows);
      auto* to = static_cast<bool*>(ordered_resets.get());
      const int64_t of_step = batch_sizes ? 1 : B;
      for (int64_t r = 0; r < rows; ++r)
        to[r] = layer.resets[r / of_step * resets->stride(0) + (batch_sizes ? 0 : r % of_step * resets->stride(1))];
      layer.resets = to;
    }
  }

  const auto state_fits = [&](const std::optional<Tensor>& state, int64_t width) {
    return !state || (step ? fits(*state, narrow, {B, width}) : fits(*state, narrow, {lanes, B, width}));
  };
  if (!state_fits(h0, P) || !state_fits(c0, K * H) || (K ? h0.has_value() != c0.has_value() : c0.has_value())) return {};

  // rows in the order of time
  const void* x = data(input);
  Buffer ordered;
  const bool transposed = batch_first && input.dim() == 3;
  if (!(input.is_contiguous() && (!transposed || T == 1 || B == 1))) {
    const int64_t features = input.stride(input.dim() - 1), dim = input.dim();
    const int64_t of_time = dim == 3 ? input.stride(time) : step ? 0 : input.stride(0);
    const int64_t of_batch = dim == 3 ? input.stride(1 - time) : input.stride(0);
    if (features != 1 && I > 1) return {};
    ordered = Buffer(rows * I * stored);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = dim == 3 ? r / B * of_time + r % B * of_batch : r * input.stride(0);
      std::memcpy(static_cast<char*>(ordered.get()) + r * I * stored, offset(x, from * stored), I * stored);
    }
    x = ordered.get();
  }

  Buffer wide_c0, wide_c, nothing, last_h, last_c, folded(D * (GH + tiling.vectors * H) * stored), between[2];
  const int64_t cells = lanes * B * K * H;
  const void* c = data(c0);
  if (c && stored == 2) {
    wide_c0 = Buffer(cells * wide);
    widen(type, c, cells, static_cast<float*>(wide_c0.get()));
    c = wide_c0.get();
  }
  if (K > 1 && (!c || resets)) {  // of an sLSTM, the last of whose states is the logarithm of what was seen: of nothing
    nothing = Buffer(cells * wide);
    const auto fill = [&]<class A>() {
      for (int64_t i = 0; i < cells; ++i)
        static_cast<A*>(nothing.get())[i] = i % (K * H) < (K - 1) * H ? A(0) : -std::numeric_limits<A>::infinity();
    };
    if (type == Type::kDouble)
      fill.template operator()<double>();
    else
      fill.template operator()<float>();
    c = c ? c : nothing.get();
    a.reset_c = nothing.get();
  }
  std::vector<Tensor> results;
  const auto of_rows = [&](int64_t n, ScalarType dtype) {
    return step ? empty({B, n}, dtype) : batch_sizes ? empty({rows, D, n}, dtype) : empty({T, B, D, n}, dtype);
  };
  if (saves != Saves::kNothing)
    results.push_back(of_rows(P, narrow));
  else if (input.dim() == 2)
    results.push_back(empty({rows, D * P}, narrow));
  else
    results.push_back(transposed ? empty({B, T, D * P}, narrow, true) : empty({T, B, D * P}, narrow));
  void* h_n = nullptr;
  if (step) {
    last_h = Buffer(B * P * stored), h_n = last_h.get();
  } else {
    results.push_back(empty({lanes, B, P}, narrow)), h_n = mutable_data(results.back());
  }
  void* c_n = nullptr;
  if (saves != Saves::kNothing) {
    const ScalarType of_states = type == Type::kDouble ? ScalarType::Double : ScalarType::Float;
    const int64_t saved = saves == Saves::kGates ? saved_of(tiling, a.shape) : 0;
    if (step) {
      last_c = Buffer(cells * wide), c_n = last_c.get();
    } else {
      results.push_back(cells ? empty({D, B, H}, of_states) : empty({0}, of_states)), c_n = mutable_data(results.back());
    }
    results.push_back(cells ? of_rows(H, of_states) : empty({0}, of_states)), a.c = mutable_data(results.back());
    results.push_back(saved ? of_rows(saved * H, narrow) : empty({0}, narrow)), a.gates = mutable_data(results.back());
  } else if (cells) {
    results.push_back(step ? empty({B, K * H}, narrow) : empty({lanes, B, K * H}, narrow)), c_n = mutable_data(results.back());
    if (stored == 2) wide_c = Buffer(cells * wide), c_n = wide_c.get();
  }
  for (int64_t l = 0; l < num_layers; ++l) {
    layer.w_ih.clear(), layer.w_hh.clear(), layer.w_hr.clear();
    char *biases = static_cast<char*>(folded.get()), *vectors = biases + D * GH * stored;
    for (int64_t d = 0; d < D; ++d) {
      const Tensor* of = stack->of(l, d);
      layer.w_ih.push_back(data(of[0])), layer.w_hh.push_back(data(of[1]));
      if (has_biases) {
        const int64_t through = (GH - inside * H) * stored;
        add(type, data(of[2]), data(of[3]), GH - inside * H, biases + d * GH * stored);
        if (inside) {  // as a sum with zero
          add(type, offset(data(of[2]), through), nullptr, H, biases + d * GH * stored + through);
          std::memcpy(vectors + ((d + 1) * tiling.vectors - 1) * H * stored, offset(data(of[3]), through), H * stored);
        }
      }
      if (a.shape.projected) layer.w_hr.push_back(data(stack->projection(l, d)));
      char* own = vectors + d * tiling.vectors * H * stored;
      if (!has_biases && tiling.normalized) std::memset(biases + d * GH * stored, 0, GH * stored), std::memset(own, 0, tiling.vectors * H * stored);
      for (size_t i = tiling.normalized; i < stack->besides.size(); own += stack->besides[i++] * H * stored)
        std::memcpy(own, data(stack->beside(l, d, i)), stack->besides[i] * H * stored);
    }
    if (kept) {
      const Tensor& own = (*kept)[l];
      if (!plain(own) || own.scalar_type() != ScalarType::Byte) return {};
      if (!Kept::take(Kept::source(*stack, l), data(own), own.numel(), layer)) return {};
    }
    a.x = x, a.input = l ? D * P : I, a.x_gates = nullptr;
    a.input_bias = has_biases ? biases : nullptr;
    a.vectors = !stack->besides.empty() || (inside && has_biases) ? vectors : nullptr;
    a.in_place = a.scales = nullptr, a.weights = a.input_weights = a.projection = nullptr;
    Buffer normalized;
    if (tiling.normalized) {
      normalized = normalized_input(*stack, l, layer, x, biases);
      a.x = nullptr, a.x_gates = normalized.get(), a.input_bias = nullptr;
    }
    a.h0 = offset(data(h0), l * D * B * P * stored), a.c0 = offset(c, l * D * B * K * H * wide);
    if (l + 1 < num_layers) {
      between[l & 1] = Buffer(rows * D * P * stored);
      a.y = between[l & 1].get();
    } else {
      a.y = mutable_data(results[0]);
    }
    a.h_n = static_cast<char*>(h_n) + l * D * B * P * stored;
    a.c_n = c_n ? static_cast<char*>(c_n) + l * D * B * K * H * wide : nullptr;
    run(layer);
    x = a.y;
  }
  if (wide_c.get()) narrow_to(type, static_cast<const float*>(c_n), cells, mutable_data(results.back()));
  return results;
}

// of a lane without parameters beside weights and biases
std::vector<Tensor> lane_of(Tensor w_ih, Tensor w_hh, std::optional<Tensor> b_ih, std::optional<Tensor> b_hh) {
  std::vector<Tensor> params;
  params.reserve(4);
  params.push_back(std::move(w_ih)), params.push_back(std::move(w_hh));
  if (b_ih) params.push_back(std::move(*b_ih)), params.push_back(std::move(*b_hh));
  return params;
}

// What a call asks of a tensor, all of it at once. Of what is not on the CPU, or has no strides, nothing else is known.
struct Facts {
  bool given = false, plain = false, contiguous = false;
  int32_t dtype = 0;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const void* values = nullptr;

  explicit Facts(AtenTensorHandle tensor) : given(tensor) {
    if (!given) return;
    static const int32_t cpu = aoti_torch_device_type_cpu(), strided = aoti_torch_layout_strided();
    int32_t device, layout;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
    plain = device == cpu && layout == strided;
    if (!plain) return;
    int64_t* own;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &own));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &contiguous));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &values));
    sizes = own;
  }
  bool is(int32_t type, std::initializer_list<int64_t> wanted) const {
    return plain && contiguous && dtype == type && dim == static_cast<int64_t>(wanted.size()) &&
           std::equal(wanted.begin(), wanted.end(), sizes);
  }
};

// What an op is given, as the dispatcher hands it over: taken in its order, and let go of in the end. TORCH_BOX makes a shared pointer of
// every tensor, and copies those: of a call of some microseconds that is a part.
class Given {
 public:
  explicit Given(const StableIValue* stack) : next_(stack) {}
  Given(const Given&) = delete;
  ~Given() {
    for (int i = 0; i < count_; ++i) aoti_torch_delete_tensor_object(tensors_[i]);
  }
  AtenTensorHandle tensor() { return tensors_[count_++] = torch::stable::detail::to<AtenTensorHandle>(*next_++); }
  AtenTensorHandle optional() {
    const auto found = torch::stable::detail::to<std::optional<AtenTensorHandle>>(*next_++);
    return found ? tensors_[count_++] = *found : nullptr;
  }
  int64_t integer() { return torch::stable::detail::to<int64_t>(*next_++); }

 private:
  const StableIValue* next_;
  AtenTensorHandle tensors_[8];
  int count_ = 0;
};

// What it gives back.
class Results {
 public:
  Results() = default;
  Results(const Results&) = delete;
  ~Results() {
    for (int i = 0; i < count_; ++i) aoti_torch_delete_tensor_object(tensors_[i]);
  }
  // a new tensor's memory
  void* add(Sizes sizes, int32_t dtype, bool transposed = false) {
    int64_t strides[3], stride = 1;
    const int64_t n = sizes.size(), *size = sizes.begin();
    for (int64_t i = n; i-- > 0; stride *= size[i]) strides[i] = stride;
    if (transposed) strides[n - 2] = size[n - 1] * size[n - 3], strides[n - 3] = size[n - 1];
    static const int32_t cpu = aoti_torch_device_type_cpu();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(n, size, strides, dtype, cpu, 0, &tensors_[count_]));
    void* values;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensors_[count_++], &values));
    return values;
  }
  void add(const std::vector<Tensor>& results) {
    for (const Tensor& result : results)
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(result.get(), &tensors_[count_++]));
  }
  // in the place of an op's arguments
  void give(StableIValue* stack, int expected) {
    while (count_ < expected) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&tensors_[count_++]));
    for (int i = 0; i < expected; ++i) stack[i] = torch::stable::detail::from(tensors_[i]);
    count_ = 0;  // they are the caller's
  }

 private:
  AtenTensorHandle tensors_[3];
  int count_ = 0;
};

// The arguments of a call of one lane without parameters beside weights and biases; those that are not there are null.
struct Lane {
  AtenTensorHandle input, w_ih, w_hh, b_ih, b_hh;
  int64_t how;
  AtenTensorHandle h0, c0, kept;

  explicit Lane(Given& given)
      : input(given.tensor()), w_ih(given.tensor()), w_hh(given.tensor()), b_ih(given.tensor()), b_hh(given.tensor()), how(given.integer()),
        h0(given.optional()), c0(given.optional()), kept(given.optional()) {
    if (how & kNoBiases) b_ih = b_hh = nullptr;
  }
};

// run_stack of such a call in float32 or float64 whose tensors lie as the kernels read them. False: it is for run_stack, which also
// declines.
bool run_lane(const Lane& lane, Cell cell, bool step, bool batch_first, bool two_parts, Results& results) {
  static const int32_t single = aoti_torch_dtype_float32(), wide = aoti_torch_dtype_float64(), byte = aoti_torch_dtype_uint8();
  const Facts x(lane.input), w_ih(lane.w_ih), w_hh(lane.w_hh), b_ih(lane.b_ih), b_hh(lane.b_hh), h0(lane.h0), c0(lane.c0);
  const int32_t dtype = w_hh.dtype;
  if (!w_hh.plain || !x.plain || (dtype != single && dtype != wide) || w_hh.dim != 2 || x.dim != (step ? 2 : 3)) return false;
  Layer layer;
  Forward& a = layer.a;
  const int64_t H = w_hh.sizes[1], I = x.sizes[x.dim - 1], time = batch_first ? 1 : 0;
  const int64_t T = step ? 1 : x.sizes[time], B = step ? x.sizes[0] : x.sizes[1 - time];
  a.shape = {cell, dtype == wide ? Type::kDouble : Type::kFloat, 1, H, H, false, false};
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const int64_t GH = tiling.gates * H, own = tiling.own_recurrent * H, stored = bytes_of(a.shape.type);
  if (tiling.vectors != tiling.own_recurrent || tiling.states > 1 || tiling.normalized) return false;
  if (T == 0 || B == 0 || I == 0 || H == 0 || !x.contiguous || x.dtype != dtype || (batch_first && T > 1 && B > 1)) return false;
  if (!w_ih.is(dtype, {GH, I}) || !w_hh.is(dtype, {GH, H})) return false;
  if (b_ih.given && !(b_ih.is(dtype, {GH}) && b_hh.is(dtype, {GH}))) return false;
  const auto fits = [&](const Facts& state) { return !state.given || (step ? state.is(dtype, {B, H}) : state.is(dtype, {1, B, H})); };
  if (!fits(h0) || !fits(c0) || c0.given != (tiling.states == 1 && h0.given)) return false;

  const Buffer folded(b_ih.given ? (GH + own) * stored : 0);
  if (b_ih.given) {
    auto* to = static_cast<char*>(folded.get());
    const int64_t through = (GH - own) * stored;
    add(a.shape.type, b_ih.values, b_hh.values, GH - own, to);
    if (own) {  // as a sum with zero
      add(a.shape.type, offset(b_ih.values, through), nullptr, own, to + through);
      std::memcpy(to + GH * stored, offset(b_hh.values, through), own * stored);
      a.vectors = to + GH * stored;
    }
    a.input_bias = to;
  }
  layer.w_ih.push_back(w_ih.values), layer.w_hh.push_back(w_hh.values);
  if (lane.kept) {
    const Facts kept(lane.kept);
    if (!kept.is(byte, {kept.dim == 1 ? kept.sizes[0] : 0})) return false;
    Kept::Digest digest;
    digest.mix(w_ih.values, GH * I * stored), digest.mix(w_hh.values, GH * H * stored);
    if (!Kept::take({a.shape, tiling, I, b_ih.given, digest.sum()}, kept.values, kept.sizes[0], layer)) return false;
  }
  layer.rows = T * B, layer.steps = T, a.batch = B, a.two_parts = two_parts;
  a.x = x.values, a.input = I, a.h0 = h0.values, a.c0 = c0.values;
  Buffer last;
  if (step) {
    last = Buffer(B * H * stored);
    a.y = results.add({B, H}, dtype), a.h_n = last.get();
    if (tiling.states) a.c_n = results.add({B, H}, dtype);
  } else {
    a.y = batch_first ? results.add({B, T, H}, dtype, true) : results.add({T, B, H}, dtype);
    a.h_n = results.add({1, B, H}, dtype);
    if (tiling.states) a.c_n = results.add({1, B, H}, dtype);
  }
  run(layer);
  return true;
}

// of the caller's, beside which it lives on
std::optional<Tensor> shared(AtenTensorHandle tensor) {
  if (!tensor) return {};
  AtenTensorHandle own;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor, &own));
  return Tensor(own);
}

void call_lane(StableIValue* stack, bool step) {
  Given given(stack);
  const Lane lane(given);
  const bool batch_first = lane.how & kBatchFirst, two_parts = lane.how & kTwoParts;
  const int64_t number = lane.how & ~(kBatchFirst | kTwoParts | kNoBiases);
  STD_TORCH_CHECK(number >= 0 && number < std::ssize(kCellNames), "cell ", number, " is none of the cells");
  const auto cell = static_cast<Cell>(number);
  Results results;
  if (!run_lane(lane, cell, step, batch_first, two_parts, results)) {
    const Tensor input = *shared(lane.input);
    std::optional<std::vector<Tensor>> kept;
    if (lane.kept) kept.emplace(1, *shared(lane.kept));
    const auto params = lane_of(*shared(lane.w_ih), *shared(lane.w_hh), shared(lane.b_ih), shared(lane.b_hh));
    if (input.dim() == (step ? 2 : 3))
      results.add(run_stack(input, shared(lane.h0), shared(lane.c0), params, {}, {}, {}, {}, {}, cell, 1, params.size() == 4, false,
                            batch_first, 0, 0, kept, Saves::kNothing, two_parts));
  }
  results.give(stack, step ? 2 : 3);
}

}  // namespace

void recurrent_one_layer(StableIValue* stack, uint64_t, uint64_t) { call_lane(stack, false); }

void recurrent_step(StableIValue* stack, uint64_t, uint64_t) { call_lane(stack, true); }

std::vector<Tensor> recurrent_layers(Tensor input, std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                     std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::optional<Tensor> resets,
                                     std::string cell, int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first,
                                     double zoneout_h, double zoneout_c, std::optional<std::vector<Tensor>> kept, bool two_parts) {
  return run_stack(input, h0, c0, params, lengths, batch_sizes, {}, {}, resets, cell_of(cell), num_layers, has_biases, bidirectional,
                   batch_first, zoneout_h, zoneout_c, kept, Saves::kNothing, two_parts);
}

std::vector<Tensor> recurrent_packed(Tensor input, std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                     std::vector<Tensor> kept, bool batch_first, bool two_parts) {
  const auto head = kept.empty() ? std::nullopt : Kept::of(kept[0]);
  if (!head || input.dim() != 3) return {};
  const auto [cell, biases, lanes] = std::tie(head->sizes[0], head->sizes[1], head->sizes[2]);
  if (cell < 0 || cell >= std::ssize(kCellNames)) return {};
  const int64_t layers = kept.size();
  return run_stack(input, h0, c0, params, {}, {}, {}, {}, {}, static_cast<Cell>(cell), layers, biases, lanes > 1, batch_first, 0, 0,
                   std::move(kept), Saves::kNothing, two_parts);
}

std::vector<Tensor> recurrent_step_trained(Tensor input, Tensor h0, std::optional<Tensor> c0, Tensor w_ih, Tensor w_hh,
                                           std::optional<Tensor> b_ih, std::optional<Tensor> b_hh, std::string cell) {
  if (input.dim() != 2 || b_ih.has_value() != b_hh.has_value()) return {};
  const auto params = lane_of(std::move(w_ih), std::move(w_hh), std::move(b_ih), std::move(b_hh));
  std::vector<Tensor> results = run_stack(input, h0, c0, params, {}, {}, {}, {}, {}, cell_of(cell), 1, params.size() == 4, false, false,
                                          0, 0, {}, Saves::kGates, false);
  if (results.empty()) return {};
  if (!c0) return {results[0], results[2]};
  const Tensor c = results[1];
  std::swap(results[1], results[2]);
  if (c.scalar_type() != results[0].scalar_type()) results.push_back(torch::stable::to(c, results[0].scalar_type()));
  return results;
}

std::vector<Tensor> recurrent_layer(Tensor x, std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                    std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::optional<Tensor> hold_h,
                                    std::optional<Tensor> hold_c, std::optional<Tensor> resets, std::string cell, bool has_biases,
                                    bool bidirectional, double zoneout_h, double zoneout_c, bool save_gates, bool two_parts) {
  if (x.dim() != (batch_sizes ? 2 : 3)) return {};
  return run_stack(x, h0, c0, params, lengths, batch_sizes, hold_h, hold_c, resets, cell_of(cell), 1, has_biases, bidirectional, false,
                   zoneout_h, zoneout_c, {}, save_gates ? Saves::kGates : Saves::kCells, two_parts);
}

std::vector<Tensor> recurrent_pack(std::vector<Tensor> params, std::string cell, int64_t num_layers, bool has_biases,
                                   bool bidirectional, std::string weights) {
  const auto stack = Stack::make(params, cell_of(cell), num_layers, has_biases, bidirectional);
  const Stored stored = weights == "int8" ? Stored::kInt8 : weights == "bfloat16" ? Stored::kBfloat16 : Stored::kAsGiven;
  if (!stack || (stored != Stored::kAsGiven && stack->shape.type != Type::kFloat)) return {};
  std::vector<Tensor> results;
  for (int64_t l = 0; l < num_layers; ++l) {
    const Kept head = Kept::make(Kept::source(*stack, l), stored);
    results.push_back(empty({head.bytes}, ScalarType::Byte));
    auto* base = static_cast<char*>(mutable_data(results.back()));
    std::memset(base, 0, head.bytes);
    std::memcpy(base, &head, sizeof head);
    const Packer packer(stack->shape, kernels_of(stack->shape));
    std::vector<const void*> w_ih, w_hh, w_hr;
    const int64_t D = stack->shape.lanes, GH = stack->gates(), I = stack->depth(l), P = stack->shape.output;
    for (int64_t d = 0; d < D; ++d) {
      w_ih.push_back(data(stack->of(l, d)[0])), w_hh.push_back(data(stack->of(l, d)[1]));
      if (stack->shape.projected) w_hr.push_back(data(stack->projection(l, d)));
    }
    if (stack->shape.projected) packer.columns(w_hr, base + head.w_hr);
    if (stored == Stored::kAsGiven) {
      if (!stack->tiling.normalized) packer.units(w_ih, I, base + head.w_ih);
      packer.units(w_hh, P, base + head.w_hh);
      continue;
    }
    const int64_t size = stored == Stored::kInt8 ? 1 : 2;
    for (int64_t d = 0; d < D; ++d) {
      auto* scales_ih = reinterpret_cast<float*>(base + head.scales_ih) + d * GH;
      auto* scales_hh = reinterpret_cast<float*>(base + head.scales_hh) + d * GH;
      round_weights(stored, static_cast<const float*>(w_ih[d]), GH, I, base + head.w_ih + d * GH * I * size, scales_ih);
      round_weights(stored, static_cast<const float*>(w_hh[d]), GH, P, base + head.w_hh + d * GH * P * size, scales_hh);
    }
  }
  return results;
}

}  // namespace fastseq::cpu
