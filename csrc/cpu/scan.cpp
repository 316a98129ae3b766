// How a scan is shared out: rows among the threads, or wide ranges of channels, never narrow ones, whose every step lies on another page,
// and never parts of time, which read everything twice.
#include "scan.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>

#include "host.h"
#include "level.h"
#include "scan_kernel.h"

namespace fastseq::cpu {
namespace {

const ScanKernels& kernels() {
#if defined(__x86_64__)
  const Level found = level();
  if (found >= Level::kAvx512) return scan_avx512();
  if (found == Level::kAvx2) return scan_avx2();
#endif
  return scan_default();
}

constexpr int64_t kWidth = 256;           // numbers of a row that a thread walks at least, where there are more threads than rows
constexpr int64_t kLine = 16;             // channels that stay together
constexpr int64_t kWorkOfThread = 1 << 14;  // numbers that a thread is worth waking for

constexpr int64_t kStreamed = 1 << 24;     // bytes of a gradient that leaves the caches before anybody reads it

ScanKind kind_of(const std::string& name) {
  STD_TORCH_CHECK(name == "real" || name == "complex" || name == "blocks", "scan: kind ", name, " is none of real, complex, blocks");
  return name == "real" ? ScanKind::kReal : name == "complex" ? ScanKind::kComplex : ScanKind::kBlocks;
}

ScanCell cell_of(const std::string& name) {
  std::string names;
  for (int i = 0; i < static_cast<int>(std::size(kScanCells)); ++i) {
    if (name == kScanCells[i].name) return static_cast<ScanCell>(i);
    names += (i ? ", " : "") + std::string(kScanCells[i].name);
  }
  STD_TORCH_CHECK(false, "scan: cell ", name, " is none of ", names);
}

// [T, B, C] with the numbers of a channel behind it, all but the first two dimensions contiguous.
ScanRows rows_of(const Scan& s, const std::optional<Tensor>& tensor, const char* name, ScalarType type, int64_t numbers) {
  if (!tensor) return {nullptr, 0, 0};
  const int64_t most_rows = s.starts && tensor->size(0) != s.steps ? s.rows : s.starts ? 1 : s.rows;
  STD_TORCH_CHECK(tensor->scalar_type() == type, "scan: ", name, " has a wrong dtype");
  const int64_t dims = tensor->dim();
  STD_TORCH_CHECK(dims >= 3 && (tensor->size(0) == s.steps || tensor->size(0) == 1) &&
                      (tensor->size(1) == most_rows || tensor->size(1) == 1),
                  "scan: ", name, " must be [T, B, C] or broadcast to it");
  int64_t inner = 1;
  for (int64_t dim = dims - 1; dim >= 2; --dim) {
    STD_TORCH_CHECK(tensor->size(dim) == 1 || tensor->stride(dim) == inner || tensor->numel() == 0, "scan: the channels of ", name, " must be contiguous");
    inner *= tensor->size(dim);
  }
  STD_TORCH_CHECK(inner == numbers, "scan: ", name, " must have ", numbers, " numbers in a row, got ", inner);
  const bool constant = tensor->size(0) != s.steps, shared = tensor->size(1) == 1;
  return {const_cast<void*>(data(*tensor)), constant ? 0 : tensor->stride(0), shared ? 0 : tensor->stride(1)};
}

const void* state_of(const Scan& s, const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor) return nullptr;
  const int64_t numbers = s.channels * kScanState[static_cast<int64_t>(s.kind)];
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->numel() == s.rows * numbers &&
                      tensor->scalar_type() == (s.type == Type::kDouble ? ScalarType::Double : ScalarType::Float),
                  "scan: ", name, " must be a contiguous [B, C] in the dtype of states");
  return data(*tensor);
}

