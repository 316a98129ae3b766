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

  // What tells a layer's weights from others, and from themselves after most writes that PyTorch does not count (to `.data`): where they
  // lie, and a few of their values.
  static uint64_t digest(const Stack& stack, int64_t layer) {
    uint64_t sum = 0xcbf29ce484222325;
    const auto mix = [&](uint64_t value) { sum = (sum ^ value) * 0x9e3779b97f4a7c15, sum ^= sum >> 29; };
    for (int64_t d = 0; d < stack.shape.lanes; ++d)
      for (int64_t i = 0; i < 2 + stack.shape.projected; ++i) {
        const Tensor& weights = i < 2 ? stack.of(layer, d)[i] : stack.projection(layer, d);
        const auto* values = static_cast<const char*>(data(weights));
        const int64_t bytes = weights.numel() * bytes_of(stack.shape.type), word = std::min<int64_t>(bytes, 8), count = bytes / word;
        mix(reinterpret_cast<uintptr_t>(values));
        for (int64_t place = 0; place < count; place += std::max<int64_t>(1, count / 16)) {
          uint64_t value = 0;
          std::memcpy(&value, values + place * word, word);
          mix(value);
        }
      }
    return sum;
  }

  static Kept make(const Stack& stack, int64_t layer, Stored stored) {
    const Shape& shape = stack.shape;
    const int64_t I = stack.depth(layer), D = shape.lanes, GH = stack.gates(), P = shape.output;
    Kept head{};
    head.mark = kMark, head.level = static_cast<int64_t>(cpu::level()), head.stored = static_cast<int64_t>(stored);
    const int64_t sizes[] = {static_cast<int64_t>(shape.cell), stack.biases, D, I, GH, P, shape.projected, static_cast<int64_t>(shape.type)};
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
    head.w_ih = part(tiles && stack.tiling.normalized ? 0 : tiles ? packer.units_bytes(I) : D * GH * I * (whole ? 1 : 2));
    head.w_hh = part(tiles ? packer.units_bytes(P) : D * GH * P * (whole ? 1 : 2));
    head.w_hr = part(shape.projected ? packer.columns_bytes() : 0);
    head.scales_ih = part(whole ? D * GH * sizeof(float) : 0);
    head.scales_hh = part(whole ? D * GH * sizeof(float) : 0);
    head.bytes = part(0);
    head.sources = digest(stack, layer);
    return head;
  }

  static std::optional<Kept> of(const Tensor& kept) {
    if (!plain(kept) || kept.scalar_type() != ScalarType::Byte || kept.numel() < static_cast<int64_t>(sizeof(Kept))) return {};
    Kept head;
    std::memcpy(&head, data(kept), sizeof head);
    if (head.mark != kMark || head.stored < 0 || head.stored > static_cast<int64_t>(Stored::kInt8)) return {};
    return head;
  }

  // The weights of `kept`, if they are those of this layer as it is now.
  static bool take(const Stack& stack, int64_t layer, const Tensor& kept, Layer& to) {
    const auto found = of(kept);
    if (!found) return false;
    const Kept& head = *found;
    const Kept expected = make(stack, layer, static_cast<Stored>(head.stored));
    if (std::memcmp(&head, &expected, sizeof head) || kept.numel() != head.bytes) return false;
    const auto* base = static_cast<const char*>(data(kept));
    to.stored = static_cast<Stored>(head.stored);
    to.scales_ih.clear(), to.scales_hh.clear();
    to.tiles_hr = stack.shape.projected ? base + head.w_hr : nullptr;
    if (to.stored == Stored::kAsGiven) {
      to.tiles_ih = base + head.w_ih, to.tiles_hh = base + head.w_hh;
      return true;
    }
    const int64_t GH = stack.gates(), size = to.stored == Stored::kInt8 ? 1 : 2;
    for (int64_t d = 0; d < stack.shape.lanes; ++d) {
      to.w_ih[d] = base + head.w_ih + d * GH * stack.depth(layer) * size;
      to.w_hh[d] = base + head.w_hh + d * GH * stack.shape.output * size;
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
    if (kept && !Kept::take(*stack, l, (*kept)[l], layer)) return {};
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

}  // namespace

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

std::vector<Tensor> recurrent_one_layer(Tensor input, std::optional<Tensor> h0, std::optional<Tensor> c0, Tensor w_ih, Tensor w_hh,
                                        std::optional<Tensor> b_ih, std::optional<Tensor> b_hh, std::string cell, bool batch_first,
                                        bool two_parts) {
  if (input.dim() != 3 || b_ih.has_value() != b_hh.has_value()) return {};
  const auto params = lane_of(std::move(w_ih), std::move(w_hh), std::move(b_ih), std::move(b_hh));
  return run_stack(input, h0, c0, params, {}, {}, {}, {}, {}, cell_of(cell), 1, params.size() == 4, false, batch_first, 0, 0, {},
                   Saves::kNothing, two_parts);
}

std::vector<Tensor> recurrent_step(Tensor input, std::optional<Tensor> h0, std::optional<Tensor> c0, Tensor w_ih, Tensor w_hh,
                                   std::optional<Tensor> b_ih, std::optional<Tensor> b_hh, std::optional<Tensor> kept, std::string cell) {
  if (input.dim() != 2 || b_ih.has_value() != b_hh.has_value()) return {};
  const auto params = lane_of(std::move(w_ih), std::move(w_hh), std::move(b_ih), std::move(b_hh));
  std::optional<std::vector<Tensor>> packed;
  if (kept) packed.emplace(1, std::move(*kept));
  return run_stack(input, h0, c0, params, {}, {}, {}, {}, {}, cell_of(cell), 1, params.size() == 4, false, false, 0, 0, packed,
                   Saves::kNothing, false);
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
    const Kept head = Kept::make(*stack, l, stored);
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
