#include "recurrent.h"

#include <torch/headeronly/util/BFloat16.h>

#include <atomic>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>

#include "level.h"
#include "matrix_product.h"
#include "recurrent_run.h"

namespace fastseq::cpu {

namespace {

// AMX takes bfloat16 (products of its own rate, 14 times that of fp32 multiply-adds) but not what is projected: a projection's operand,
// o tanh(c), would be rounded to bfloat16 on its way.
bool multiplies_tiles(const Shape& shape, Level level = cpu::level()) {
  return level == Level::kAmx && shape.type == Type::kBfloat16 && !shape.projected;
}

// So do products of pairs, for the same reason.
bool multiplies_pairs(const Shape& shape, Level level) {
  return level == Level::kAvx512Bf16 && shape.type == Type::kBfloat16 && !shape.projected;
}

}  // namespace

const Kernels& kernels_of(const Shape& shape) {
  const Level found = level();
  switch (found) {
#if defined(__x86_64__)
    case Level::kAmx: return multiplies_tiles(shape, found) ? kernels_amx() : kernels_avx512();
    case Level::kAvx512Bf16: return multiplies_pairs(shape, found) ? kernels_avx512_bf16() : kernels_avx512();
    case Level::kAvx512: return kernels_avx512();
    case Level::kAvx2: return kernels_avx2();
#endif
    default: return kernels_default();
  }
}

namespace {

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

}  // namespace

Cell cell_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kCellNames); ++i)
    if (name == kCellNames[i]) return static_cast<Cell>(i);
  std::string names;
  for (const char* known : kCellNames) names += (names.empty() ? "" : ", ") + std::string(known);
  STD_TORCH_CHECK(false, "cell ", name, " is none of ", names);
}

Type type_of(ScalarType type) {
  STD_TORCH_CHECK(is_stored(type), "the CPU kernels take float32, float64, bfloat16 and float16 tensors");
  if (type == ScalarType::Float) return Type::kFloat;
  if (type == ScalarType::Double) return Type::kDouble;
  return type == ScalarType::BFloat16 ? Type::kBfloat16 : Type::kHalf;
}

namespace {

// The rows of a call, cut into parts of the batch. Slots are sorted by decreasing length, and dealt to the parts in turn.
class Batch {
 public:
  // lengths [B] or null, sizes [T] of a packed batch or null, resets of rows or null
  Batch(int64_t steps, int64_t batch, const int64_t* lengths, const int64_t* sizes, const bool* resets, int64_t parts)
      : steps_(steps), batch_(batch), resets_(resets) {
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
    if (resets) {
      begins_ = std::make_unique<bool[]>(steps);
      for (int64_t t = 0, row = 0; t < steps; ++t) {
        const int64_t rows = sizes ? sizes[t] : batch;
        begins_[t] = std::memchr(resets + row, true, rows);
        row += rows;
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
            static_cast<int64_t>(part.index.size()),
            resets_,
            begins_.get()};
  }

 private:
  struct Part {
    std::vector<int64_t> index, length;
    std::vector<int32_t> active;
  };
  int64_t steps_, batch_;
  const bool* resets_;
  std::unique_ptr<bool[]> begins_;
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
    const int64_t wide = wide_bytes(a.shape.type);  // as the sums of packed weights, which are never rounded
    gates = Buffer(layer.rows * D * GH * wide);
    const int64_t width = tiling.width, vectors = tiles_of(GH, width);
    const int64_t grain = std::max<int64_t>(1, kWorkOfMember / (layer.rows * I * width));
    torch::stable::parallel_for(0, D * vectors, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t d = begin / vectors, next = std::min(end, (d + 1) * vectors);
        const Projection p{a.x, layer.w_ih[d], a.stored, scaled ? layer.scales_ih[d] : nullptr,
                           offset(a.input_bias, d * GH * stored), layer.rows, I,
                           static_cast<char*>(gates.get()) + d * GH * wide, true, D * GH};
        kernel.project(a.shape, p, (begin - d * vectors) * width, std::min((next - d * vectors) * width, GH));
        begin = next;
      }
    });
    a.x = nullptr;
    a.x_gates = gates.get(), a.wide_x_gates = true;
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
  const Batch batch(layer.steps, a.batch, layer.lengths, layer.batch_sizes, layer.resets, plan.batch_parts);
  std::atomic<bool> within = true;
  run_teams(plan, D, layer.reverse, batch, packer.unit_tiles(), packer.output_tiles(), kernel.forward_workspace, a.shape,
            [&](Work& work) {
              const Buffer scratch(kernel.forward_scratch(a, work));
              work.scratch = scratch.get();
              if (!kernel.forward(a, work)) within = false;
            });
  return within;
}

}  // namespace