Scan scan_of(const Tensor& h, const Tensor& a, const std::optional<Tensor>& gate, const std::optional<Tensor>& vector,
             const std::optional<Tensor>& resets, const std::optional<Tensor>& lengths, const std::optional<Tensor>& cu_seqlens,
             const std::string& kind, const std::string& cell, bool reverse) {
  Scan s{};
  s.kind = kind_of(kind);
  const int64_t k = static_cast<int64_t>(s.kind);
  s.type = type_of(h.scalar_type());
  s.cell = cell_of(cell), s.reverse = reverse;
  const bool given = s.cell == ScanCell::kGiven;
  STD_TORCH_CHECK(h.dim() == (k ? 4 : 3), "scan: h must have ", k ? 4 : 3, " dimensions, got ", h.dim());
  STD_TORCH_CHECK(k == 0 || (given && bytes_of(s.type) == wide_bytes(s.type)),
                  "scan: coefficients of complex numbers and blocks are given, in fp32 or fp64");
  s.steps = h.size(0), s.channels = h.size(2);
  s.rows = cu_seqlens ? cu_seqlens->numel() - 1 : h.size(1);
  s.starts = static_cast<const int32_t*>(data(cu_seqlens)), s.lengths = static_cast<const int32_t*>(data(lengths));
  for (const auto* integers : {&lengths, &cu_seqlens})
    STD_TORCH_CHECK(!*integers || ((*integers)->scalar_type() == ScalarType::Int && (*integers)->is_contiguous()),
                    "scan: lengths and cu_seqlens must be contiguous int32 tensors");
  STD_TORCH_CHECK(!lengths || lengths->numel() == s.rows, "scan: lengths must be [B]");
  STD_TORCH_CHECK(!cu_seqlens || (h.size(1) == 1 && !lengths), "scan: with cu_seqlens B is 1, and there are no lengths");
  if (resets) {
    STD_TORCH_CHECK(resets->scalar_type() == ScalarType::Bool && resets->dim() == 2 && resets->size(0) == s.steps &&
                        resets->size(1) == h.size(1),
                    "scan: resets must be a bool [T, B]");
    s.resets = static_cast<const bool*>(data(*resets)), s.reset_step = resets->stride(0), s.reset_row = resets->stride(1);
  }
  const ScalarType wide = wide_of(h.scalar_type());
  s.wide_a = a.scalar_type() == wide;
  STD_TORCH_CHECK(row_of(s.cell).reads_b ? a.scalar_type() == h.scalar_type() : s.wide_a || (!given && a.scalar_type() == h.scalar_type()),
                  "scan: a must have the dtype of ", row_of(s.cell).reads_b ? "b" : "states");
  const int64_t m = kScanCoefficient[k];
  s.constant = a.size(0) != s.steps;
  s.each = a.dim() > 2 && a.size(2) == s.channels;
  s.a = rows_of(s, a, "a", a.scalar_type(), m * (s.each ? s.channels : 1));
  STD_TORCH_CHECK(given || (a.size(0) == s.steps && a.size(1) == h.size(1) && s.each),
                  "scan: what a cell makes coefficients of must be as much as b");
  const ScanCellRow row = row_of(s.cell);
  STD_TORCH_CHECK(gate.has_value() == row.gate && vector.has_value() == row.vector, "scan: cell ", row.name, row.gate ? " has" : " has no",
                  " gate and", row.vector ? " a" : " no", " vector");
  s.gate = rows_of(s, gate, "gate", h.scalar_type(), s.channels);
  if (gate) STD_TORCH_CHECK(gate->size(0) == s.steps && gate->size(1) == h.size(1), "scan: gate must be as much as b");
  if (vector) {
    STD_TORCH_CHECK(vector->is_contiguous() && vector->numel() == s.channels && vector->scalar_type() == wide,
                    "scan: vector must be a contiguous [C] in the dtype of states");
    s.vector = data(*vector);
  }
  return s;
}

// Rows of whole steps side by side are one row, where nothing tells them apart.
void merge_rows(Scan& s) {
  if (s.lengths || s.starts || s.resets || !s.each || s.vector || s.rows == 1) return;
  const int64_t k = static_cast<int64_t>(s.kind);
  const auto merges = [&](const ScanRows& rows, int64_t numbers) { return !rows.data || rows.row == s.channels * numbers; };
  if (!merges(s.a, kScanCoefficient[k]) || !merges(s.da, kScanCoefficient[k])) return;
  for (const ScanRows& rows : {s.b, s.gate, s.h, s.dh, s.db, s.dgate})
    if (!merges(rows, kScanState[k])) return;
  s.channels *= s.rows, s.rows = 1;
}

