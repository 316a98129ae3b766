#include "recurrent.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "level.h"
#include "recurrent_kernel.h"
#include "recurrent_plan.h"

namespace fastseq::cpu {

namespace {

using torch::headeronly::BFloat16, torch::headeronly::ScalarType;

// AMX takes bfloat16 (products of its own rate, 14 times that of fp32 multiply-adds) but not what is projected: a projection's operand,
// o tanh(c), would be rounded to bfloat16 on its way.
bool multiplies_tiles(const Shape& shape) {
  return level() == Level::kAmx && shape.type == Type::kBfloat16 && !shape.projected;
}

// The kernels that serve a call.
const Kernels& kernels_of(const Shape& shape) {
  switch (level()) {
#if defined(__x86_64__)
    case Level::kAmx: return multiplies_tiles(shape) ? kernels_amx() : kernels_avx512();
    case Level::kAvx512: return kernels_avx512();
    case Level::kAvx2: return kernels_avx2();
#endif
    default: return kernels_default();
  }
}

#if defined(__x86_64__)
// The smallest that the largest operand of a step may be, beside weights of which the largest is `weight`: what is lost of parts too
// small, 2^-126, is then below a rounding both of the operand and of the products. Infinity: these weights are multiplied otherwise.
float least_operand(float weight) {
  constexpr float kLeast = 1e-30f;
  if (weight == 0) return kLeast;
  if (!(weight >= kLeast && weight <= kMostOfParts)) return std::numeric_limits<float>::infinity();
  return kLeast / std::min(weight, 1.0f);
}

// Whether a call in float32 is multiplied by AMX, in parts of bfloat16: exact, too, but for what is too large or too small, which the
// kernels notice.
bool in_parts(const Shape& shape, const Tiling& tiling, int64_t batch, int64_t steps) {
  return level() == Level::kAmx && shape.type == Type::kFloat && !shape.projected && !shape.zoned &&
         multiplies_parts(batch, steps, tiling.gates * shape.hidden * shape.output);
}

float largest(const Kernels& kernel, const std::vector<const void*>& weights, int64_t elements) {
  uint32_t bits = 0;
  for (const void* lane : weights) bits = std::max(bits, kernel.largest(static_cast<const float*>(lane), elements));
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
#endif

Cell cell_of(const std::string& name) {
  if (name == "rnn_tanh") return Cell::kRnnTanh;
  if (name == "rnn_relu") return Cell::kRnnRelu;
  if (name == "lstm") return Cell::kLstm;
  if (name == "gru") return Cell::kGru;
  if (name == "coupled_lstm") return Cell::kCoupledLstm;
  if (name == "peephole_lstm") return Cell::kPeepholeLstm;
  if (name == "layer_norm_lstm") return Cell::kLayerNormLstm;
  if (name == "layer_norm_gru") return Cell::kLayerNormGru;
  STD_TORCH_CHECK(name == "slstm", "cell ", name,
                  " is none of rnn_tanh, rnn_relu, lstm, gru, coupled_lstm, peephole_lstm, layer_norm_lstm, layer_norm_gru, slstm");
  return Cell::kSlstm;
}

bool is_stored(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

Type type_of(ScalarType type) {
  STD_TORCH_CHECK(is_stored(type), "the CPU kernels take float32, float64, bfloat16 and float16 tensors");
  if (type == ScalarType::Float) return Type::kFloat;
  if (type == ScalarType::Double) return Type::kDouble;
  return type == ScalarType::BFloat16 ? Type::kBfloat16 : Type::kHalf;
}

// of an element in memory, and of one in the kernels' arithmetic
int64_t bytes_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }
int64_t wide_bytes(Type type) { return type == Type::kDouble ? 8 : 4; }

// What the kernels rely on; the Python side of the op sees to it, a caller of the raw op may not.
void expect(const std::optional<Tensor>& tensor, ScalarType type, int64_t elements, const char* name) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->scalar_type() == type, "recurrent: ", name, " has a wrong dtype");
  STD_TORCH_CHECK(tensor->numel() == elements, "recurrent: ", name, " must have ", elements, " elements, got ", tensor->numel());
  STD_TORCH_CHECK(tensor->is_contiguous(), "recurrent: ", name, " must be contiguous");
}

const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
const void* offset(const void* base, int64_t bytes) { return base ? static_cast<const char*>(base) + bytes : nullptr; }
const void* data(const Tensor& tensor) { return tensor.numel() ? tensor.const_data_ptr() : nullptr; }
const int64_t* integers(const std::optional<Tensor>& tensor) { return static_cast<const int64_t*>(data(tensor)); }
void* mutable_data(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

Zoneout zoneout_of(const std::optional<Tensor>& hold_h, const std::optional<Tensor>& hold_c, double h, double c) {
  return {static_cast<const bool*>(data(hold_h)), static_cast<const bool*>(data(hold_c)), h, c};
}

bool any(const Zoneout& zoneout) { return zoneout.hold_h || zoneout.hold_c || zoneout.h > 0 || zoneout.c > 0; }

// Memory for packed weights and states, 64-byte aligned, since the kernels load whole registers. What it holds is undefined: with
// FASTSEQ_CPU_POISON set, NaN in every dtype, so that a test sees what is read before it is written. Each thread keeps what it has freed,
// up to kKept bytes: pages that the system has to clear anew at every call cost as much as a tenth of it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : size_((std::max<int64_t>(bytes, 1) + 4095) / 4096 * 4096) {
    auto& free = kept().blocks;
    const auto fits = [&](const Block& block) { return block.size >= size_ && block.size <= 2 * size_; };
    const auto found = std::find_if(free.begin(), free.end(), fits);
    if (found != free.end()) {
      data_ = found->data, size_ = found->size;
      kept().total -= size_;
      free.erase(found);
    } else {
      data_ = std::aligned_alloc(64, size_);
      STD_TORCH_CHECK(data_, "out of memory: ", size_, " bytes for packed recurrent weights or states");
    }
    if (std::getenv("FASTSEQ_CPU_POISON")) std::memset(data_, 0xff, size_);
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (!data_) return;
    if (kept().total + size_ > kKept) {
      std::free(data_);
    } else {
      kept().blocks.push_back({data_, size_});
      kept().total += size_;
    }
  }
  void* get() const { return data_; }