void run(Layer& layer) {
  if (is_step(layer)) return run_step(layer);
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

void recurrent_forward(std::optional<Tensor> x, std::optional<Tensor> w_ih, std::optional<Tensor> b_ih,
                       std::optional<Tensor> x_gates, Tensor weight, std::optional<Tensor> vectors, std::optional<Tensor> projection,
                       std::optional<Tensor> h0, std::optional<Tensor> c0, std::optional<Tensor> lengths,
                       std::optional<Tensor> batch_sizes, std::optional<Tensor> hold_h, std::optional<Tensor> hold_c,
                       std::optional<Tensor> resets, std::optional<Tensor> reset_h, std::optional<Tensor> reset_c,
                       std::string cell, int64_t reverse, double zoneout_h, double zoneout_c, bool two_parts, Tensor y, Tensor h_n,
                       Tensor c_n, Tensor c, Tensor gates) {
  Layer layer;
  Forward& a = layer.a;
  a.zoneout = zoneout_of(hold_h, hold_c, zoneout_h, zoneout_c);
  a.shape = {cell_of(cell), type_of(y.scalar_type()), weight.size(0), 0, weight.size(2), projection.has_value(), any(a.zoneout)};
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden = weight.size(1) / tiling.gates;
  a.batch = h_n.size(1), a.two_parts = two_parts;
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
  expect(resets, ScalarType::Bool, rows, "resets"), expect(reset_h, narrow, D * a.batch * P, "reset_h");
  expect(reset_c, wide, D * a.batch * tiling.states * H, "reset_c");
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
  a.h0 = data(h0), a.c0 = data(c0), a.reset_h = data(reset_h), a.reset_c = data(reset_c);
  a.y = mutable_data(y), a.h_n = mutable_data(h_n), a.c_n = mutable_data(c_n), a.c = mutable_data(c), a.gates = mutable_data(gates);
  layer.reverse = reverse, layer.lengths = integers(lengths), layer.batch_sizes = integers(batch_sizes), layer.resets = flags(resets);
  run(layer);
}

namespace {

// A layer backward, all its lanes, as the ops make it of their arguments.
struct LayerBackward {
  Backward a{};  // all but what is made of the weights
  int64_t steps = 0, reverse = 0;
  const int64_t *lengths = nullptr, *batch_sizes = nullptr;
  const bool* resets = nullptr;         // of rows
  std::vector<const void*> w_hh, w_hr;  // of each lane
  bool through_weights = false;         // whether w_hh are packed: the gradient goes through them here
};

void run(LayerBackward& layer) {
  Backward& a = layer.a;
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden, GH = tiling.gates * H;
  const int64_t tile_columns = kTileVectors * tiling.width;
  const int64_t unit_tiles = tiles_of(H, tile_columns), output_tiles = tiles_of(P, tile_columns);
  const Plan plan = make_plan(torch::stable::get_num_threads(), D, a.batch, GH, P, std::min(unit_tiles, output_tiles),
                              wide_bytes(a.shape.type));
  const Batch batch(layer.steps, a.batch, layer.lengths, layer.batch_sizes, layer.resets, plan.batch_parts);
  const auto by = [&](const Kernels& kernel) {
    Buffer packed, packed_projection;
    const auto pack = [&](const std::vector<const void*>& weights, int64_t tiles, int64_t depth, int64_t columns) {
      const int64_t bytes = kernel.column_tile_bytes(a.shape, depth);
      Buffer to(D * tiles * bytes);
      packed_tiles(D, tiles, bytes, tile_columns * depth, to.get(), [&](int64_t d, int64_t tile, void* part) {
        kernel.pack_rows(a.shape, weights[d], depth, columns, tile, part);
      });
      return to;
    };
    if (layer.through_weights) packed = pack(layer.w_hh, output_tiles, GH, P);
    if (a.shape.projected) packed_projection = pack(layer.w_hr, unit_tiles, P, H);
    a.weights = packed.get(), a.projection = packed_projection.get();
    std::atomic<bool> within = true;
    run_teams(plan, D, layer.reverse, batch, unit_tiles, output_tiles, kernel.backward_workspace, a.shape, [&](const Work& work) {
      if (!kernel.backward(a, work)) within = false;
    });
    return within.load();
  };
#if defined(__x86_64__)
  if (layer.through_weights && in_parts(a.shape, tiling, a.batch, layer.steps)) {
    a.least = least_operand(largest(kernels_amx(), layer.w_hh, GH * P));
    if (a.least <= kMostOfParts && by(kernels_amx())) return;
  }
#endif
  by(kernels_of(a.shape));
}

}  // namespace

void recurrent_backward(std::optional<Tensor> dy, std::optional<Tensor> dh_n, std::optional<Tensor> dc_n, std::optional<Tensor> dc,
                        Tensor weight, std::optional<Tensor> vectors, std::optional<Tensor> projection, std::optional<Tensor> h0,
                        std::optional<Tensor> c0, std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes,
                        std::optional<Tensor> hold_h, std::optional<Tensor> hold_c, std::optional<Tensor> resets,
                        std::optional<Tensor> reset_h, std::optional<Tensor> reset_c, Tensor y, Tensor c, Tensor gates,
                        std::string cell, int64_t reverse, double zoneout_h, double zoneout_c, bool through_weights, bool two_parts,
                        Tensor dgates, Tensor drecurrent, Tensor doutput, Tensor dh0, Tensor dc0, Tensor dreset_h, Tensor dreset_c) {
  LayerBackward layer;
  Backward& a = layer.a;
  a.zoneout = zoneout_of(hold_h, hold_c, zoneout_h, zoneout_c);
  a.shape = {cell_of(cell), type_of(y.scalar_type()), weight.size(0), 0, weight.size(2), projection.has_value(), any(a.zoneout)};
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden = weight.size(1) / tiling.gates, GH = tiling.gates * H;
  a.batch = dh0.size(1), a.two_parts = two_parts;
  const int64_t steps = layer.steps = batch_sizes ? batch_sizes->size(0) : y.size(0);
  if (a.batch == 0 || steps == 0 || P == 0) return;
  const int64_t stored = bytes_of(a.shape.type);
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
  expect(resets, ScalarType::Bool, rows, "resets"), expect(reset_h, narrow, states * P, "reset_h");
  expect(reset_c, wide, states * tiling.states * H, "reset_c"), expect(dreset_h, wide, reset_h ? states * P : 0, "dreset_h");
  expect(dreset_c, wide, reset_c ? states * tiling.states * H : 0, "dreset_c");
  STD_TORCH_CHECK(through_weights || !resets, "recurrent: with resets, dh0 is made here");

  a.dy = data(dy), a.dh_n = data(dh_n), a.dc_n = data(dc_n), a.dc = data(dc);
  a.vectors = data(vectors), a.h0 = data(h0), a.c0 = data(c0), a.reset_h = data(reset_h), a.reset_c = data(reset_c);
  a.y = data(y), a.c = data(c), a.gates = data(gates);
  a.dgates = mutable_data(dgates), a.drecurrent = mutable_data(drecurrent), a.doutput = mutable_data(doutput);
  a.dh0 = mutable_data(dh0), a.dc0 = mutable_data(dc0), a.dreset_h = mutable_data(dreset_h), a.dreset_c = mutable_data(dreset_c);

  for (int64_t d = 0; d < D; ++d) {
    layer.w_hh.push_back(offset(data(weight), d * GH * P * stored));
    if (projection) layer.w_hr.push_back(offset(data(projection), d * P * H * stored));
  }
  layer.reverse = reverse, layer.lengths = integers(lengths), layer.batch_sizes = integers(batch_sizes), layer.resets = flags(resets);
  layer.through_weights = through_weights;
  run(layer);
}

namespace {

// Whether torch's products of so few rows are faster than ours, which put their operands together first: AMX's, of whole tiles, and of
// all others those with wide weights, or of float32 with a single row.
bool few_for_ours(Type type, int64_t rows, int64_t weights) {
  constexpr int64_t kRows = 16, kWeights = 512 << 10;
  return rows <= kRows && (level() != Level::kAvx512Bf16 || weights > kWeights || (rows == 1 && type == Type::kFloat));
}

// left [rows, depth], or where it is transposed [depth, rows], x right [depth, columns]; `ours`: by our kernels, if there are any.
Tensor product_of_few(const Tensor& left, bool transposed, const Tensor& right, bool ours) {
  const ScalarType narrow = left.scalar_type();
  const Type type = type_of(narrow);
  const MatrixKernels* kernels = ours ? matrix_kernels(type) : nullptr;
  const int64_t depth = right.size(0), columns = right.size(1), rows = left.size(transposed), bytes = bytes_of(type);
  if (kernels) {
    const Tensor result = empty({rows, columns}, narrow);
    const MatrixProduct product{type, rows, depth, {data(left), left.size(1) * bytes, nullptr}, transposed,
                                {{{data(right), columns * bytes, nullptr}, columns, mutable_data(result), columns * bytes}}, 1};
    if (multiply(*kernels, {product})) return result;
  }
  return torch::stable::matmul(transposed ? matrix(data(left), depth, rows, rows, narrow, true) : left, right);
}

// to[0 .. columns) = the sum of rows `stride` elements apart, in the kernels' arithmetic: of runs of rows, added up in pairs, and the
// pairs in pairs
void sum_rows(Type type, const void* values, int64_t rows, int64_t columns, int64_t stride, void* to) {
  constexpr int64_t kRun = 16;
  const int64_t runs = (rows + kRun - 1) / kRun, levels = std::bit_width(static_cast<uint64_t>(runs));
  with_storage(type, [&]<class S>() {
    using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
    Buffer buffer((levels + 1) * columns * sizeof(A));
    A* sum = static_cast<A*>(buffer.get());
    const auto of_level = [&](int64_t level) { return sum + (level + 1) * columns; };  // of 2^level runs
    const auto add_level = [&](int64_t level) { std::transform(sum, sum + columns, of_level(level), sum, std::plus<A>()); };
    for (int64_t i = 0; i < runs; ++i) {
      std::fill_n(sum, columns, A(0));
      for (int64_t r = i * kRun; r < std::min((i + 1) * kRun, rows); ++r)
        for (int64_t j = 0; j < columns; ++j) sum[j] += static_cast<A>(static_cast<const S*>(values)[r * stride + j]);
      int64_t level = 0;
      for (; i >> level & 1; ++level) add_level(level);
      std::copy_n(sum, columns, of_level(level));
    }
    std::fill_n(sum, columns, A(0));
    for (int64_t level = 0; level < levels; ++level)
      if (runs >> level & 1) add_level(level);
    std::transform(sum, sum + columns, static_cast<S*>(to), [](A sum) { return S(sum); });
  });
}

// Whether zeros are what zeros times these rows are.
bool all_finite(Type type, const void* values, int64_t rows, int64_t columns, int64_t stride) {
  bool finite = true;
  with_storage(type, [&]<class S>() {
    using A = std::conditional_t<std::is_same_v<S, double>, double, float>;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < columns; ++j) {
        const A x = static_cast<A>(static_cast<const S*>(values)[r * stride + j]);
        finite &= x - x == 0;
      }
  });
  return finite;
}

// o tanh(c), in the dtype of c
Tensor times_tanh(const Tensor& o, const Tensor& c) {
  using torch::stable::detail::from, torch::stable::detail::to;
  StableIValue of_tanh[]{from(c)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::tanh", "", of_tanh, TORCH_ABI_VERSION));
  StableIValue stack[]{from(o), of_tanh[0]};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack, TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// to[0 .. n) += values
void add_to(Type type, const void* values, int64_t n, void* to) {
  with_storage(type, [&]<class S>() {
    auto* sums = static_cast<S*>(to);
    std::transform(sums, sums + n, static_cast<const S*>(values), sums, [](S a, S b) { return S(a + b); });
  });
}

}  // namespace

std::vector<Tensor> recurrent_layer_backward(std::optional<Tensor> dy, std::optional<Tensor> dh_n, std::optional<Tensor> dc_n, Tensor x,
                                             std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                             std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes,
                                             std::optional<Tensor> hold_h, std::optional<Tensor> hold_c, std::optional<Tensor> resets,
                                             Tensor y, Tensor c, Tensor gates, std::string cell, double zoneout_h, double zoneout_c,
                                             std::vector<bool> wanted, bool two_parts) {
  const bool packed = batch_sizes.has_value();
  STD_TORCH_CHECK(y.dim() == 4 - packed && x.dim() == 3 - packed && y.numel() && (!packed || batch_sizes->numel()),
                  "recurrent: x must be [T, B, I] and y [T, B, D, P], or with batch_sizes [N, I] and [N, D, P], not empty");
  expect(batch_sizes, ScalarType::Long, packed ? batch_sizes->numel() : 0, "batch_sizes");
  LayerBackward layer;
  Backward& a = layer.a;
  const int64_t *sizes = integers(batch_sizes), D = y.size(y.dim() - 2), P = y.size(y.dim() - 1), I = x.size(x.dim() - 1);
  const int64_t T = packed ? batch_sizes->numel() : y.size(0), B = packed ? sizes[0] : y.size(1), rows = y.numel() / (D * P);
  STD_TORCH_CHECK(!packed || (sizes[T - 1] > 0 && std::is_sorted(sizes, sizes + T, std::greater<int64_t>()) &&
                              std::accumulate(sizes, sizes + T, int64_t(0)) == rows),
                  "recurrent: batch_sizes are none of a packed batch of ", rows, " rows");
  const int64_t count = params.size(), each = count / D;  // parameters of a direction: w_ih, w_hh, perhaps two biases, perhaps w_hr
  STD_TORCH_CHECK(D <= 2 && count % D == 0 && each >= 2 && each <= 5 && static_cast<int64_t>(wanted.size()) == 3 + count,
                  "recurrent: params must be w_ih, w_hh, with biases b_ih, b_hh, and w_hr if there is a projection, of each direction, of "
                  "which wanted tells each");
  const bool projected = each % 2, biases = each >= 4;
  const ScalarType narrow = y.scalar_type();
  a.zoneout = zoneout_of(hold_h, hold_c, zoneout_h, zoneout_c);
  a.shape = {cell_of(cell), type_of(narrow), D, 0, P, projected, any(a.zoneout)};
  const Type type = a.shape.type;
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const ScalarType wide = type == Type::kDouble ? ScalarType::Double : ScalarType::Float;
  const int64_t H = a.shape.hidden = params[D].size(0) / tiling.gates, GH = tiling.gates * H, own = tiling.own_recurrent * H;
  const int64_t K = tiling.states * H, stored = bytes_of(type);
  STD_TORCH_CHECK(tiling.vectors == tiling.own_recurrent && !tiling.normalized, "recurrent: cell ", cell,
                  " has parameters beside weights and biases");
  STD_TORCH_CHECK(projected ? tiling.states == 1 && !a.shape.zoned : P == H, "recurrent: no gradients of this projection here");
  expect(dy, narrow, rows * D * P, "dy"), expect(dh_n, narrow, D * B * P, "dh_n"), expect(dc_n, wide, D * B * K, "dc_n");
  expect(x, narrow, rows * I, "x"), expect(h0, narrow, D * B * P, "h0"), expect(c0, wide, D * B * K, "c0");
  expect(lengths, ScalarType::Long, packed ? 0 : B, "lengths");
  expect(hold_h, ScalarType::Bool, rows * D * P, "hold_h"), expect(hold_c, ScalarType::Bool, rows * D * K, "hold_c");
  expect(resets, ScalarType::Bool, rows, "resets");
  expect(y, narrow, rows * D * P, "y"), expect(c, wide, rows * D * K, "c");
  expect(gates, narrow, rows * D * saved_of(tiling, a.shape) * H, "gates");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t kind = i / D, last = each - 1;
    if (projected && kind == last)
      expect(params[i], narrow, P * H, "w_hr");
    else
      expect(params[i], narrow, kind == 0 ? GH * I : kind == 1 ? GH * P : GH, kind == 0 ? "w_ih" : kind == 1 ? "w_hh" : "bias");
  }
  const auto at = [&](const void* values, int64_t place) { return offset(values, place * stored); };
  std::deque<Buffer> kept;  // what is put together here
  const auto keep = [&](int64_t elements) { return static_cast<char*>(kept.emplace_back(elements * stored).get()); };

  const auto of_rows = [&](int64_t n) { return packed ? empty({rows, D, n}, narrow) : empty({T, B, D, n}, narrow); };
  const Tensor dgates = of_rows(GH), drecurrent = own ? of_rows(own) : empty({0}, narrow);
  const Tensor doutput = projected ? of_rows(P) : empty({0}, narrow);
  const Tensor dh0 = empty({D, B, P}, narrow), dc0 = empty({K ? D : 0, B, K}, wide);
  if (own && biases) {
    char* inside = keep(D * own);
    for (int64_t d = 0; d < D; ++d) std::memcpy(inside + d * own * stored, at(data(params[3 * D + d]), GH - own), own * stored);
    a.vectors = inside;
  }
  for (int64_t d = 0; d < D; ++d) {
    layer.w_hh.push_back(data(params[D + d]));
    if (projected) layer.w_hr.push_back(data(params[count - D + d]));
  }
  a.batch = B, a.two_parts = two_parts, layer.steps = T, layer.reverse = D > 1 ? 2 : 0;
  layer.through_weights = T > 1 || resets;
  layer.lengths = integers(lengths), layer.resets = flags(resets);
  layer.batch_sizes = packed && sizes[T - 1] < B ? sizes : nullptr;  // sequences of one length lie as padded ones do
  a.dy = data(dy), a.dh_n = data(dh_n), a.dc_n = data(dc_n), a.h0 = data(h0), a.c0 = data(c0);
  a.y = data(y), a.c = data(c), a.gates = data(gates);
  a.dgates = mutable_data(dgates), a.drecurrent = mutable_data(drecurrent), a.doutput = mutable_data(doutput);
  a.dh0 = mutable_data(dh0), a.dc0 = mutable_data(dc0);
  run(layer);

  const auto product = [&](const Tensor& left, const Tensor& right) { return torch::stable::matmul(left, right); };
  struct Matrix {
    const void* values;
    int64_t stride;
  };
  // of every direction, gradients of the recurrent products from those of the gates and of the last of them
  const auto recurrent_of = [&](const void* of_gates, const void* of_own, int64_t rows) {
    std::vector<Matrix> found;
    for (int64_t d = 0; d < D; ++d) {
      found.push_back({at(of_gates, d * GH), D * GH});
      if (!own) continue;
      char* to = keep(rows * GH);
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(to + r * GH * stored, at(of_gates, (r * D + d) * GH), (GH - own) * stored);
        std::memcpy(to + (r * GH + GH - own) * stored, at(of_own, (r * D + d) * own), own * stored);
      }
      found.back() = {to, GH};
    }
    return found;
  };
  std::vector<Matrix> dr;
  if (!layer.through_weights && wanted[1]) {
    dr = recurrent_of(a.dgates, a.drecurrent, B);
    for (int64_t d = 0; d < D; ++d) {
      const Tensor through = product(matrix(dr[d].values, B, GH, dr[d].stride, narrow), matrix(layer.w_hh[d], GH, P, P, narrow));
      add_to(type, data(through), B * P, static_cast<char*>(a.dh0) + d * B * P * stored);
    }
  }
  const auto states = [&](std::vector<Tensor>& results) {
    if (wanted[1]) results.push_back(dh0);
    if (wanted[2]) results.push_back(dc0);
  };
  const auto projections = [&](std::vector<Tensor>& results) {
    for (int64_t d = 0; projected && d < D; ++d) {
      if (!wanted[3 + count - D + d]) continue;
      const Tensor o = matrix(at(a.gates, ((d + 1) * tiling.saved - 1) * H), rows, H, D * tiling.saved * H, narrow);
      const Tensor m = torch::stable::to(times_tanh(o, matrix(offset(a.c, d * H * wide_bytes(type)), rows, H, D * H, wide)), narrow);
      results.push_back(product(matrix(at(a.doutput, d * P), rows, P, D * P, narrow, true), m));
    }
  };

  std::vector<Tensor> results;
  const int64_t of_products = (projected ? each - 1 : each) * D;  // parameters whose gradients are sums over rows of the gates'
  if (!few_for_ours(type, rows, GH * (I + P))) {
    std::vector<int64_t> bits(D);
    for (int64_t i = 0; i < of_products; ++i) bits[i % D] |= int64_t(wanted[3 + i]) << i / D;
    bits[0] |= int64_t(wanted[0]) << 4;
    const std::vector<Tensor> w_ih(params.begin(), params.begin() + (wanted[0] ? D : 0));
    std::vector<Tensor> found =
        recurrent_gradients(x, dgates, drecurrent, y, h0, lengths, batch_sizes, resets, {}, w_ih, layer.reverse, bits, two_parts);
    if (!found.empty()) {
      auto next = found.begin();
      if (wanted[0]) results.push_back(*next++);
      states(results);
      std::vector<std::optional<Tensor>> of(of_products);  // they come lane by lane
      for (int64_t d = 0; d < D; ++d)
        for (int64_t i = d; i < of_products; i += D)
          if (wanted[3 + i]) of[i] = *next++;
      for (const auto& gradient : of)
        if (gradient) results.push_back(*gradient);
      projections(results);
      return results;
    }
  }

  // the rows that sequences have, of all lanes
  const Sequences sequences(T, B, layer.lengths, sizes, layer.resets);
  int64_t inner = rows;
  const void *of_gates = a.dgates, *of_own = a.drecurrent, *of_x = data(x);
  if (lengths) {
    std::vector<int64_t> within;
    sequences.each(false, [&](int64_t row, int64_t, int64_t) { within.push_back(row); });
    inner = within.size();
    const auto gathered = [&](const void* from, int64_t n) -> const void* {
      char* to = keep(inner * n);
      for (int64_t i = 0; i < inner; ++i) std::memcpy(to + i * n * stored, at(from, within[i] * n), n * stored);
      return to;
    };
    of_gates = gathered(of_gates, D * GH), of_x = gathered(of_x, I), of_own = own ? gathered(of_own, D * own) : nullptr;
  }
  if (dr.empty() || lengths) dr = recurrent_of(of_gates, of_own, inner);
  std::vector<Matrix> before;  // of every direction, the states before every step; null: zeros
  for (int64_t d = 0; d < D; ++d) {
    const void* first = at(a.h0, d * B * P);
    if (T == 1 && !resets && (!first || !lengths)) {
      before.push_back({first, P});
      continue;
    }
    char* to = keep(inner * P);
    before.push_back({to, P});
    sequences.each(d, [&](int64_t, int64_t other, int64_t slot) {  // the second direction goes backwards
      const void* from = other >= 0 ? at(a.y, (other * D + d) * P) : other == Sequences::kFirst ? at(first, slot * P) : nullptr;
      if (from)
        std::memcpy(to, from, P * stored);
      else
        std::memset(to, 0, P * stored);
      to += P * stored;
    });
  }
  if (wanted[0]) {
    const void* weights = data(params[0]);
    if (D > 1) {
      char* both = keep(D * GH * I);
      for (int64_t d = 0; d < D; ++d) std::memcpy(both + d * GH * I * stored, data(params[d]), GH * I * stored);
      weights = both;
    }
    const Tensor dx = product(matrix(a.dgates, rows, D * GH, D * GH, narrow), matrix(weights, D * GH, I, I, narrow));
    results.push_back(packed ? dx : torch::stable::view(dx, {T, B, I}));
  }
  states(results);
  for (int64_t i = 0; i < of_products; ++i) {
    if (!wanted[3 + i]) continue;
    const int64_t kind = i / D, d = i % D;
    const Matrix of = kind % 2 ? dr[d] : Matrix{at(of_gates, d * GH), D * GH};
    const bool zeros = kind == 1 && !before[d].values;
    if (zeros && all_finite(type, of.values, inner, GH, of.stride)) {
      results.push_back(empty({GH, P}, narrow));
      std::memset(mutable_data(results.back()), 0, GH * P * stored);
    } else if (kind < 2) {
      if (zeros) before[d].values = std::memset(keep(inner * P), 0, inner * P * stored);
      const Matrix right = kind ? before[d] : Matrix{of_x, I};
      const int64_t columns = kind ? P : I;
      results.push_back(
          product(matrix(of.values, inner, GH, of.stride, narrow, true), matrix(right.values, inner, columns, right.stride, narrow)));
    } else {
      results.push_back(empty({GH}, narrow));
      sum_rows(type, of.values, inner, GH, of.stride, mutable_data(results.back()));
    }
  }
  projections(results);
  return results;
}

