#include "plan.h"

#include <algorithm>
#include <utility>

#include "layout.h"
#include "quotient.h"

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
constexpr double kSync = 60;              // a piece of the operand: wait and synchronize
constexpr double kItem = 60;              // a unit of a sequence: activations, loads, stores
constexpr double kSums = 100;             // partial sums: write, synchronize, read
constexpr double kLoad = 600;             // from L2, when nothing else is done meanwhile
constexpr double kSharedBytes = 128;      // a cycle, of shared memory
constexpr double kClusterOccupancy = 0.9;  // of the multiprocessors that clusters of 16 can cover, as they may not cross a GPC

constexpr int64_t kMostInboxes = 64 << 20;  // bytes of partial sums, beyond which they do not stay in L2

// a tile of every warp of a multiprocessor
double tile_cycles(Precision precision) { return precision == Precision::kFloat ? 80 : 13; }

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// how CTAs exchange, and how the depth of the product and the batch are cut: pieces, and launches one after another
struct Form {
  bool cluster, reduce_scatter, wide;
  int k_segments, waves;
};

std::vector<Form> forms(bool backward, bool clusters) {
  std::vector<Form> found;
  if (clusters && backward) found.push_back({true, true, false, 1, 1});
  for (int waves = 1; waves <= 8 && backward; waves *= 2) found.push_back({false, true, false, 1, waves});
  for (const bool wide : {false, true}) {
    if (clusters) found.push_back({true, false, wide, 1, 1});
    for (const auto& [k_segments, waves] : {std::pair{1, 1}, {2, 1}, {4, 1}, {8, 1}, {1, 2}, {4, 2}, {8, 2}, {4, 4}, {8, 8}}) {
      found.push_back({false, false, wide, k_segments, waves});
    }
  }
  return found;
}

struct Shape {
  int row_gates, sent_gates;
};

double step_cycles(const Plan& p, const TileFacts& tile, const Shape& shape, Precision precision) {
  const Split& s = p.split;
  const int most = most_tiles(s, row_tiles(s, shape.row_gates));
  const double tiles = static_cast<double>(most) * s.batch_tiles * (tile.columns / kTileColumns);
  const double beyond = static_cast<double>(tiles_beyond(most, tile.resident)) * s.batch_tiles;
  const double items = static_cast<double>(s.batch_tiles) * over(static_cast<int64_t>(s.units) * tile.columns, kThreads);
  const double own = tiles * tile_cycles(precision) + beyond * kSharedTile + items * kItem;
  if (s.reduce_scatter) {
    const ReduceScatterLayout l(s, tile);
    const double inbox = 16.0 * s.ctas * l.sent, sums = l.groups * tile.columns * l.stride * 8.0;
    if (s.cluster) return own + kClusterSend + inbox / kClusterBytes + kSync + kSums + (inbox + sums) / kSharedBytes;
    const double written_and_read = 2 * inbox / kGlobalBytes;
    const double of_tile = written_and_read + kLoad + kSync + kSums + sums / kSharedBytes;
    return own + kFlags + kFlagsPerCta * s.ctas + kSync + s.batch_tiles * of_tile;
  }
  const AllGatherLayout l(s, tile, shape.row_gates, shape.sent_gates);
  const double operand = 16 * static_cast<double>(static_cast<int64_t>(s.batch_tiles) * l.vectors << s.column_bits);
  const double exchange = s.cluster ? kClusterSend + operand / kClusterBytes : kFlags + kFlagsPerCta * s.ctas + operand / kGlobalBytes;
  const double sums = s.k_warps * tile.columns * l.stride * 8.0;
  return own + exchange + s.batch_tiles * (s.k_segments * kSync + kSums + sums / kSharedBytes);
}

// How the product's tiles of rows can be dealt to 2^bits warps side by side: each its own, or several by turns.
std::vector<int> warps_over_rows(const Form& form, int row_tiles) {
  std::vector<int> found;
  for (int bits = form.reduce_scatter ? 3 : 0; 1 << bits <= kWarps; ++bits) {
    if (form.k_segments == 1 || row_tiles <= 1 << bits) found.push_back(bits);
    if (row_tiles <= 1 << bits) break;
  }
  return found;
}

int32_t power_of_two(int64_t least) {
  int32_t n = 1;
  while (n < least) n *= 2;
  return n;
}

}  // namespace

