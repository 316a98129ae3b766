#include "recurrent.h"

#include <sched.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "level.h"
#include "recurrent_kernel.h"
#include "recurrent_plan.h"

namespace fastseq::cpu {

void Barrier::wait(int64_t weight) {
  const int64_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(weight, std::memory_order_acq_rel) + weight == total_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  // a step takes microseconds, so spin; but give the core away if more threads run than there are cores
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins > 4096) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

namespace {

using torch::headeronly::ScalarType;

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

Cell cell_of(const std::string& name) {
  if (name == "rnn_tanh") return Cell::kRnnTanh;
  if (name == "rnn_relu") return Cell::kRnnRelu;
  if (name == "lstm") return Cell::kLstm;
  if (name == "gru") return Cell::kGru;
  if (name == "coupled_lstm") return Cell::kCoupledLstm;
  if (name == "peephole_lstm") return Cell::kPeepholeLstm;
  STD_TORCH_CHECK(name == "slstm", "cell ", name,
                  " is none of rnn_tanh, rnn_relu, lstm, gru, coupled_lstm, peephole_lstm, slstm");
  return Cell::kSlstm;
}

Type type_of(ScalarType type) {
  if (type == ScalarType::Float) return Type::kFloat;
  if (type == ScalarType::Double) return Type::kDouble;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, "the CPU kernels take float32, float64 and bfloat16 tensors");
  return Type::kBfloat16;
}

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

int64_t bytes_of(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }
int64_t wide_bytes(Type type) { return type == Type::kDouble ? 8 : 4; }

// A layer forward, all its lanes, as both ops make it of their arguments.
struct Layer {
  Forward a{};  // all but what is made of the weights; x, if given, is projected here
  int64_t steps = 0, rows = 0, reverse = 0;
  const int64_t *lengths = nullptr, *batch_sizes = nullptr;
  // of each lane, as PyTorch stores them
  std::vector<const void*> w_ih, w_hh, w_hr;
};

void run(Layer& layer) {
  Forward& a = layer.a;
  const Kernels& kernel = kernels_of(a.shape);
  const Tiling tiling = kernel.tiling(a.shape);
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden, GH = tiling.gates * H, I = a.input;
  const int64_t stored = bytes_of(a.shape.type);
  const bool tiles = multiplies_tiles(a.shape);
  const int64_t unit_tile = tiling.unit_blocks * tiling.width, output_tile = kTileVectors * tiling.width;
  const int64_t unit_tiles = tiles_of(H, unit_tile), output_tiles = tiles_of(P, output_tile);

  const auto pack = [&](const std::vector<const void*>& weights, int64_t depth) {  // of each lane [G*H, depth]
    const int64_t tile_bytes = kernel.unit_tile_bytes(a.shape, depth), work = unit_tile * tiling.gates * depth;
    return packed_tiles(D, unit_tiles, tile_bytes, work,
                        [&](int64_t d, int64_t tile, void* to) { kernel.pack_units(a.shape, weights[d], depth, tile, to); });
  };
  Buffer packed, packed_input, packed_projection, gates;
  if (a.x && reads_in_place(layer.rows, I, tiles)) {
    gates = Buffer(layer.rows * D * GH * stored);
    const int64_t width = tiling.width, vectors = tiles_of(GH, width);
    const int64_t grain = std::max<int64_t>(1, kWorkOfMember / (layer.rows * I * width));
    torch::stable::parallel_for(0, D * vectors, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t d = begin / vectors, next = std::min(end, (d + 1) * vectors);
        const Projection p{a.x, layer.w_ih[d], offset(a.input_bias, d * GH * stored), layer.rows, I,
                           static_cast<char*>(gates.get()) + d * GH * stored, D * GH};
        kernel.project(a.shape, p, (begin - d * vectors) * width, std::min((next - d * vectors) * width, GH));
        begin = next;
      }
    });
    a.x = nullptr;
    a.x_gates = gates.get();
  } else if (a.x) {
    packed_input = pack(layer.w_ih, I);
    a.input_weights = packed_input.get();
  }
  if (!a.x && reads_in_place(layer.steps * a.batch, P, tiles)) {
    a.in_place = layer.w_hh.data();
  } else {
    packed = pack(layer.w_hh, P);
    a.weights = packed.get();
  }
  if (a.shape.projected) {
    packed_projection = packed_tiles(
        D, output_tiles, kernel.column_tile_bytes(a.shape, H), output_tile * H,
        [&](int64_t d, int64_t tile, void* to) { kernel.pack_columns(a.shape, layer.w_hr[d], P, H, tile, to); });
    a.projection = packed_projection.get();
  }
  const Plan plan = make_plan(torch::stable::get_num_threads(), D, a.batch, a.x ? P + I : P, GH, unit_tiles, wide_bytes(a.shape.type));
  const Batch batch(layer.steps, a.batch, layer.lengths, layer.batch_sizes, plan.batch_parts);
  run_teams(plan, D, layer.reverse, batch, unit_tiles, output_tiles, kernel.forward_workspace, a.shape, [&](Work& work) {
    const Buffer scratch(kernel.forward_scratch(a, work));
    work.scratch = scratch.get();
    kernel.forward(a, work);
  });
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