std::vector<Tensor> recurrent_step_backward(std::optional<Tensor> dh, std::optional<Tensor> dc, Tensor x, Tensor h0,
                                            std::optional<Tensor> c0, Tensor w_ih, Tensor w_hh, std::optional<Tensor> b_hh,
                                            std::optional<Tensor> y, std::optional<Tensor> c, Tensor gates, std::string cell,
                                            std::vector<bool> wanted) {
  STD_TORCH_CHECK(x.dim() == 2 && h0.dim() == 2 && x.numel() && wanted.size() == 7,
                  "recurrent: of a step x must be [B, I] and h0 [B, H], and wanted is of x, h0, c0 and the parameters");
  LayerBackward layer;
  Backward& a = layer.a;
  const ScalarType narrow = h0.scalar_type();
  const int64_t B = h0.size(0), H = h0.size(1), I = x.size(1);
  a.shape = {cell_of(cell), type_of(narrow), 1, H, H, false, false};
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const ScalarType wide = a.shape.type == Type::kDouble ? ScalarType::Double : ScalarType::Float;
  const int64_t GH = tiling.gates * H, own = tiling.own_recurrent * H, K = tiling.states * H;
  STD_TORCH_CHECK(tiling.vectors == tiling.own_recurrent && tiling.states < 2 && !tiling.normalized, "recurrent: cell ", cell,
                  " has parameters beside weights and biases");
  expect(dh, narrow, B * H, "dh"), expect(dc, wide, B * K, "dc"), expect(x, narrow, B * I, "x"), expect(c0, wide, B * K, "c0");
  expect(w_ih, narrow, GH * I, "w_ih"), expect(w_hh, narrow, GH * H, "w_hh"), expect(b_hh, narrow, GH, "b_hh");
  expect(y, narrow, B * H, "y"), expect(c, wide, B * K, "c"), expect(gates, narrow, B * saved_of(tiling, a.shape) * H, "gates");
  STD_TORCH_CHECK(c0.has_value() == (K > 0) && c.has_value() == (K > 0) && (y || saved_of(tiling, a.shape)), "recurrent: cell ", cell,
                  " needs its c before and after the step if it has one, and h after it if it saves no gates");
  const auto bytes = [&](const void* values, int64_t elements) { return offset(values, elements * bytes_of(a.shape.type)); };
  const Tensor dgates = empty({B, GH}, narrow), drecurrent = empty({own ? B : 0, own}, narrow);
  const Tensor dh0 = empty({B, H}, narrow), dc0 = empty({K ? B : 0, K}, wide);
  if (own && b_hh) a.vectors = bytes(data(b_hh), GH - own);
  layer.w_hh.push_back(data(w_hh));
  a.batch = B, layer.steps = 1;
  a.dh_n = data(dh), a.dc_n = data(dc), a.h0 = data(h0), a.c0 = data(c0), a.y = data(y), a.c = data(c), a.gates = data(gates);
  a.dgates = mutable_data(dgates), a.drecurrent = mutable_data(drecurrent);
  a.dh0 = mutable_data(dh0), a.dc0 = mutable_data(dc0);
  run(layer);

  std::vector<Tensor> results;
  Tensor dr = dgates;
  if (own) {
    dr = empty({B, GH}, narrow);
    auto* to = static_cast<char*>(mutable_data(dr));
    const auto copy = [&](int64_t place, const void* from, int64_t n) {
      std::memcpy(to + place * bytes_of(a.shape.type), from, n * bytes_of(a.shape.type));
    };
    for (int64_t b = 0; b < B; ++b)
      copy(b * GH, bytes(a.dgates, b * GH), GH - own), copy((b + 1) * GH - own, bytes(a.drecurrent, b * own), own);
  }
  const bool ours = !few_for_ours(a.shape.type, B, GH * (I + H));
  if (wanted[0]) results.push_back(product_of_few(dgates, false, w_ih, ours));
  if (wanted[1]) {
    add_to(a.shape.type, data(product_of_few(dr, false, w_hh, ours)), B * H, a.dh0);
    results.push_back(dh0);
  }
  if (wanted[2]) results.push_back(dc0);
  if (std::find(wanted.begin() + 3, wanted.end(), true) == wanted.end()) {
    results.push_back(dgates);
    if (own) results.push_back(dr);
    return results;
  }
  for (Tensor& gradient : recurrent_steps_gradients(dgates, dr, x, h0, {wanted.begin() + 3, wanted.end()}))
    results.push_back(std::move(gradient));
  return results;
}