 private:
  static constexpr int64_t kKept = 16 << 20;
  struct Block {
    void* data;
    int64_t size;
  };
  struct Kept {
    std::vector<Block> blocks;
    int64_t total = 0;
    ~Kept() {
      for (const Block& block : blocks) std::free(block.data);
    }
  };
  static Kept& kept() {
    static thread_local Kept kept;
    return kept;
  }

  void* data_ = nullptr;
  int64_t size_ = 0;
};

// The rows of a call, cut into parts of the batch. Slots are sorted by decreasing length, and dealt to the parts in turn.
class Batch {
 public:
  // lengths [B] or null, sizes [T] of a packed batch or null
  Batch(int64_t steps, int64_t batch, const int64_t* lengths, const int64_t* sizes, int64_t parts) : steps_(steps), batch_(batch) {
    std::vector<int64_t> order(batch), length;
    std::iota(order.begin(), order.end(), 0);
    if (lengths) {
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
      length.resize(batch);
      for (int64_t s = 0; s < batch; ++s) length[s] = lengths[order[s]];
    } else if (sizes) {
      start_.resize(steps);
      length.assign(batch, 0);
      for (int64_t t = 0, row = 0; t < steps; row += sizes[t++]) {
        start_[t] = row;
        for (int64_t s = 0; s < sizes[t]; ++s) length[s] = t + 1;
      }
    }
    parts_.resize(parts);
    for (int64_t p = 0; p < parts; ++p) {
      Part& part = parts_[p];
      if (length.empty()) {
        part.index.assign(order.begin() + batch * p / parts, order.begin() + batch * (p + 1) / parts);
        continue;
      }
      for (int64_t s = p; s < batch; s += parts) {
        part.index.push_back(order[s]);
        part.length.push_back(length[s]);
      }
      part.active.resize(steps);
      int64_t active = part.index.size();
      for (int64_t t = 0; t < steps; ++t) {
        while (active && part.length[active - 1] <= t) --active;
        part.active[t] = active;
      }
    }
  }

  Rows rows(int64_t p) const {
    const Part& part = parts_[p];
    return {steps_,
            batch_,
            start_.empty() ? nullptr : start_.data(),
            part.index.data(),
            part.active.empty() ? nullptr : part.active.data(),
            part.length.empty() ? nullptr : part.length.data(),
            static_cast<int64_t>(part.index.size())};
  }

 private:
  struct Part {
    std::vector<int64_t> index, length;
    std::vector<int32_t> active;
  };
  int64_t steps_, batch_;
  std::vector<int64_t> start_;
  std::vector<Part> parts_;
};

// Runs body(work) for every participant of every team, teams sharing work as the plan says.
template <class Body>
void run_teams(const Plan& plan, int64_t lanes, int64_t reverse, const Batch& batch, int64_t unit_tiles, int64_t output_tiles,
               int64_t (*workspace_size)(const Shape&, int64_t), const Shape& shape, const Body& body) {
  const int64_t teams = lanes * plan.batch_parts;
  std::vector<Barrier> barriers(teams);
  std::vector<Buffer> workspaces(teams);
  for (int64_t team = 0; team < teams; ++team) {
    barriers[team].reset(plan.members);
    workspaces[team] = Buffer(workspace_size(shape, batch.rows(team % plan.batch_parts).slots));
  }
  const auto participate = [&](int64_t team, int64_t begin, int64_t end) {
    Work work{};
    work.lane = team / plan.batch_parts;
    work.reverse = (reverse >> work.lane) & 1;
    work.rows = batch.rows(team % plan.batch_parts);
    const auto cut = [&](int64_t tiles, int64_t member) { return tiles * member / plan.members; };
    work.unit_tiles[0] = cut(unit_tiles, begin), work.unit_tiles[1] = cut(unit_tiles, end);
    work.output_tiles[0] = cut(output_tiles, begin), work.output_tiles[1] = cut(output_tiles, end);
    work.first = begin == 0;
    work.weight = end - begin;
    work.barrier = work.weight == plan.members ? nullptr : &barriers[team];
    work.workspace = workspaces[team].get();
    body(work);
  };
  // A thread may be given several participants (fewer threads than asked for): it stands for all of them that share a team, so that
  // nobody waits for a participant that would only run later.
  torch::stable::parallel_for(0, teams * plan.members, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t team = begin / plan.members, next = std::min(end, (team + 1) * plan.members);
      participate(team, begin - team * plan.members, next - team * plan.members);
      begin = next;
    }
  });
}