// A number in fp32 from S, and back, as PyTorch converts: bfloat16 to nearest even, a NaN quiet.
float widened(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// to[0 .. n) = a + b, of the type of both; without b, zeros
void add(Type type, const void* a, const void* b, int64_t n, void* to) {
  const auto all = [&]<class T>(T, const auto& sum) {
    for (int64_t i = 0; i < n; ++i) static_cast<T*>(to)[i] = sum(static_cast<const T*>(a)[i], b ? static_cast<const T*>(b)[i] : T());
  };
  if (type == Type::kDouble) return all(double(), [](double x, double y) { return x + y; });
  if (type == Type::kFloat) return all(float(), [](float x, float y) { return x + y; });
  all(uint16_t(), [](uint16_t x, uint16_t y) { return narrowed(widened(x) + widened(y)); });
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

}  // namespace

std::vector<Tensor> recurrent_layers(Tensor input, std::optional<Tensor> h0, std::optional<Tensor> c0, std::vector<Tensor> params,
                                     std::optional<Tensor> lengths, std::optional<Tensor> batch_sizes, std::string cell,
                                     int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first, double zoneout_h,
                                     double zoneout_c) {
  // Whatever is odd is declined: the long way says what is wrong with it, or deals with it.
  const auto plain = [](const std::optional<Tensor>& tensor) {
    int32_t layout = aoti_torch_layout_strided();
    if (tensor) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor->get(), &layout));
    return !tensor || (tensor->is_cpu() && layout == aoti_torch_layout_strided());
  };
  if (!plain(input) || !plain(h0) || !plain(c0) || !plain(lengths) || !plain(batch_sizes)) return {};
  if (!std::all_of(params.begin(), params.end(), plain)) return {};
  const ScalarType narrow = input.scalar_type();
  if (narrow != ScalarType::Float && narrow != ScalarType::Double && narrow != ScalarType::BFloat16) return {};
  Layer layer;
  Forward& a = layer.a;
  a.zoneout = {nullptr, nullptr, zoneout_h, zoneout_c};
  const Type type = type_of(narrow);
  a.shape = {cell_of(cell), type, bidirectional ? 2 : 1, 0, 0, false, any(a.zoneout)};
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const bool inside = tiling.own_recurrent > 0;  // the last gate's recurrent bias acts inside a step
  const int64_t D = a.shape.lanes, G = tiling.gates, own = inside ? 0 : tiling.vectors > 0;
  const int64_t each = 2 + 2 * has_biases + own, lanes = num_layers * D, count = params.size();
  if (num_layers < 1 || tiling.states > 1 || count == 0 || count % lanes || count / lanes - each > 1 || count / lanes < each) return {};
  const bool projected = a.shape.projected = count / lanes > each;
  if (projected && tiling.states != 1) return {};
  if (params[1].dim() != 2) return {};
  const int64_t GH = params[1].size(0), H = a.shape.hidden = GH / G, P = a.shape.output = params[1].size(1);
  if (GH == 0 || P == 0 || GH % G || (!projected && P != H)) return {};

  // the input [T, B, I], [B, T, I], [N, I], or of one step [B, I]
  const bool step = input.dim() == 2 && !batch_sizes;
  if (input.dim() != (step || batch_sizes ? 2 : 3) || input.numel() == 0) return {};
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

  const auto fits = [&](const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    if (tensor.scalar_type() != narrow || tensor.dim() != static_cast<int64_t>(sizes.size()) || !tensor.is_contiguous()) return false;
    int64_t dim = 0;
    for (int64_t size : sizes)
      if (tensor.size(dim++) != size) return false;
    return true;
  };
  const auto state_fits = [&](const std::optional<Tensor>& state, int64_t width) {
    return !state || (step ? fits(*state, {B, width}) : fits(*state, {lanes, B, width}));
  };
  if (!state_fits(h0, P) || !state_fits(c0, H) || (c0 && tiling.states != 1) || (tiling.states == 1 && h0.has_value() != c0.has_value()))
    return {};
  for (int64_t i = 0; i < count; i += count / lanes) {
    const int64_t width = i / (count / lanes) < D ? I : P * D, bias = 2 + 2 * has_biases;
    if (!fits(params[i], {GH, width}) || !fits(params[i + 1], {GH, P})) return {};
    if (has_biases && (!fits(params[i + 2], {GH}) || !fits(params[i + 3], {GH}))) return {};
    if (projected && !fits(params[i + bias], {P, H})) return {};
    if (own && !fits(params[i + bias + projected], {tiling.vectors * H})) return {};
  }

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
    for (int64_t i = 0; i < cells; ++i) static_cast<float*>(wide_c0.get())[i] = widened(static_cast<const uint16_t*>(c)[i]);
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
      const Tensor* of = &params[(l * D + d) * (count / lanes)];
      layer.w_ih.push_back(data(of[0])), layer.w_hh.push_back(data(of[1]));
      if (has_biases) {
        const int64_t through = (GH - inside * H) * stored;
        add(type, data(of[2]), data(of[3]), GH - inside * H, biases + d * GH * stored);
        if (inside) {  // as a sum with zero
          add(type, offset(data(of[2]), through), nullptr, H, biases + d * GH * stored + through);
          std::memcpy(vectors + d * H * stored, offset(data(of[3]), through), H * stored);
        }
      }
      if (projected) layer.w_hr.push_back(data(of[2 + 2 * has_biases]));
      if (own) std::memcpy(vectors + d * tiling.vectors * H * stored, data(of[2 + 2 * has_biases + projected]), tiling.vectors * H * stored);
    }
    a.x = x, a.input = l ? D * P : I, a.x_gates = nullptr;
    a.input_bias = has_biases ? biases : nullptr;
    a.vectors = own || (inside && has_biases) ? vectors : nullptr;
    a.in_place = nullptr, a.weights = a.input_weights = a.projection = nullptr;
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
  if (cells && stored == 2)
    for (int64_t i = 0; i < cells; ++i)
      static_cast<uint16_t*>(mutable_data(results.back()))[i] = narrowed(static_cast<const float*>(c_n)[i]);
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
  const Kernels& kernel = kernels_of(a.shape);
  const Tiling tiling = kernel.tiling(a.shape);
  const int64_t D = a.shape.lanes, P = a.shape.output, H = a.shape.hidden = weight.size(1) / tiling.gates, GH = tiling.gates * H;
  a.batch = dh0.size(1);
  const int64_t steps = batch_sizes ? batch_sizes->size(0) : y.size(0);
  if (a.batch == 0 || steps == 0 || P == 0) return;
  const int64_t bytes = a.shape.type == Type::kDouble ? 8 : 4, stored = a.shape.type == Type::kBfloat16 ? 2 : bytes;
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
  expect(doutput, narrow, projection ? rows * D * P : 0, "doutput");
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
  const Batch batch(steps, a.batch, integers(lengths), integers(batch_sizes), plan.batch_parts);
  run_teams(plan, D, reverse, batch, unit_tiles, output_tiles, kernel.backward_workspace, a.shape,
            [&](const Work& work) { kernel.backward(a, work); });
}

}  // namespace fastseq::cpu
