#include "plan.h"

#include <algorithm>

namespace fastseq::recurrent {
namespace {

// Cycles of one multiprocessor at kGigahertz. Estimates from published microbenchmarks of Hopper and from instruction counts, none of
// them measured with these kernels: they order the candidates, and `explain` calls the sum a model.
constexpr double kGigahertz = 1.755;
constexpr double kFlags = 1100;           // release, travel through L2, poll, acquire
constexpr double kFlagsPerCta = 3;        // each CTA polls the flags of all
constexpr double kClusterSend = 450;      // st.async until the barrier's phase is complete
constexpr double kGlobalBytes = 32;       // a cycle, from L2
constexpr double kClusterBytes = 14;      // a cycle, into one CTA's shared memory
constexpr double kSharedTile = 32;        // a tile of every warp, read from shared memory
constexpr double kSync = 60;              // a piece of the operand: wait and synchronise
constexpr double kItem = 60;              // a unit of a sequence: activations, loads, stores
constexpr double kSums = 150;             // partial sums through shared memory
constexpr double kClusterOccupancy = 0.9;  // of the multiprocessors that clusters of 16 can cover, as they may not cross a GPC

// a tile of every warp of a multiprocessor
double tile_cycles(Precision precision) { return precision == Precision::kFloat ? 80 : 13; }

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// of the depth of the product, and of the batch: launches one after another
struct Pieces {
  int segments, waves;
};

struct Shape {
  int row_gates, sent_gates;
};

double step_cycles(const Plan& p, const TileFacts& tile, const Shape& shape, Precision precision) {
  const Split& s = p.split;
  const Layout l(s, tile, shape.row_gates, shape.sent_gates);
  const double operand = static_cast<double>(s.chunks) * l.vectors * tile.columns * 16;
  const double exchange = s.cluster ? kClusterSend + operand / kClusterBytes : kFlags + kFlagsPerCta * s.ctas + operand / kGlobalBytes;
  const double tiles = static_cast<double>(over(s.k_tiles, s.k_warps)) * s.chunks * (tile.columns / 8);
  const double product = tiles * tile_cycles(precision) + static_cast<double>(l.shared_tiles) * s.chunks * kSharedTile;
  const double items = static_cast<double>(s.chunks) * over(static_cast<int64_t>(s.units()) * tile.columns, kThreads);
  return exchange + product + s.chunks * (s.segments * kSync + kSums) + items * kItem;
}

}  // namespace

Plan plan(const Problem& problem, const Device& device) {
  const CellFacts cell = facts_of(problem.cell);
  const Shape shape = problem.backward ? Shape{1, cell.gates} : Shape{cell.gates, 1};
  Plan best{};
  best.obstacle = "its recurrent weights do not fit the registers and shared memory of " + std::to_string(device.multiprocessors) +
                  " multiprocessors, H=" + std::to_string(problem.hidden);
  for (int bits = 3; 1 << bits <= most_units(cell.gates); ++bits) {
    for (const bool wide : {false, true}) {
      for (const bool cluster : {true, false}) {
        for (const auto [segments, waves] : {Pieces{1, 1}, {2, 1}, {4, 1}, {8, 1}, {1, 2}, {4, 2}, {8, 2}, {4, 4}, {8, 8}}) {
          const TileFacts tile = tile_facts(problem.precision, wide);
          Plan p{};
          Split& s = p.split;
          s.unit_bits = bits;
          s.ctas = static_cast<int32_t>(over(problem.hidden, s.units()));
          s.cluster = cluster;
          s.segments = segments;
          s.m_warps = static_cast<int32_t>(over(s.units() * shape.row_gates, 16));
          s.k_warps = kWarps / s.m_warps;
          s.k_tiles = static_cast<int32_t>(over(static_cast<int64_t>(s.ctas) * s.units() * shape.sent_gates, tile.depth));
          p.wide = wide;
          // clusters of other sizes are not sure to be schedulable
          if (cluster && (s.ctas > device.cluster || (s.ctas & (s.ctas - 1)) || segments * waves > 1)) continue;
          if (!cluster && !device.cooperative && s.ctas > 1) continue;
          const double covered = cluster && s.ctas > 8 ? kClusterOccupancy : 1;
          const auto at_once = static_cast<int64_t>(device.multiprocessors * covered) / s.ctas;
          if (at_once == 0) continue;
          // as few sequences in a team as keep all teams running at the same time
          const int64_t columns = tile.columns, teams_of_lane = waves * std::max<int64_t>(1, at_once / problem.lanes);
          s.chunks = cluster ? 1 : static_cast<int32_t>(over(problem.batch, teams_of_lane * columns));
          s.parts = static_cast<int32_t>(over(problem.batch, s.chunks * columns));
          const int64_t teams = problem.lanes * s.parts;
          if (teams * s.ctas > INT32_MAX) continue;
          p.teams = static_cast<int32_t>(teams);
          // clusters that find no room wait for others to end; a team that meets through flags may not
          p.teams_at_once = static_cast<int32_t>(cluster ? teams : std::min(teams, at_once));
          const int states = cell.states + (problem.backward ? 1 : 0);
          const int64_t items = static_cast<int64_t>(s.chunks) * columns * s.units();
          if (items * (states + 1) * 4 > device.shared_bytes) continue;
          p.shared_bytes = shared_bytes(s, tile, shape.row_gates, shape.sent_gates, states, cell.vectors);
          if (p.shared_bytes > device.shared_bytes) continue;
          p.operand_bytes = operand_bytes(s, tile, shape.row_gates, shape.sent_gates);
          const double cycles = over(teams, at_once) * step_cycles(p, tile, shape, problem.precision);
          p.step_us = cycles / (1000 * kGigahertz);
          if (!best.obstacle.empty() || p.step_us < best.step_us) best = p;
        }
      }
    }
  }
  return best;
}

bool find(std::string_view name, Cell& cell) {
#define FASTSEQ_CELL(type, known) \
  if (name == known) return cell = Cell::k##type, true;
  FASTSEQ_CUDA_CELLS(FASTSEQ_CELL)
#undef FASTSEQ_CELL
  return false;
}

bool find(std::string_view name, Precision& precision) {
  if (name == "fp16") return precision = Precision::kHalf, true;
  if (name == "bf16") return precision = Precision::kBfloat16, true;
  if (name == "tf32") return precision = Precision::kTf32, true;
  if (name == "ieee") return precision = Precision::kFloat, true;
  return false;
}

std::vector<int64_t> numbers_of(const Plan& p) {
  const Split& s = p.split;
  return {s.unit_bits, s.ctas,    s.parts, s.chunks, s.m_warps,       s.k_warps,      s.k_tiles,      s.segments,
          s.cluster,   p.wide, p.teams, p.teams_at_once, p.shared_bytes, p.operand_bytes};
}

Plan plan_of(const std::vector<int64_t>& n) {
  Plan p{};
  const auto number = [&](int i) { return static_cast<int32_t>(n[i]); };
  p.split = {number(0), number(1), number(2), number(3), number(4), number(5), number(6), number(7), number(8), 0};
  p.wide = n[9];
  p.teams = number(10), p.teams_at_once = number(11), p.shared_bytes = number(12);
  p.operand_bytes = n[13];
  return p;
}

}  // namespace fastseq::recurrent