// Packed weights of all lanes, [lanes, tiles] of tile_bytes: pack(lane, tile, to) fills one.
template <class Pack>
void packed_tiles(int64_t lanes, int64_t tiles, int64_t tile_bytes, int64_t work_of_tile, void* packed, const Pack& pack) {
  const int64_t grain = std::max<int64_t>(1, kWorkOfPacking / std::max<int64_t>(work_of_tile, 1));
  torch::stable::parallel_for(0, lanes * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(i / tiles, i % tiles, static_cast<char*>(packed) + i * tile_bytes);
  });
}

int64_t tiles_of(int64_t columns, int64_t tile) { return (columns + tile - 1) / tile; }

// With zoneout, a cell that saves nothing saves its output.
int64_t saved_of(const Tiling& tiling, const Shape& shape) {
  return shape.zoned ? std::max<int64_t>(tiling.saved, 1) : tiling.saved;
}

// A layer forward, all its lanes, as the ops make it of their arguments.
struct Layer {
  Forward a{};  // all but what is made of the weights; x, if given, is projected here
  int64_t steps = 0, rows = 0, reverse = 0;
  const int64_t *lengths = nullptr, *batch_sizes = nullptr;
  std::vector<const void*> w_ih, w_hh, w_hr;  // of each lane, laid out as PyTorch does
  // of weights packed before: either their tiles, as a call would make them, or w_ih and w_hh of another type, with scales
  const void *tiles_ih = nullptr, *tiles_hh = nullptr, *tiles_hr = nullptr;
  Stored stored = Stored::kAsGiven;
  std::vector<const void*> scales_ih, scales_hh;
};

// Sizes of packed weights, and how each is made.
class Packer {
 public:
  Packer(const Shape& shape, const Kernels& kernel)
      : shape_(shape), kernel_(kernel), tiling_(kernel_.tiling(shape)), unit_tile_(tiling_.unit_blocks * tiling_.width) {}

  int64_t unit_tiles() const { return tiles_of(shape_.hidden, unit_tile_); }
  int64_t output_tiles() const { return tiles_of(shape_.output, kTileVectors * tiling_.width); }
  int64_t units_bytes(int64_t depth) const { return shape_.lanes * unit_tiles() * kernel_.unit_tile_bytes(shape_, depth); }
  int64_t columns_bytes() const { return shape_.lanes * output_tiles() * kernel_.column_tile_bytes(shape_, shape_.hidden); }

  // of each lane [G*H, depth]
  void units(const std::vector<const void*>& weights, int64_t depth, void* to) const {
    const int64_t bytes = kernel_.unit_tile_bytes(shape_, depth), work = unit_tile_ * tiling_.gates * depth;
    packed_tiles(shape_.lanes, unit_tiles(), bytes, work, to,
                 [&](int64_t d, int64_t tile, void* part) { kernel_.pack_units(shape_, weights[d], depth, tile, part); });
  }
  // of each lane [P, H]
  void columns(const std::vector<const void*>& weights, void* to) const {
    const int64_t P = shape_.output, H = shape_.hidden, work = kTileVectors * tiling_.width * H;
    packed_tiles(shape_.lanes, output_tiles(), kernel_.column_tile_bytes(shape_, H), work, to,
                 [&](int64_t d, int64_t tile, void* part) { kernel_.pack_columns(shape_, weights[d], P, H, tile, part); });
  }

 private:
  const Shape& shape_;
  const Kernels& kernel_;
  const Tiling tiling_;
  const int64_t unit_tile_;
};

// Kept weights [n, depth] in fp32 again, for calls of so many rows that tiles pay.
void restore(Stored stored, const void* weights, const float* scales, int64_t n, int64_t depth, float* to) {
  for (int64_t r = 0; r < n; ++r, to += depth) {
    if (stored == Stored::kInt8) {
      const auto* row = static_cast<const int8_t*>(weights) + r * depth;
      const float scale = scales[r];
      for (int64_t k = 0; k < depth; ++k) to[k] = row[k] * scale;
    } else {
      const auto* row = static_cast<const BFloat16*>(weights) + r * depth;
      for (int64_t k = 0; k < depth; ++k) to[k] = static_cast<float>(row[k]);
    }
  }
}

