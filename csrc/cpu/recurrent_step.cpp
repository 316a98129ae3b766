// The host part of single steps: which calls they serve, and how threads share one.
#include "level.h"
#include "recurrent_run.h"
#include "recurrent_step.h"

namespace fastseq::cpu {

namespace {

const StepKernels& kernels() {
  switch (level()) {
#if defined(__x86_64__)
    case Level::kAmx:
    case Level::kAvx512Bf16:
    case Level::kAvx512: return step_kernels_avx512();
    case Level::kAvx2: return step_kernels_avx2();
#endif
    default: return step_kernels_default();
  }
}

bool steps(Cell cell) { return cell == Cell::kRnnTanh || cell == Cell::kRnnRelu || cell == Cell::kLstm || cell == Cell::kGru; }

}  // namespace

bool is_step(const Layer& layer) {
  const Forward& a = layer.a;
  const bool plain = !layer.lengths && !layer.batch_sizes && !layer.resets && layer.stored == Stored::kAsGiven;
  if (layer.steps != 1 || !plain || !a.x || a.c || a.gates || !steps(a.shape.cell) || a.shape.projected || a.shape.zoned) return false;
  if (a.shape.type != Type::kFloat && a.shape.type != Type::kDouble) return false;
  if (layer.tiles_hh) return a.batch < kSequencesOfStep;
  return steps_at_once(a.batch, kernels().width(a.shape.type)) || steps_in_place(a.batch, a.input, a.shape.hidden);
}

void run_step(const Layer& layer) {
  const Forward& a = layer.a;
  const Type type = a.shape.type;
  const Tiling tiling = kernels_of(a.shape).tiling(a.shape);
  const int64_t D = a.shape.lanes, B = a.batch, I = a.input, H = a.shape.hidden, GH = tiling.gates * H, stored = bytes_of(type);
  const bool few = B < kSequencesOfStep;
  const int64_t width = kernels().width(type), units = layer.tiles_hh ? width * tiling.unit_blocks : width;
  const int64_t tiles = tiles_of(H, units), squares = tiles_of(I, width) + tiles_of(H, width);
  const int64_t grain = std::max<int64_t>(1, kWorkOfMember / (B * units * tiling.gates * (I + H)));
  const Buffer operands = few ? Buffer() : Buffer(kernels().sequences_of(type, B) * (I + H) * stored);
  const auto at = [&](const void* values, int64_t place) { return offset(values, place * stored); };
  const auto to = [&](void* values, int64_t place) { return values ? static_cast<char*>(values) + place * stored : nullptr; };
  const int64_t packed = tiles * (layer.tiles_hh ? kernels_of(a.shape).unit_tile_bytes(a.shape, 1) : 0);  // bytes of a lane and depth
  for (int64_t d = 0; d < D; ++d) {
    Step step{a.shape.cell, type, B, I, H, a.x, at(a.h0, d * B * H), at(a.c0, d * B * H), layer.w_ih[d], layer.w_hh[d],
                    at(a.input_bias, d * GH), at(a.vectors, d * tiling.vectors * H), to(a.y, d * H), D * H,
                    to(a.h_n, d * B * H), to(a.c_n, d * B * H), operands.get(), offset(layer.tiles_ih, d * I * packed),
                    offset(layer.tiles_hh, d * H * packed)};
    Buffer rows;
    if (few && step.packed_hh) {
      rows = Buffer(kernels().bytes_of_few(step));
      step.operands = rows.get();
      kernels().gather_few(step);
    }
    if (few) {
      torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { kernels().run_few(step, begin, end); });
      continue;
    }
    torch::stable::parallel_for(0, squares, std::max<int64_t>(1, kWorkOfPacking / (B * width)),
                                [&](int64_t begin, int64_t end) { kernels().transpose(step, begin, end); });
    torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) { kernels().run(step, begin, end); });
  }
}

}  // namespace fastseq::cpu