template <class Run>
void share_out(Scan& s, Run&& run) {
  merge_rows(s);
  const int64_t n = kScanState[static_cast<int64_t>(s.kind)], work = s.steps * s.rows * s.channels * n;
  const int64_t threads = std::clamp<int64_t>(work / kWorkOfThread, 1, torch::stable::get_num_threads());
  const bool together = !s.starts && s.h.row < s.h.step;
  int64_t ranges = 1;  // of channels
  if (s.rows % threads && (together ? s.rows < threads : s.rows < 4 * threads))
    ranges = std::clamp<int64_t>(s.channels * n / kWidth, 1, threads);
  const int64_t range = ((s.channels + ranges - 1) / ranges + kLine - 1) / kLine * kLine;
  ranges = std::max<int64_t>(1, (s.channels + range - 1) / std::max<int64_t>(range, 1));
  const int64_t groups = together ? std::min(s.rows, threads) : s.rows;
  torch::stable::parallel_for(0, groups * ranges, std::max<int64_t>(1, groups * ranges / threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / ranges, row = s.rows * group / groups, channel = i % ranges * range;
      const ScanPart part{row, s.rows * (group + 1) / groups - row, channel, std::min(range, s.channels - channel)};
      const Buffer scratch(kernels().scratch(s, part));
      run(part, scratch.get());
    }
  });
}

}  // namespace

void scan_forward(Tensor b, Tensor a, std::optional<Tensor> gate, std::optional<Tensor> vector, std::optional<Tensor> initial,
                  std::optional<Tensor> resets, std::optional<Tensor> lengths, std::optional<Tensor> cu_seqlens, std::string kind,
                  std::string cell, bool reverse, Tensor h, Tensor final) {
  Scan s = scan_of(h, a, gate, vector, resets, lengths, cu_seqlens, kind, cell, reverse);
  const int64_t numbers = s.channels * kScanState[static_cast<int64_t>(s.kind)];
  s.b = rows_of(s, b, "b", h.scalar_type(), numbers), s.h = rows_of(s, h, "h", h.scalar_type(), numbers);
  s.initial = state_of(s, initial, "initial"), s.final = const_cast<void*>(state_of(s, final, "final"));
  if (s.rows * numbers == 0) return;
  share_out(s, [&](const ScanPart& part, void* scratch) { kernels().forward(s, part, scratch); });
}

void scan_backward(std::optional<Tensor> dh, std::optional<Tensor> dfinal, std::optional<Tensor> b, Tensor a, std::optional<Tensor> gate,
                   std::optional<Tensor> vector, Tensor h, std::optional<Tensor> initial, std::optional<Tensor> resets,
                   std::optional<Tensor> lengths, std::optional<Tensor> cu_seqlens, std::string kind, std::string cell, bool reverse,
                   std::optional<Tensor> db, std::optional<Tensor> da, std::optional<Tensor> dgate, std::optional<Tensor> dvector,
                   Tensor dinitial) {
  Scan s = scan_of(h, a, gate, vector, resets, lengths, cu_seqlens, kind, cell, reverse);
  const int64_t k = static_cast<int64_t>(s.kind), numbers = s.channels * kScanState[k];
  const ScalarType stored = h.scalar_type();
  s.h = rows_of(s, h, "h", stored, numbers), s.dh = rows_of(s, dh, "dh", stored, numbers), s.db = rows_of(s, db, "db", stored, numbers);
  s.b = rows_of(s, b, "b", stored, numbers);
  STD_TORCH_CHECK(!row_of(s.cell).reads_b || b, "scan: the backward pass of ", cell, " reads b");
  s.dgate = rows_of(s, dgate, "dgate", stored, numbers);
  if (dvector) {
    STD_TORCH_CHECK(s.vector && dvector->is_contiguous() && dvector->numel() == s.rows * s.channels &&
                        dvector->scalar_type() == vector->scalar_type(),
                    "scan: dvector must be a contiguous [B, C], of a cell with a vector");
    s.dvector = const_cast<void*>(data(*dvector));
  }
  s.da = rows_of(s, da, "da", a.scalar_type(), s.channels * kScanCoefficient[k]);
  STD_TORCH_CHECK(!da || (da->size(0) == a.size(0) && da->size(1) == (s.starts && !s.constant ? 1 : s.rows)),
                  "scan: da must be [steps of a, B, C]");
  s.initial = state_of(s, initial, "initial"), s.dfinal = state_of(s, dfinal, "dfinal");
  s.streams = s.steps * h.size(1) * numbers * bytes_of(s.type) >= kStreamed;
  s.dinitial = const_cast<void*>(state_of(s, dinitial, "dinitial"));
  if (s.rows * numbers == 0) return;
  share_out(s, [&](const ScanPart& part, void* scratch) { kernels().backward(s, part, scratch); });
}