// By the kernels for the type, or those that multiply float32 in parts: false if these met a number that is beyond them; then the results
// are not to be used.
bool run(Layer& layer, const Kernels& kernel, bool parts) {
  Forward a = layer.a;
  const Tiling tiling = kernel.tiling(a.shape);
  const Packer packer(a.shape, kernel);
  const int64_t D = a.shape.lanes, H = a.shape.hidden, P = a.shape.output, GH = tiling.gates * H, I = a.input;
  const int64_t stored = bytes_of(a.shape.type);
  const bool tiles = multiplies_tiles(a.shape);
  Buffer packed, packed_input, packed_projection, gates, restored;

  a.stored = layer.stored;
  if (a.stored != Stored::kAsGiven && !reads_kept_in_place(layer.rows, a.batch, P, D * GH)) {
    restored = Buffer(D * GH * (I + P) * sizeof(float));
    auto* to = static_cast<float*>(restored.get());
    for (int64_t d = 0; d < D; ++d) {
      restore(a.stored, layer.w_ih[d], static_cast<const float*>(layer.scales_ih[d]), GH, I, to);
      restore(a.stored, layer.w_hh[d], static_cast<const float*>(layer.scales_hh[d]), GH, P, to + GH * I);
      layer.w_ih[d] = to, layer.w_hh[d] = to + GH * I;
      to += GH * (I + P);
    }
    a.stored = Stored::kAsGiven;
  }
  const bool kept = a.stored != Stored::kAsGiven, scaled = a.stored == Stored::kInt8;
  const bool packed_before = layer.tiles_hh && !parts;
  if (a.x && (kept || (!packed_before && reads_in_place(layer.rows, I, tiles)))) {
    gates = Buffer(layer.rows * D * GH * stored);
    const int64_t width = tiling.width, vectors = tiles_of(GH, width);
    const int64_t grain = std::max<int64_t>(1, kWorkOfMember / (layer.rows * I * width));
    torch::stable::parallel_for(0, D * vectors, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t d = begin / vectors, next = std::min(end, (d + 1) * vectors);
        const Projection p{a.x, layer.w_ih[d], a.stored, scaled ? layer.scales_ih[d] : nullptr,
                           offset(a.input_bias, d * GH * stored), layer.rows, I,
                           static_cast<char*>(gates.get()) + d * GH * stored, D * GH};
        kernel.project(a.shape, p, (begin - d * vectors) * width, std::min((next - d * vectors) * width, GH));
        begin = next;
      }
    });
    a.x = nullptr;
    a.x_gates = gates.get();
  } else if (a.x) {
    a.input_weights = packed_before ? layer.tiles_ih : nullptr;
    if (!a.input_weights) {
      packed_input = Buffer(packer.units_bytes(I));
      packer.units(layer.w_ih, I, packed_input.get());
      a.input_weights = packed_input.get();
    }
  }
  a.weights = packed_before ? layer.tiles_hh : nullptr;
  if (kept || (!a.weights && !a.x && !parts && reads_in_place(layer.steps * a.batch, P, tiles))) {
    a.in_place = layer.w_hh.data();
    a.scales = scaled ? layer.scales_hh.data() : nullptr;
  } else if (!a.weights) {
    packed = Buffer(packer.units_bytes(P));
    packer.units(layer.w_hh, P, packed.get());
    a.weights = packed.get();
  }
  a.projection = parts ? nullptr : layer.tiles_hr;
  if (a.shape.projected && !a.projection) {
    packed_projection = Buffer(packer.columns_bytes());
    packer.columns(layer.w_hr, packed_projection.get());
    a.projection = packed_projection.get();
  }
  const int64_t depth = a.x ? P + I : P;
  const Plan plan = make_plan(torch::stable::get_num_threads(), D, a.batch, depth, GH, packer.unit_tiles(), wide_bytes(a.shape.type));
  const Batch batch(layer.steps, a.batch, layer.lengths, layer.batch_sizes, plan.batch_parts);
  std::atomic<bool> within = true;
  run_teams(plan, D, layer.reverse, batch, packer.unit_tiles(), packer.output_tiles(), kernel.forward_workspace, a.shape,
            [&](Work& work) {
              const Buffer scratch(kernel.forward_scratch(a, work));
              work.scratch = scratch.get();
              if (!kernel.forward(a, work)) within = false;
            });
  return within;
}

void run(Layer& layer) {
  Forward& a = layer.a;
#if defined(__x86_64__)
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const int64_t columns = tiling.gates * a.shape.hidden;
  if (layer.stored == Stored::kAsGiven && in_parts(a.shape, tiling, a.batch, layer.steps)) {
    const Kernels& kernel = kernels_amx();
    a.least_h = least_operand(largest(kernel, layer.w_hh, columns * a.shape.output));
    a.least_x = a.x ? least_operand(largest(kernel, layer.w_ih, columns * a.input)) : 0;
    if (std::max(a.least_h, a.least_x) <= kMostOfParts && run(layer, kernel, true)) return;
  }
#endif
  run(layer, kernels_of(a.shape), false);
}

}  // namespace

