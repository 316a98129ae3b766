// How attention of few rows is shared out. The blocks of keys of all heads lie in one line, head after head, which is cut into as many parts
// as there are threads: sequences of different lengths, or a single one, keep all of them busy. What is cut within a head is merged after.
#include "attention_few.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "host.h"
#include "level.h"

namespace fastseq::cpu {
namespace {

const FewKernels& few_kernels([[maybe_unused]] Type type) {
  switch (level()) {
#if defined(__x86_64__)
    case Level::kAmx: return type == Type::kBfloat16 ? few_amx() : few_avx512();
    case Level::kAvx512Bf16: return type == Type::kBfloat16 ? few_avx512_bf16() : few_avx512();
    case Level::kAvx512: return few_avx512();
    case Level::kAvx2: return few_avx2();
#endif
    default: return few_default();
  }
}

// Multiply-adds that a thread is worth waking for.
constexpr int64_t kWorkOfThread = 1 << 19;

// Rows that go over keys together, in order: sequences, their key heads, the row blocks of these.
class Line {
 public:
  Line(const Attention& a, int64_t block) : a_(a), block_(block), group_(a.heads / a.key_heads), rows_(group_ * a.queries) {}

  int64_t row_blocks() const { return (rows_ + kFewRows - 1) / kFewRows; }
  int64_t size() const { return a_.batch * a_.key_heads * row_blocks(); }

  // with the keys that its rows see
  FewPart operator[](int64_t i) const {
    const int64_t row_block = i % row_blocks(), head = i / row_blocks() % a_.key_heads, batch = i / row_blocks() / a_.key_heads;
    const int64_t first = row_block * kFewRows, count = std::min(kFewRows, rows_ - first);
    FewPart part{batch, head, first, count, 0, 0};
    const Attention::Sequence sequence = a_.sequence(batch);
    if (a_.cu_q) part.rows = std::clamp<int64_t>(group_ * sequence.queries - first, 0, count);  // behind are other sequences
    const int64_t last_query = std::min((first + count - 1) / group_, sequence.queries - 1);
    if (last_query < first / group_) return part;
    const int64_t begin = a_.left >= 0 ? first / group_ + sequence.shift - a_.left : 0;
    const int64_t end = a_.right >= 0 ? last_query + sequence.shift + a_.right + 1 : sequence.keys;
    part.begin = std::max<int64_t>(begin, 0), part.end = std::max(part.begin, std::min(end, sequence.keys));
    return part;
  }

  // at least one, so that rows without keys have their place in the line
  int64_t blocks(const FewPart& part) const { return std::max<int64_t>(1, (part.end - part.begin + block_ - 1) / block_); }

  // of all
  int64_t blocks() const {
    int64_t total = 0;
    for (int64_t i = 0; i < size(); ++i) total += blocks((*this)[i]);
    return total;
  }

  // blocks first .. last of a part
  FewPart cut(FewPart part, int64_t first, int64_t last) const {
    const int64_t begin = part.begin;
    part.end = std::min(part.end, begin + last * block_);
    part.begin = std::min(part.end, begin + first * block_);
    return part;
  }