std::vector<Plan> plans(const Problem& problem, const Device& device) {
  const CellFacts cell = facts_of(problem.cell);
  const Shape shape = problem.backward ? Shape{1, cell.gates} : Shape{cell.gates, 1};
  std::vector<Plan> found;
  for (const Form& form : forms(problem.backward, device.cluster > 0)) {
    const TileFacts tile = facts_of_tile(problem.precision, form.wide);
    const int most = most_units(cell.gates, problem.backward && !form.reduce_scatter, form.wide);
    for (int units = 8; units <= most; units += 8) {
      Plan p{};
      Split& s = p.split;
      p.n_tiles = tile.columns / kTileColumns;
      s.units = units, s.cluster = form.cluster, s.reduce_scatter = form.reduce_scatter, s.k_segments = form.k_segments;
      s.ctas = static_cast<int32_t>(over(problem.hidden, units));
      if (s.cluster) s.ctas = power_of_two(s.ctas);  // clusters of other sizes are not sure to be schedulable
      if (s.cluster ? s.ctas > device.cluster : s.ctas > 1 && !device.cooperative) continue;
      const double covered = s.cluster && s.ctas > 8 ? kClusterOccupancy : 1;
      const auto at_once = static_cast<int64_t>(device.multiprocessors * covered) / s.ctas;
      if (at_once == 0) continue;
      // as few sequences in a team as keep all teams running at the same time
      const int64_t columns = tile.columns, teams_of_lane = form.waves * std::max<int64_t>(1, at_once / problem.lanes);
      const int64_t fewest = over(problem.batch, teams_of_lane);
      s.batch_tiles = s.cluster ? 1 : static_cast<int32_t>(over(fewest, columns));
      s.parts = static_cast<int32_t>(over(problem.batch, std::min(fewest, s.batch_tiles * columns)));
      s.rows = static_cast<int32_t>(over(problem.batch, s.parts));
      while (1 << s.column_bits < (s.batch_tiles > 1 ? columns : s.rows)) ++s.column_bits;
      const int64_t teams = problem.lanes * s.parts;
      if (teams * s.ctas > INT32_MAX) continue;
      p.teams = static_cast<int32_t>(teams);
      // clusters that find no room wait for others to end; a team that meets through flags may not
      p.teams_at_once = static_cast<int32_t>(s.cluster ? teams : std::min(teams, at_once));
      const int states = cell.states + (problem.backward ? 1 : 0);
      if (static_cast<int64_t>(s.batch_tiles) * columns * units * (states + 1) * 4 > device.shared_bytes) continue;
      const int64_t depth = static_cast<int64_t>(units) * shape.sent_gates * (s.reduce_scatter ? 1 : s.ctas);
      const int rows = row_tiles(s, shape.row_gates);
      for (const int m_bits : warps_over_rows(form, rows)) {
        s.m_bits = m_bits;
        s.k_warps = kWarps >> m_bits;
        const int64_t shares = s.k_warps * s.k_segments;
        s.k_tiles = static_cast<int32_t>(over(over(depth, tile.depth), shares * tile.block)) * tile.block;
        if (s.k_tiles * shares * tile.depth > kMostDepth) continue;
        p.shared_bytes = shared_bytes(s, tile, shape.row_gates, shape.sent_gates, states, cell.vectors);
        if (p.shared_bytes > device.shared_bytes) continue;
        p.operand_bytes = operand_bytes(s, tile, shape.row_gates, shape.sent_gates);
        if (s.reduce_scatter && p.teams * p.operand_bytes > kMostInboxes) continue;
        const double cycles = over(teams, at_once) * step_cycles(p, tile, shape, problem.precision);
        p.step_us = cycles / (1000 * kGigahertz);
        if (std::find(found.begin(), found.end(), p) == found.end()) found.push_back(p);
      }
    }
  }
  if (found.empty()) {
    found.emplace_back();
    found.back().obstacle = "its recurrent weights do not fit the registers and shared memory of " +
                            std::to_string(device.multiprocessors) + " multiprocessors, H=" + std::to_string(problem.hidden);
  }
  std::stable_sort(found.begin(), found.end(), [](const Plan& a, const Plan& b) { return a.step_us < b.step_us; });
  return found;
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

std::vector<std::string> plan_fields() {
#define FASTSEQ_FIELD(name, field) name,
  return {FASTSEQ_PLAN_FIELDS(FASTSEQ_FIELD)};
#undef FASTSEQ_FIELD
}

std::vector<int64_t> numbers_of(const Plan& plan) {
#define FASTSEQ_FIELD(name, field) plan.field,
  return {FASTSEQ_PLAN_FIELDS(FASTSEQ_FIELD)};
#undef FASTSEQ_FIELD
}

Plan plan_of(const std::vector<int64_t>& numbers) {
  Plan plan{};
  auto next = numbers.begin();
#define FASTSEQ_FIELD(name, field) plan.field = static_cast<decltype(plan.field)>(*next++);
  FASTSEQ_PLAN_FIELDS(FASTSEQ_FIELD)
#undef FASTSEQ_FIELD
  return plan;
}

}  // namespace fastseq::recurrent