void recurrent_forward(std::optional<Tensor> x, std::optional<Tensor> w_ih, std::optional<Tensor> b_ih,
                       std::optional<Tensor> x_gates, Tensor weight, std::optional<Tensor> vectors, std::optional<Tensor> projection,
                       std::optional<Tensor> h0, std::optional<Tensor> c0, std::optional<Tensor> lengths,
                       std::optional<Tensor> batch_sizes, std::optional<Tensor> hold_h, std::optional<Tensor> hold_c,
                       std::string cell, int64_t reverse, double zoneout_h, double zoneout_c, Tensor y, Tensor h_n, Tensor c_n,
                       Tensor c, Tensor gates) {
  Layer layer;
  Forward& a = layer.a;
  a.zoneout = zoneout_of(hold_h, hold_c, zoneout_h, zoneout_c);
  a.shape = {cell_of(cell), type_of(y.scalar_type()), weight.size(0), 0, weight.size(2), projection.has_value(), any(a.zoneout)};
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden = weight.size(1) / tiling.gates;
  a.batch = h_n.size(1);
  layer.steps = batch_sizes ? batch_sizes->size(0) : y.size(0);
  if (a.batch == 0 || layer.steps == 0 || P == 0) return;

  const ScalarType narrow = y.scalar_type(), wide = a.shape.type == Type::kDouble ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = layer.rows = y.numel() / (D * P), GH = tiling.gates * H, input = x ? x->size(x->dim() - 1) : 0;
  STD_TORCH_CHECK(x.has_value() == w_ih.has_value() && x.has_value() != x_gates.has_value(),
                  "recurrent: needs either x and w_ih, or x_gates");
  expect(x, narrow, rows * input, "x"), expect(w_ih, narrow, D * GH * input, "w_ih"), expect(b_ih, narrow, D * GH, "b_ih");
  expect(x_gates, narrow, rows * D * GH, "x_gates");
  expect(weight, narrow, D * GH * P, "weight"), expect(vectors, narrow, D * tiling.vectors * H, "vectors");
  expect(projection, narrow, D * P * H, "projection");
  expect(h0, narrow, D * a.batch * P, "h0"), expect(c0, wide, D * a.batch * tiling.states * H, "c0");
  STD_TORCH_CHECK(!projection || tiling.states == 1, "recurrent: cell ", cell, " has no projection");
  expect(lengths, ScalarType::Long, a.batch, "lengths"), expect(batch_sizes, ScalarType::Long, layer.steps, "batch_sizes");
  expect(hold_h, ScalarType::Bool, rows * D * P, "hold_h");
  expect(hold_c, ScalarType::Bool, tiling.states == 1 ? rows * D * H : 0, "hold_c");
  expect(y, narrow, rows * D * P, "y"), expect(h_n, narrow, D * a.batch * P, "h_n");
  expect(c_n, wide, D * a.batch * tiling.states * H, "c_n"), expect(c, wide, c.numel() ? rows * D * tiling.states * H : 0, "c");
  expect(gates, narrow, gates.numel() ? rows * D * saved_of(tiling, a.shape) * H : 0, "gates");

  const int64_t stored = bytes_of(a.shape.type);
  for (int64_t d = 0; d < D; ++d) {
    layer.w_hh.push_back(offset(data(weight), d * GH * P * stored));
    if (x) layer.w_ih.push_back(offset(data(w_ih), d * GH * input * stored));
    if (projection) layer.w_hr.push_back(offset(data(projection), d * P * H * stored));
  }
  a.x = data(x), a.input = input, a.input_bias = data(b_ih), a.x_gates = data(x_gates), a.vectors = data(vectors);
  a.h0 = data(h0), a.c0 = data(c0);
  a.y = mutable_data(y), a.h_n = mutable_data(h_n), a.c_n = mutable_data(c_n), a.c = mutable_data(c), a.gates = mutable_data(gates);
  layer.reverse = reverse, layer.lengths = integers(lengths), layer.batch_sizes = integers(batch_sizes);
  run(layer);
}

