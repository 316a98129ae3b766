#include "recurrent.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "level.h"
#include "recurrent_kernel.h"
#include "recurrent_plan.h"

namespace fastseq::cpu {

namespace {

using torch::headeronly::ScalarType;

// The kernels that serve a call. AMX takes bfloat16 (products of its own rate, 14 times that of fp32 multiply-adds) but not what is
// projected: a projection's operand, o tanh(c), would be rounded to bfloat16 on its way.
const Kernels& kernels_of(const Shape& shape) {
  switch (level()) {
#if defined(__x86_64__)
    case Level::kAmx:
      if (shape.type == Type::kBfloat16 && !shape.projected) return kernels_amx();
      [[fallthrough]];
    case Level::kAvx512: return kernels_avx512();
    case Level::kAvx2: return kernels_avx2();
#endif
    default: return kernels_default();
  }
}

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

Type type_of(ScalarType type) {
  if (type == ScalarType::Float) return Type::kFloat;
  if (type == ScalarType::Double) return Type::kDouble;
  if (type == ScalarType::BFloat16) return Type::kBfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, "the CPU kernels take float32, float64, bfloat16 and float16 tensors");
  return Type::kHalf;
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
const void* data(const Tensor& tensor) { return tensor.numel() ? tensor.const_data_ptr() : nullptr; }
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
  Batch(int64_t steps, int64_t batch, const std::optional<Tensor>& lengths, const std::optional<Tensor>& batch_sizes, int64_t parts)
      : steps_(steps), batch_(batch) {
    std::vector<int64_t> order(batch), length;
    std::iota(order.begin(), order.end(), 0);
    if (lengths) {
      const auto* given = static_cast<const int64_t*>(lengths->const_data_ptr());
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return given[a] > given[b]; });
      length.resize(batch);
      for (int64_t s = 0; s < batch; ++s) length[s] = given[order[s]];
    } else if (batch_sizes) {
      const auto* sizes = static_cast<const int64_t*>(batch_sizes->const_data_ptr());
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
Buffer packed_tiles(int64_t lanes, int64_t tiles, int64_t tile_bytes, int64_t work_of_tile, const Pack& pack) {
  Buffer packed(lanes * tiles * tile_bytes);
  const int64_t grain = std::max<int64_t>(1, kWorkOfPacking / std::max<int64_t>(work_of_tile, 1));
  torch::stable::parallel_for(0, lanes * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(i / tiles, i % tiles, static_cast<char*>(packed.get()) + i * tile_bytes);
  });
  return packed;
}

int64_t tiles_of(int64_t columns, int64_t tile) { return (columns + tile - 1) / tile; }

// With zoneout, a cell that saves nothing saves its output.
int64_t saved_of(const Tiling& tiling, const Shape& shape) {
  return shape.zoned ? std::max<int64_t>(tiling.saved, 1) : tiling.saved;
}

}  // namespace