 private:
  const Attention& a_;
  const int64_t block_, group_, rows_;
};

void run_whole(const Attention& a, const FewKernels& kernel, const Line& line, int64_t begin, int64_t end) {
  const Buffer scratch(kernel.scratch(a));
  for (int64_t i = begin; i < end; ++i) kernel.run(a, line[i], scratch.get(), nullptr);
}

// Every head in so many parts.
void run_split(const Attention& a, const FewKernels& kernel, const Line& line, int64_t splits) {
  const int64_t stride = kernel.partial(a);
  const Buffer partials(line.size() * splits * stride);
  const auto partial = [&](int64_t i) { return static_cast<char*>(partials.get()) + i * stride; };
  torch::stable::parallel_for(0, line.size() * splits, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(kernel.scratch(a));
    for (int64_t i = begin; i < end; ++i) {
      const FewPart part = line[i / splits];
      const int64_t blocks = line.blocks(part), s = i % splits;
      kernel.run(a, line.cut(part, blocks * s / splits, blocks * (s + 1) / splits), scratch.get(), partial(i));
    }
  });
  const Buffer scratch(kernel.scratch(a));
  for (int64_t i = 0; i < line.size(); ++i) kernel.merge(a, line[i], partial(i * splits), splits, scratch.get());
}

// The line in equal parts, one for each worker. A part begins and ends with a piece of a head at most.
void run_shared(const Attention& a, const FewKernels& kernel, const Line& line, int64_t blocks, int64_t workers) {
  const int64_t stride = kernel.partial(a);
  const Buffer partials(2 * workers * stride), heads(2 * workers * sizeof(int64_t));
  auto* const head = static_cast<int64_t*>(heads.get());  // of each piece, -1: there is none
  std::fill(head, head + 2 * workers, -1);
  const auto partial = [&](int64_t piece) { return static_cast<char*>(partials.get()) + piece * stride; };
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch(kernel.scratch(a));
    for (int64_t worker = begin; worker < end; ++worker) {
      const int64_t from = blocks * worker / workers, to = blocks * (worker + 1) / workers;
      int64_t at = 0, piece = 2 * worker;
      for (int64_t i = 0; i < line.size() && at < to; ++i) {
        const FewPart part = line[i];
        const int64_t count = line.blocks(part), first = std::max(at, from) - at, last = std::min(at + count, to) - at;
        at += count;
        if (first >= last) continue;
        const bool whole = first == 0 && last == count;
        kernel.run(a, line.cut(part, first, last), scratch.get(), whole ? nullptr : partial(piece));
        if (!whole) head[piece++] = i;
      }
    }
  });
  const Buffer scratch(kernel.scratch(a));
  // The pieces of a head are neighbors but for the second place of a worker that has one piece: it is closed up.
  for (int64_t piece = 0; piece < 2 * workers;) {
    const int64_t i = head[piece], first = piece++;
    if (i < 0) continue;
    int64_t last = first;
    for (; piece < 2 * workers && (head[piece] == i || head[piece] < 0); ++piece) {
      if (head[piece] == i && piece != ++last) std::copy_n(partial(piece), stride, partial(last));
    }
    kernel.merge(a, line[i], partial(first), last - first + 1, scratch.get());
  }
}

}  // namespace

bool few_serves(const Attention& a) {
  // By blocks of queries, of which each has vectors for a head, a few queries of each head of a group would leave most lanes empty; not
  // the four of the lowest level. Of tiles that is a matter of many keys alone.
  constexpr int64_t kMostRows = 8, kMostQueries = 8, kLeastKeysOfTiles = 256;
  const bool tiles = level() == Level::kAmx && a.type == Type::kBfloat16, narrow = level() == Level::kDefault && bytes_of(a.type) > 2;
  const auto is_added = [&](Type type) {
    return type == a.type || (type == Type::kFloat && (a.type == Type::kBfloat16 || a.type == Type::kHalf));
  };
  const int64_t group = a.key_heads ? a.heads / a.key_heads : 0;
  const bool shared = group > 1 && a.queries <= kMostQueries && !narrow && (!tiles || a.keys >= kLeastKeysOfTiles);
  const bool few = group * a.queries <= kMostRows || shared;
  return group && few && !a.blocks.given() && !a.relative_q.given() && a.dropout == 0 &&
         (!a.bias.given() || is_added(a.bias_type)) && (!a.relative_bias || is_added(a.relative_bias_type)) &&
         (!a.sinks || is_added(a.sinks_type));
}

void attention_few(const Attention& a, int64_t splits) {
  const FewKernels& kernel = few_kernels(a.type);
  if (a.batch == 0 || a.heads == 0 || a.queries == 0) return;
  const int64_t block = kernel.block(a);
  const Line line(a, block);
  const int64_t threads = torch::stable::get_num_threads();
  splits = std::min(splits, (a.keys + block - 1) / block);
  if (splits > 1) return run_split(a, kernel, line, splits);
  const int64_t work_of_block = block * (a.features + a.value_features) * std::min(kFewRows, a.heads / a.key_heads * a.queries);
  const int64_t grain = std::max<int64_t>(1, kWorkOfThread / std::max<int64_t>(1, work_of_block));  // blocks
  const int64_t most = line.size() * std::max<int64_t>(1, (a.keys + block - 1) / block);
  if (threads == 1 || most < 2 * grain) return run_whole(a, kernel, line, 0, line.size());
  if (splits == 1) {
    return torch::stable::parallel_for(0, line.size(), 1,
                                       [&](int64_t begin, int64_t end) { run_whole(a, kernel, line, begin, end); });
  }
  const int64_t blocks = line.blocks(), workers = std::min(threads, blocks / grain);
  if (workers <= 1) return run_whole(a, kernel, line, 0, line.size());
  run_shared(a, kernel, line, blocks, workers);
}

}  // namespace fastseq::cpu