namespace {

// Calls body.template operator()<S>(): the type of an element in memory, with PyTorch's conversions to fp32 and back.
template <class F>
void with_type(Type type, F&& body) {
  switch (type) {
    case Type::kFloat: return body.template operator()<float>();
    case Type::kDouble: return body.template operator()<double>();
    case Type::kBfloat16: return body.template operator()<BFloat16>();
    case Type::kHalf: return body.template operator()<torch::headeronly::Half>();
  }
}

// to[0 .. n) = a + b, of the type of both; without b, zeros
void add(Type type, const void* a, const void* b, int64_t n, void* to) {
  with_type(type, [&]<class S>() {
    for (int64_t i = 0; i < n; ++i) static_cast<S*>(to)[i] = static_cast<const S*>(a)[i] + (b ? static_cast<const S*>(b)[i] : S(0));
  });
}

// n elements of a type in memory to fp32, and back
void widen(Type type, const void* from, int64_t n, float* to) {
  with_type(type, [&]<class S>() { std::copy_n(static_cast<const S*>(from), n, to); });
}
void narrow_to(Type type, const float* from, int64_t n, void* to) {
  with_type(type, [&]<class S>() { std::transform(from, from + n, static_cast<S*>(to), [](float x) { return S(x); }); });
}

// A new tensor on the CPU, contiguous, or the first two of its three dimensions transposed in memory.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, bool transposed = false) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  if (transposed) strides[0] = sizes[2], strides[1] = sizes[0] * sizes[2];
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                         torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

bool plain(const std::optional<Tensor>& tensor) {
  int32_t layout = aoti_torch_layout_strided();
  if (tensor) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor->get(), &layout));
  return !tensor || (tensor->is_cpu() && layout == aoti_torch_layout_strided());
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
  bool biases, own;             // whether there are biases, and a parameter beside
  const std::vector<Tensor>& params;

  int64_t gates() const { return tiling.gates * shape.hidden; }
  int64_t depth(int64_t layer) const { return layer ? shape.lanes * shape.output : input; }
  // the parameters of a lane of a layer
  const Tensor* of(int64_t layer, int64_t lane) const { return &params[(layer * shape.lanes + lane) * each]; }
  const Tensor& projection(int64_t layer, int64_t lane) const { return of(layer, lane)[2 + 2 * biases]; }
  const Tensor& beside(int64_t layer, int64_t lane) const { return of(layer, lane)[2 + 2 * biases + shape.projected]; }

  // Nothing if they are no plain stack of a cell with at most one state beside h.
  static std::optional<Stack> make(const std::vector<Tensor>& params, const std::string& cell, int64_t layers, bool biases,
                                   bool bidirectional) {
    if (layers < 1 || params.size() < 2 || !std::all_of(params.begin(), params.end(), plain)) return {};
    const ScalarType narrow = params[0].scalar_type();
    if (!is_stored(narrow)) return {};
    Shape shape{cell_of(cell), type_of(narrow), bidirectional ? 2 : 1, 0, 0, false, false};
    const Tiling tiling = kernels_of(shape).tiling(shape);
    if (tiling.normalized) return {};  // its input is to be normalized
    const bool own = tiling.own_recurrent == 0 && tiling.vectors > 0;
    const int64_t lanes = layers * shape.lanes, count = params.size(), each = count / lanes, least = 2 + 2 * biases + own;
    if (tiling.states > 1 || count % lanes || each < least || each > least + (tiling.states == 1)) return {};
    if (params[0].dim() != 2 || params[1].dim() != 2 || params[1].size(0) % tiling.gates) return {};
    shape.projected = each > least, shape.hidden = params[1].size(0) / tiling.gates, shape.output = params[1].size(1);
    const Stack stack{narrow, shape, tiling, layers, each, params[0].size(1), biases, own, params};
    const int64_t GH = stack.gates(), H = shape.hidden, P = shape.output;
    if (H == 0 || P == 0 || stack.input == 0 || (!shape.projected && P != H)) return {};
    for (int64_t l = 0; l < layers; ++l)
      for (int64_t d = 0; d < shape.lanes; ++d) {
        const Tensor* given = stack.of(l, d);
        if (!fits(given[0], narrow, {GH, stack.depth(l)}) || !fits(given[1], narrow, {GH, P})) return {};
        if (biases && (!fits(given[2], narrow, {GH}) || !fits(given[3], narrow, {GH}))) return {};
        if (shape.projected && !fits(stack.projection(l, d), narrow, {P, H})) return {};
        if (own && !fits(stack.beside(l, d), narrow, {tiling.vectors * H})) return {};
      }
    return stack;
  }
};

// A layer's weights as `recurrent_pack` keeps them, in one tensor of bytes: this head, then the parts that it tells of.
struct Kept {
  static constexpr uint64_t kMark = 0x31636170'71657366;

  uint64_t mark;
  int64_t level, stored, sizes[6];   // of the machine, of the weights, of the layer
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
    const int64_t sizes[] = {static_cast<int64_t>(shape.type), D, I, GH, P, shape.projected};
    std::copy(std::begin(sizes), std::end(sizes), head.sizes);
    const Packer packer(shape, kernels_of(shape));
    int64_t used = sizeof(Kept);
    const auto part = [&](int64_t bytes) {
      const int64_t begin = (used + 63) / 64 * 64;
      used = begin + bytes;
      return begin;
    };
    const bool tiles = stored == Stored::kAsGiven, whole = stored == Stored::kInt8;
    head.w_ih = part(tiles ? packer.units_bytes(I) : D * GH * I * (whole ? 1 : 2));
    head.w_hh = part(tiles ? packer.units_bytes(P) : D * GH * P * (whole ? 1 : 2));
    head.w_hr = part(shape.projected ? packer.columns_bytes() : 0);
    head.scales_ih = part(whole ? D * GH * sizeof(float) : 0);
    head.scales_hh = part(whole ? D * GH * sizeof(float) : 0);
    head.bytes = part(0);
    head.sources = digest(stack, layer);
    return head;
  }

  // The weights of `kept`, if they are those of this layer as it is now.
  static bool take(const Stack& stack, int64_t layer, const Tensor& kept, Layer& to) {
    if (!plain(kept) || kept.scalar_type() != ScalarType::Byte || kept.numel() < static_cast<int64_t>(sizeof(Kept))) return false;
    const auto* base = static_cast<const char*>(data(kept));
    Kept head;
    std::memcpy(&head, base, sizeof head);
    if (head.mark != kMark || head.stored < 0 || head.stored > static_cast<int64_t>(Stored::kInt8)) return false;
    const Kept expected = make(stack, layer, static_cast<Stored>(head.stored));
    if (std::memcmp(&head, &expected, sizeof head) || kept.numel() != head.bytes) return false;
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

}  // namespace