namespace {

void add_bias(const Tensor& matrix, const Tensor& bias) {
  const int64_t columns = matrix.size(1), stride = bias.stride(0);
  torch::stable::parallel_for(0, matrix.size(0), std::max<int64_t>(1, kWorkOfThread / columns), [&](int64_t begin, int64_t end) {
    with_storage(type_of(matrix.scalar_type()), [&]<class S>() {
      const auto* from = static_cast<const S*>(data(bias));
      for (int64_t i = begin; i < end; ++i) {
        auto* to = static_cast<S*>(mutable_data(matrix)) + i * columns;
        for (int64_t j = 0; j < columns; ++j) to[j] = to[j] + from[j * stride];
      }
    });
  });
}

}  // namespace

std::vector<Tensor> scan_layers(Tensor x, std::optional<Tensor> initial, std::vector<Tensor> params, std::string cell, int64_t gates,
                                bool has_biases, bool batch_first) {
  const ScalarType type = x.scalar_type();
  const int64_t each = has_biases ? 2 : 1, L = params.size() / each, batch_dim = batch_first ? 0 : 1;
  if ((type != ScalarType::Float && type != ScalarType::Double) || !plain(x) || x.dim() != 3 || x.numel() == 0) return {};
  const int64_t B = x.size(batch_dim), T = x.size(1 - batch_dim), n = B * T;
  const auto is_of = [&](const Tensor& tensor, int64_t dims) {
    return plain(tensor) && tensor.scalar_type() == type && tensor.dim() == dims;
  };
  if (L == 0 || static_cast<int64_t>(params.size()) != L * each || !is_of(params[0], 2)) return {};
  const int64_t H = params[0].size(0) / gates, rows = gates * H;
  if (H == 0) return {};
  for (int64_t l = 0; l < L; ++l) {
    const Tensor& weight = params[l * each];
    if (!is_of(weight, 2) || weight.size(0) != rows || weight.size(1) != (l ? H : x.size(2))) return {};
    if (has_biases && (!is_of(params[l * each + 1], 1) || params[l * each + 1].size(0) != rows)) return {};
  }
  if (initial && (!is_of(*initial, 3) || initial->size(0) != L || initial->size(1) != B || initial->size(2) != H || !initial->is_contiguous()))
    return {};
  const Tensor final = empty({L, B, H}, type), given = batch_first ? view(x, {T, B, x.size(2)}, {x.stride(1), x.stride(0), x.stride(2)}) : x;
  // torch.nn.functional.linear adds its bias afterwards, to what does not lie row by row: so does this, for the same bits
  bool at_once = given.is_contiguous();
  Tensor y = at_once ? given : torch::stable::contiguous(given);
  for (int64_t l = 0; l < L; ++l, at_once = true) {
    const Tensor &weight = params[l * each], logits = empty({n, rows}, type);
    const int64_t width = weight.size(1);
    const Tensor matrix = view(y, {n, width}, {width, 1}), transposed = view(weight, {width, rows}, {weight.stride(1), weight.stride(0)});
    if (has_biases && at_once) {
      const Tensor& bias = params[l * each + 1];
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(logits.get(), bias.get(), matrix.get(), transposed.get(), 1, 1));
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(logits.get(), matrix.get(), transposed.get()));
      if (has_biases) add_bias(logits, params[l * each + 1]);
    }
    // [T, B, H] of columns from `first` on
    const auto over_time = [&](const Tensor& of, int64_t columns, int64_t first) {
      return view(of, {T, B, H}, {B * columns, columns, 1}, first);
    };
    y = empty({T, B, H}, type);
    std::optional<Tensor> gate, before;
    if (gates == 3) gate = over_time(logits, rows, H);
    if (initial) before = view(*initial, {B, H}, {H, 1}, l * B * H);
    scan_forward(over_time(logits, rows, rows - H), over_time(logits, rows, 0), gate, {}, before, {}, {}, {}, "real", cell, false, y,
                 view(final, {B, H}, {H, 1}, l * B * H));
  }
  // of a single step with the strides of what is contiguous, which products without a bias take as it is
  if (batch_first) y = view(y, {B, T, H}, {H, T == 1 ? H : B * H, 1});
  return {y, final};
}

}  // namespace fastseq::cpu