void recurrent_forward(std::optional<Tensor> x, std::optional<Tensor> w_ih, std::optional<Tensor> b_ih,
                       std::optional<Tensor> x_gates, std::optional<Tensor> h_gates, Tensor weight, std::optional<Tensor> vectors,
                       std::optional<Tensor> projection, std::optional<Tensor> h0, std::optional<Tensor> c0,
                       std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::optional<Tensor> hold_h,
                       std::optional<Tensor> hold_c, std::string cell, int64_t reverse, double zoneout_h, double zoneout_c, Tensor y,
                       Tensor h_n, Tensor c_n, Tensor c, Tensor gates) {
  Forward a{};
  a.zoneout = zoneout_of(hold_h, hold_c, zoneout_h, zoneout_c);
  a.shape = {cell_of(cell), type_of(y.scalar_type()), weight.size(0), 0, weight.size(2), projection.has_value(), any(a.zoneout)};
  const Kernels& kernel = kernels_of(a.shape);
  const Tiling tiling = kernel.tiling(a.shape);
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden = weight.size(1) / tiling.gates;
  a.batch = h_n.size(1);
  const int64_t steps = batch_sizes ? batch_sizes->size(0) : y.size(0);
  if (a.batch == 0 || steps == 0 || P == 0) return;
  const int64_t bytes = wide_bytes(a.shape.type), stored = bytes_of(a.shape.type);
  const int64_t unit_tile = tiling.unit_blocks * tiling.width, output_tile = kTileVectors * tiling.width;
  const int64_t unit_tiles = tiles_of(H, unit_tile), output_tiles = tiles_of(P, output_tile);

  const ScalarType narrow = y.scalar_type(), wide = a.shape.type == Type::kDouble ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = y.numel() / (D * P), GH = tiling.gates * H, input = x ? x->size(x->dim() - 1) : 0;
  STD_TORCH_CHECK(x.has_value() == w_ih.has_value() && x.has_value() != x_gates.has_value(),
                  "recurrent: needs either x and w_ih, or x_gates");
  expect(x, narrow, rows * input, "x"), expect(w_ih, narrow, D * GH * input, "w_ih"), expect(b_ih, narrow, D * GH, "b_ih");
  expect(x_gates, narrow, rows * D * GH, "x_gates"), expect(h_gates, wide, D * a.batch * GH, "h_gates");
  expect(weight, narrow, D * GH * P, "weight"), expect(vectors, narrow, D * tiling.vectors * H, "vectors");
  expect(projection, narrow, D * P * H, "projection");
  expect(h0, narrow, D * a.batch * P, "h0"), expect(c0, wide, D * a.batch * tiling.states * H, "c0");
  STD_TORCH_CHECK(!projection || tiling.states == 1, "recurrent: cell ", cell, " has no projection");
  expect(lengths, ScalarType::Long, a.batch, "lengths"), expect(batch_sizes, ScalarType::Long, steps, "batch_sizes");
  expect(hold_h, ScalarType::Bool, rows * D * P, "hold_h");
  expect(hold_c, ScalarType::Bool, tiling.states == 1 ? rows * D * H : 0, "hold_c");
  expect(y, narrow, rows * D * P, "y"), expect(h_n, narrow, D * a.batch * P, "h_n");
  expect(c_n, wide, D * a.batch * tiling.states * H, "c_n"), expect(c, wide, c.numel() ? rows * D * tiling.states * H : 0, "c");
  expect(gates, narrow, gates.numel() ? rows * D * saved_of(tiling, a.shape) * H : 0, "gates");

  const auto pack = [&](const Tensor& weights, int64_t depth) {  // [D, G*H, depth]
    const int64_t tile_bytes = kernel.unit_tile_bytes(a.shape, depth), work = unit_tile * tiling.gates * depth;
    return packed_tiles(D, unit_tiles, tile_bytes, work, [&](int64_t d, int64_t tile, void* to) {
      kernel.pack_units(a.shape, static_cast<const char*>(data(weights)) + d * GH * depth * stored, depth, tile, to);
    });
  };
  Buffer packed, packed_input, packed_projection;
  if (!h_gates) packed = pack(weight, P);
  if (x) {
    a.x = data(x);
    a.input = input;
    packed_input = pack(*w_ih, a.input);
  }
  if (projection)
    packed_projection = packed_tiles(
        D, output_tiles, kernel.column_tile_bytes(a.shape, H), output_tile * H, [&](int64_t d, int64_t tile, void* to) {
          kernel.pack_columns(a.shape, static_cast<const char*>(data(projection)) + d * P * H * stored, P, H, tile, to);
        });
  a.x_gates = data(x_gates), a.h_gates = data(h_gates), a.vectors = data(vectors);
  a.input_weights = packed_input.get(), a.input_bias = data(b_ih);
  a.h0 = data(h0), a.c0 = data(c0);
  a.weights = packed.get(), a.projection = packed_projection.get();
  a.y = mutable_data(y), a.h_n = mutable_data(h_n), a.c_n = mutable_data(c_n), a.c = mutable_data(c), a.gates = mutable_data(gates);

  const Plan plan = make_plan(torch::stable::get_num_threads(), D, a.batch, P + a.input, tiling.gates * H, unit_tiles, bytes);
  const Batch batch(steps, a.batch, lengths, batch_sizes, plan.batch_parts);
  run_teams(plan, D, reverse, batch, unit_tiles, output_tiles, kernel.forward_workspace, a.shape, [&](Work& work) {
    const Buffer scratch(kernel.forward_scratch(a, work));
    work.scratch = scratch.get();
    kernel.forward(a, work);
  });
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
  const Kernels& kernel = kernels_of(a.shape);
  const Tiling tiling = kernel.tiling(a.shape);
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

  Buffer packed, packed_projection;
  if (through_weights)
    packed = packed_tiles(
        D, output_tiles, kernel.column_tile_bytes(a.shape, GH), tile_columns * GH, [&](int64_t d, int64_t tile, void* to) {
          kernel.pack_rows(a.shape, static_cast<const char*>(data(weight)) + d * GH * P * stored, GH, P, tile, to);
        });
  if (projection)
    packed_projection = packed_tiles(
        D, unit_tiles, kernel.column_tile_bytes(a.shape, P), tile_columns * P, [&](int64_t d, int64_t tile, void* to) {
          kernel.pack_rows(a.shape, static_cast<const char*>(data(projection)) + d * P * H * stored, P, H, tile, to);
        });
  a.dy = data(dy), a.dh_n = data(dh_n), a.dc_n = data(dc_n), a.dc = data(dc);
  a.vectors = data(vectors), a.h0 = data(h0), a.c0 = data(c0);
  a.y = data(y), a.c = data(c), a.gates = data(gates);
  a.weights = packed.get(), a.projection = packed_projection.get();
  a.dgates = mutable_data(dgates), a.drecurrent = mutable_data(drecurrent), a.doutput = mutable_data(doutput);
  a.dh0 = mutable_data(dh0), a.dc0 = mutable_data(dc0);

  const Plan plan =
      make_plan(torch::stable::get_num_threads(), D, a.batch, GH, P, std::min(unit_tiles, output_tiles), bytes);
  const Batch batch(steps, a.batch, lengths, batch_sizes, plan.batch_parts);
  run_teams(plan, D, reverse, batch, unit_tiles, output_tiles, kernel.backward_workspace, a.shape,
            [&](const Work& work) { kernel.backward(a, work); });
}

}  // namespace fastseq::cpu