std::vector<Tensor> recurrent_layers(Tensor input, std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                     std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::string cell,
                                     int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first, double zoneout_h,
                                     double zoneout_c, std::optional<std::vector<Tensor>> kept) {
  // Whatever is odd is declined: the long way says what is wrong with it, or deals with it.
  if (!plain(input) || !plain(h0) || !plain(c0) || !plain(lengths) || !plain(batch_sizes)) return {};
  const auto stack = Stack::make(params, cell, num_layers, has_biases, bidirectional);
  if (!stack || input.scalar_type() != stack->narrow || (kept && kept->size() != static_cast<size_t>(num_layers))) return {};
  Layer layer;
  Forward& a = layer.a;
  a.zoneout = {nullptr, nullptr, zoneout_h, zoneout_c};
  a.shape = stack->shape, a.shape.zoned = any(a.zoneout);
  const Tiling& tiling = stack->tiling;
  const ScalarType narrow = stack->narrow;
  const Type type = a.shape.type;
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden, GH = stack->gates(), lanes = num_layers * D;
  const bool inside = tiling.own_recurrent > 0;  // the last gate's recurrent bias acts inside a step

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

  const auto state_fits = [&](const std::optional<Tensor>& state, int64_t width) {
    return !state || (step ? fits(*state, narrow, {B, width}) : fits(*state, narrow, {lanes, B, width}));
  };
  if (!state_fits(h0, P) || !state_fits(c0, H) || (tiling.states == 1 ? h0.has_value() != c0.has_value() : c0.has_value())) return {};

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

  Buffer wide_c0, wide_c, last_h, folded(D * (GH + tiling.vectors * H) * stored), between[2];
  const int64_t cells = tiling.states ? lanes * B * H : 0;
  const void* c = data(c0);
  if (c && stored == 2) {
    wide_c0 = Buffer(cells * wide);
    widen(type, c, cells, static_cast<float*>(wide_c0.get()));
    c = wide_c0.get();
  }
  std::vector<Tensor> results;
  if (input.dim() == 2)
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
  if (cells) {
    results.push_back(step ? empty({B, H}, narrow) : empty({lanes, B, H}, narrow)), c_n = mutable_data(results.back());
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
          std::memcpy(vectors + d * H * stored, offset(data(of[3]), through), H * stored);
        }
      }
      if (a.shape.projected) layer.w_hr.push_back(data(stack->projection(l, d)));
      if (stack->own) std::memcpy(vectors + d * tiling.vectors * H * stored, data(stack->beside(l, d)), tiling.vectors * H * stored);
    }
    if (kept && !Kept::take(*stack, l, (*kept)[l], layer)) return {};
    a.x = x, a.input = l ? D * P : I, a.x_gates = nullptr;
    a.input_bias = has_biases ? biases : nullptr;
    a.vectors = stack->own || (inside && has_biases) ? vectors : nullptr;
    a.in_place = a.scales = nullptr, a.weights = a.input_weights = a.projection = nullptr;
    a.h0 = offset(data(h0), l * D * B * P * stored), a.c0 = offset(c, l * D * B * H * wide);
    if (l + 1 < num_layers) {
      between[l & 1] = Buffer(rows * D * P * stored);
      a.y = between[l & 1].get();
    } else {
      a.y = mutable_data(results[0]);
    }
    a.h_n = static_cast<char*>(h_n) + l * D * B * P * stored;
    a.c_n = c_n ? static_cast<char*>(c_n) + l * D * B * H * wide : nullptr;
    run(layer);
    x = a.y;
  }
  if (cells && stored == 2) narrow_to(type, static_cast<const float*>(c_n), cells, mutable_data(results.back()));
  return results;
}

std::vector<Tensor> recurrent_pack(std::vector<Tensor> params, std::string cell, int64_t num_layers, bool has_biases,
                                   bool bidirectional, std::string weights) {
  const auto stack = Stack::make(params, cell, num_layers, has_biases, bidirectional);
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
      packer.units(w_ih, I, base + head.w_ih), packer.units(w_hh, P, base + head.w_hh);
      continue;
    }
    const int64_t size = stored == Stored::kInt8 ? 1 : 2;
    for (int64_t d = 0; d < D; ++d) {
      auto *scales_ih = reinterpret_cast<float*>(base + head.scales_ih) + d * GH, *scales_hh = reinterpret_cast<float*>(base + head.scales_hh) + d * GH;
      round_weights(stored, static_cast<const float*>(w_ih[d]), GH, I, base + head.w_ih + d * GH * I * size, scales_ih);
      round_weights(stored, static_cast<const float*>(w_hh[d]), GH, P, base + head.w_hh + d * GH * P * size, scales_hh);
    }
  }
  return results;
}