std::vector<Tensor> recurrent_steps_gradients(Tensor dgates, Tensor drecurrent, Tensor x, Tensor h, std::vector<bool> wanted) {
  STD_TORCH_CHECK(dgates.dim() == 2 && x.dim() == 2 && h.dim() == 2 && wanted.size() == 4,
                  "recurrent: of steps dgates and drecurrent must be [N, G*H], x [N, I] and h [N, H], and wanted is of the parameters");
  const ScalarType narrow = h.scalar_type();
  const Type type = type_of(narrow);
  const int64_t rows = dgates.size(0), GH = dgates.size(1), I = x.size(1), H = h.size(1);
  expect(dgates, narrow, rows * GH, "dgates"), expect(drecurrent, narrow, rows * GH, "drecurrent");
  expect(x, narrow, rows * I, "x"), expect(h, narrow, rows * H, "h");
  const bool ours = !few_for_ours(type, rows, GH * (I + H));
  std::vector<Tensor> results;
  if (wanted[0]) results.push_back(product_of_few(dgates, true, x, ours));
  if (wanted[1]) results.push_back(product_of_few(drecurrent, true, h, ours));
  for (int64_t i = 2; i < 4; ++i) {
    if (!wanted[i]) continue;
    results.push_back(empty({GH}, narrow));
    sum_rows(type, data(i == 2 ? dgates : drecurrent), rows, GH, GH, mutable_data(results.back()));
  }
  return results;
}

}  // namespace fastseq::cpu