void recurrent_backward(std::optional<Tensor> dy, std::optional<Tensor> dh_n, std::optional<Tensor> dc_n, std::optional<Tensor> dc,
                        Tensor weight, std::optional<Tensor> vectors, std::optional<Tensor> projection, std::optional<Tensor> h0,
                        std::optional<Tensor> c0, std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes,
                        std::optional<Tensor> hold_h, std::optional<Tensor> hold_c, Tensor y, Tensor c, Tensor gates,
                        std::string cell, int64_t reverse, double zoneout_h, double zoneout_c, bool through_weights, Tensor dgates,
                        Tensor drecurrent, Tensor doutput, Tensor dh0, Tensor dc0) {
  Backward a{};
  a.zoneout = zoneout_of(hold_h, hold_c, zoneout_h, zoneout_c);
  a.shape = {cell_of(cell), type_of(y.scalar_type()), weight.size(0), 0, weight.size(2), projection.has_value(), any(a.zoneout)};
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden = weight.size(1) / tiling.gates, GH = tiling.gates * H;
  a.batch = dh0.size(1);
  const int64_t steps = batch_sizes ? batch_sizes->size(0) : y.size(0);
  if (a.batch == 0 || steps == 0 || P == 0) return;
  const int64_t bytes = wide_bytes(a.shape.type), stored = bytes_of(a.shape.type);
  const int64_t tile_columns = kTileVectors * tiling.width;
  const ScalarType narrow = y.scalar_type(), wide = a.shape.type == Type::kDouble ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = y.numel() / (D * P), states = D * a.batch;
  expect(dy, narrow, rows * D * P, "dy"), expect(dh_n, narrow, states * P, "dh_n");
  expect(dc_n, wide, states * tiling.states * H, "dc_n"), expect(dc, wide, rows * D * tiling.states * H, "dc");
  expect(weight, narrow, D * GH * P, "weight"), expect(vectors, narrow, D * tiling.vectors * H, "vectors");
  expect(projection, narrow, D * P * H, "projection");
  expect(h0, narrow, states * P, "h0"), expect(c0, wide, states * tiling.states * H, "c0");
  STD_TORCH_CHECK(!projection || tiling.states == 1, "recurrent: cell ", cell, " has no projection");
  expect(lengths, ScalarType::Long, a.batch, "lengths"), expect(batch_sizes, ScalarType::Long, steps, "batch_sizes");
  expect(hold_h, ScalarType::Bool, rows * D * P, "hold_h");
  expect(hold_c, ScalarType::Bool, tiling.states == 1 ? rows * D * H : 0, "hold_c");
  expect(y, narrow, rows * D * P, "y"), expect(c, wide, rows * D * tiling.states * H, "c");
  expect(gates, narrow, rows * D * saved_of(tiling, a.shape) * H, "gates"), expect(dgates, narrow, rows * D * GH, "dgates");
  expect(drecurrent, narrow, rows * D * tiling.own_recurrent * H, "drecurrent");
  expect(doutput, narrow, projection || tiling.normalized ? rows * D * P : 0, "doutput");
  expect(dh0, narrow, states * P, "dh0"), expect(dc0, wide, states * tiling.states * H, "dc0");

  const int64_t unit_tiles = tiles_of(H, tile_columns), output_tiles = tiles_of(P, tile_columns);

  a.dy = data(dy), a.dh_n = data(dh_n), a.dc_n = data(dc_n), a.dc = data(dc);
  a.vectors = data(vectors), a.h0 = data(h0), a.c0 = data(c0);
  a.y = data(y), a.c = data(c), a.gates = data(gates);
  a.dgates = mutable_data(dgates), a.drecurrent = mutable_data(drecurrent), a.doutput = mutable_data(doutput);
  a.dh0 = mutable_data(dh0), a.dc0 = mutable_data(dc0);

  const Plan plan =
      make_plan(torch::stable::get_num_threads(), D, a.batch, GH, P, std::min(unit_tiles, output_tiles), bytes);
  const Batch batch(steps, a.batch, integers(lengths), integers(batch_sizes), plan.batch_parts);
  const auto run = [&](const Kernels& kernel) {
    Buffer packed, packed_projection;
    const auto pack = [&](const std::optional<Tensor>& weights, int64_t tiles, int64_t depth, int64_t columns) {
      const int64_t bytes = kernel.column_tile_bytes(a.shape, depth);
      Buffer to(D * tiles * bytes);
      packed_tiles(D, tiles, bytes, tile_columns * depth, to.get(), [&](int64_t d, int64_t tile, void* part) {
        kernel.pack_rows(a.shape, offset(data(weights), d * depth * columns * stored), depth, columns, tile, part);
      });
      return to;
    };
    if (through_weights) packed = pack(weight, output_tiles, GH, P);
    if (projection) packed_projection = pack(projection, unit_tiles, P, H);
    a.weights = packed.get(), a.projection = packed_projection.get();
    std::atomic<bool> within = true;
    run_teams(plan, D, reverse, batch, unit_tiles, output_tiles, kernel.backward_workspace, a.shape, [&](const Work& work) {
      if (!kernel.backward(a, work)) within = false;
    });
    return within.load();
  };
#if defined(__x86_64__)
  if (through_weights && in_parts(a.shape, tiling, a.batch, steps)) {
    a.least = least_operand(largest(kernels_amx(), {data(weight)}, D * GH * P));
    if (a.least <= kMostOfParts && run(kernels_amx())) return;
  }
#endif
  run(kernels_of(a.shape));
}

}  // namespace fastseq::cpu
