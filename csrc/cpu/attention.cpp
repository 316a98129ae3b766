#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "attention_few.h"
#include "attention_kernel.h"
#include "host.h"
#include "level.h"

namespace fastseq::cpu {

namespace {

const AttentionKernels& kernels(Type type) {
  switch (level()) {
#if defined(__x86_64__)
    case Level::kAmx: return type == Type::kBfloat16 ? attention_kernels_amx() : attention_kernels_avx512();
    case Level::kAvx512Bf16: return type == Type::kBfloat16 ? attention_kernels_avx512_bf16() : attention_kernels_avx512();
    case Level::kAvx512: return attention_kernels_avx512();
    case Level::kAvx2: return attention_kernels_avx2();
#endif
    default: return attention_kernels_default();
  }
}

#if defined(__x86_64__)
// Whether forward of float32 is multiplied by AMX, in parts of bfloat16: exact, too, but for what is too large or too small, which the kernels
// notice. It pays where many queries share what keys and values are taken to parts for; with FASTSEQ_CPU_PARTS set, a test has it everywhere.
bool in_parts(const Attention& a) {
  if (level() != Level::kAmx || a.type != Type::kFloat || a.saves) return false;
  const int64_t features = a.features + a.value_features;
  const bool pays = features >= 64 && a.keys >= 64 && a.queries >= (features < 128 && a.right >= 0 ? 256 : 128);
  return pays || attends_in_parts();
}
#endif

// [.., H, T, features], time before heads in memory
Tensor empty_rows(const Tensor& like, int64_t features) {
  const ScalarType type = like.scalar_type();
  if (like.dim() == 3) return empty({like.size(0), like.size(1), features}, type, true);
  return empty({like.size(0), like.size(1), like.size(2), features}, type, true);
}

Tensor empty_lse(const Tensor& q) {
  if (q.dim() == 3) return empty({q.size(0), q.size(1)}, wide_of(q.scalar_type()));
  return empty({q.size(0), q.size(1), q.size(2)}, wide_of(q.scalar_type()));
}

template <class P, class T>
RowsOf<P> rows_of(const T& tensor, P* data) {
  const auto strides = tensor.strides();
  const bool packed = tensor.dim() == 3;
  return {data, packed ? 0 : strides[0], strides[packed ? 0 : 1], strides[packed ? 1 : 2]};
}
ConstRows rows(const Tensor& tensor) { return rows_of<const void>(tensor, data(tensor)); }
MutableRows results(const Tensor& tensor) { return rows_of<void>(tensor, mutable_data(tensor)); }

// Over [B, Hq, Tq, Tk].
Pairs pairs(const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  int64_t strides[4];
  for (int64_t dim = 0; dim < 4; ++dim) strides[dim] = tensor->size(dim) == 1 ? 0 : tensor->stride(dim);
  return {data(*tensor), strides[0], strides[1], strides[2], strides[3]};
}

const int32_t* lengths_of(const std::optional<Tensor>& tensor) { return static_cast<const int32_t*>(data(tensor)); }

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor* v, const AttentionSpec& spec) {
  const bool packed = spec.cu_q.has_value();
  const int64_t first = packed ? 0 : 1;
  Attention a{};
  a.type = type_of(q.scalar_type());
  a.batch = packed ? spec.cu_q->size(0) - 1 : q.size(0);
  a.heads = q.size(first), a.key_heads = k.size(first);
  a.queries = packed ? spec.max_q : q.size(2), a.keys = packed ? spec.max_k : k.size(2);
  a.features = q.size(first + 2), a.value_features = v ? v->size(first + 2) : 0;
  a.q = rows(q), a.k = rows(k);
  if (v) a.v = rows(*v);
  a.mask = pairs(spec.mask), a.blocks = pairs(spec.blocks), a.block_size = spec.block_size;
  a.q_lengths = lengths_of(spec.q_lengths), a.k_lengths = lengths_of(spec.k_lengths);
  a.cu_q = lengths_of(spec.cu_q), a.cu_k = lengths_of(spec.cu_k);
  a.left = spec.left, a.right = spec.right, a.bottom_right = spec.bottom_right, a.offset = spec.offset;
  a.scale = spec.scale, a.softcap = spec.softcap, a.dropout = spec.dropout;
  a.bias = pairs(spec.bias);
  if (spec.bias) a.bias_type = type_of(spec.bias->scalar_type());
  if (spec.relative_bias) {
    a.relative_bias = data(*spec.relative_bias), a.relative_bias_type = type_of(spec.relative_bias->scalar_type());
    a.relative_bias_length = spec.relative_bias->size(1), a.relative_bias_zero = spec.relative_bias_zero;
  }
  if (spec.relative_q && spec.relative_k) {
    a.relative_q = rows(*spec.relative_q), a.relative_k = data(*spec.relative_k);
    a.relative_k_length = spec.relative_k->size(1), a.relative_k_zero = spec.relative_k_zero;
  }
  if (spec.slopes) a.slopes = data(*spec.slopes), a.slopes_b = spec.slopes->size(0) == 1 ? 0 : a.heads;
  if (spec.sinks) a.sinks = data(*spec.sinks), a.sinks_type = type_of(spec.sinks->scalar_type());
  if (spec.seed) a.seed = integers(spec.seed), a.placed = spec.seed->numel() > 1;
  if (!a.seed) a.dropout = 0;
  // of a lse that is contiguous
  a.lse_b = a.heads * a.queries, a.lse_h = packed ? q.size(1) : a.queries;
  return a;
}

// Whether some keys may be hidden from a query.
bool hides(const Attention& a) {
  return a.mask.given() || a.blocks.given() || a.left >= 0 || a.right >= 0 || a.q_lengths || a.k_lengths || a.cu_q;
}

// Whether there is nothing to compute with: then results are zeros, and no key is seen.
bool hollow(const Attention& a) { return a.batch == 0 || a.heads == 0 || a.queries == 0; }

// Fills what the kernels do not visit, the rows beyond the queries that are valid: they see their sink alone, if there is one.
void clear(const Attention& a, const Tensor& out, const std::optional<Tensor>& lse) {
  torch::stable::zero_(const_cast<Tensor&>(out));
  if (!lse || !lse->numel()) return;
  const int64_t lanes = a.batch * a.heads, n = lse->numel() / lanes;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    double sink = -std::numeric_limits<double>::infinity();
    if (a.sinks) with_storage(a.sinks_type, [&]<class S>() { sink = static_cast<const S*>(a.sinks)[lane % a.heads]; });
    with_storage(a.type == Type::kDouble ? Type::kDouble : Type::kFloat,
                 [&]<class W>() { std::fill_n(static_cast<W*>(mutable_data(*lse)) + lane * n, n, static_cast<W>(sink)); });
  }
}

// Blocks of queries of all heads (one, if they are taken together); neighbors share keys. With a causal mask the later blocks of a head have
// more to do: they alternate with earlier ones, so that any range of tasks has about its share of the work.
std::vector<AttentionTask> tasks_of(const Attention& a, int64_t heads, int64_t lanes) {
  std::vector<AttentionTask> tasks;
  tasks.reserve(a.batch * heads * ((a.queries + lanes - 1) / lanes));
  for (int64_t b = 0; b < a.batch; ++b) {
    const Attention::Sequence s = a.sequence(b);
    const int64_t blocks = (s.queries + lanes - 1) / lanes;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t block = a.right < 0 ? i : i % 2 ? blocks - 1 - i / 2 : i / 2, first = block * lanes;
        tasks.push_back({b, h, first, std::min(lanes, s.queries - first)});
      }
  }
  return tasks;
}

// Runs body(begin, end, workspace) over all of count tasks, by threads.
template <class Body>
void over(int64_t count, int64_t bytes, const Body& body) {
  if (count == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || count == 1) {
    const Buffer workspace(bytes);
    return body(0, count, workspace.get());
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const Buffer workspace(bytes);
    body(begin, end, workspace.get());
  });
}

void run_forward(const Attention& a) {
  if (few_serves(a)) return attention_few(a);
  const AttentionKernels& others = kernels(a.type);
#if defined(__x86_64__)
  const AttentionKernels& kernel = in_parts(a) ? attention_kernels_amx() : others;
#else
  const AttentionKernels& kernel = others;
#endif
  std::vector<AttentionTask> tasks = tasks_of(a, a.heads, kernel.lanes(a));
  over(tasks.size(), kernel.forward_workspace(a), [&](int64_t begin, int64_t end, void* workspace) {
    const int64_t refused = kernel.forward(a, tasks.data() + begin, end - begin, workspace);
    if (!refused) return;
    const Buffer own(others.forward_workspace(a));
    const int64_t lanes = others.lanes(a);
    for (int64_t i = begin; i < begin + refused; ++i)
      for (int64_t first = 0; first < tasks[i].count; first += lanes) {
        AttentionTask task{tasks[i].b, tasks[i].h, tasks[i].first + first, std::min(lanes, tasks[i].count - first)};
        others.forward(a, &task, 1, own.get());
      }
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec, bool wants_lse, bool saves) {
  Attention a = attention_of(q, k, &v, spec);
  a.saves = saves;
  Tensor out = empty_rows(q, a.value_features), lse = wants_lse ? empty_lse(q) : empty({0}, wide_of(q.scalar_type()));
  if (a.q_lengths || hollow(a)) clear(a, out, lse);
  if (hollow(a)) return {out, lse};
  a.out = results(out);
  if (wants_lse) a.lse = mutable_data(lse);
  run_forward(a);
  return {out, lse};
}

Tensor empty_weights(const Tensor& q, const Tensor& k, bool average) {
  if (average) return empty({q.size(0), q.size(2), k.size(2)}, q.scalar_type());
  return empty({q.size(0), q.size(1), q.size(2), k.size(2)}, q.scalar_type());
}

void run_weights(const Attention& a, const Tensor& weights, bool average) {
  if (a.q_lengths || a.k_lengths) clear(a, weights, {});
  if (hollow(a) || (a.keys == 0 && !a.out.given())) return;
  const AttentionWeights w{a, mutable_data(weights), average};
  const AttentionKernels& kernel = kernels(a.type);
  const std::vector<AttentionTask> tasks = tasks_of(a, average ? 1 : a.heads, kernel.lanes(a));
  over(tasks.size(), kernel.weights_workspace(w),
       [&](int64_t begin, int64_t end, void* workspace) { kernel.weights(w, tasks.data() + begin, end - begin, workspace); });
}

// Sums in the wide type, for what several workers add to: a copy for each, or one for all of them.
class Sums {
 public:
  Sums(Type type, int64_t elements, int64_t workers, int64_t copies)
      : elements_(elements), copies_(copies), wide_(type == Type::kDouble), memory_(elements * copies * (wide_ ? 8 : 4)) {
    std::memset(memory_.get(), 0, elements * copies * (wide_ ? 8 : 4));
    for (int64_t i = 0; i < workers; ++i)
      pointers_.push_back(static_cast<char*>(memory_.get()) + (copies == 1 ? 0 : i) * elements * (wide_ ? 8 : 4));
  }
  void* const* pointers() const { return pointers_.data(); }
  // all copies, in order, into the first; times a factor as elements of a tensor
  void store(const Tensor& to, double factor = 1) const {
    if (wide_)
      store<double>(to, factor);
    else
      store<float>(to, factor);
  }

 private:
  template <class A>
  void store(const Tensor& to, double factor) const {
    A* sums = static_cast<A*>(memory_.get());
    for (int64_t copy = 1; copy < copies_; ++copy)
      for (int64_t i = 0; i < elements_; ++i) sums[i] += sums[copy * elements_ + i];
    if (factor != 1)
      for (int64_t i = 0; i < elements_; ++i) sums[i] *= A(factor);
    with_storage(type_of(to.scalar_type()), [&]<class S>() { std::copy_n(sums, elements_, static_cast<S*>(mutable_data(to))); });
  }

  int64_t elements_, copies_;
  bool wide_;
  Buffer memory_;
  std::vector<void*> pointers_;
};

// The gradients of q, k, v, bias, relative_bias, relative_q and relative_k, into those of the tensors that are given.
using Gradients = std::array<std::optional<Tensor>, 7>;

void run_backward(AttentionBackward& g, const Gradients& to) {
  Attention& a = g.attention;
  if (to[0]) g.dq = results(*to[0]);
  if (to[1]) g.dk = results(*to[1]);
  if (to[2]) g.dv = results(*to[2]);
  if (to[5]) g.drelative_q = results(*to[5]);
  for (int of_queries : {0, 5})
    if (to[of_queries] && a.q_lengths) torch::stable::zero_(const_cast<Tensor&>(*to[of_queries]));
  if (hollow(a) || a.key_heads == 0) {
    for (const auto& tensor : to)
      if (tensor) torch::stable::zero_(const_cast<Tensor&>(*tensor));
    return;
  }
  const AttentionKernels& kernel = kernels(a.type);
  const int64_t pairs = a.batch * a.key_heads, threads = torch::stable::get_num_threads();
  const int64_t blocks = (a.queries + kernel.lanes(a) - 1) / kernel.lanes(a);
  const int64_t parts = std::clamp<int64_t>(threads / pairs, 1, blocks), tasks = pairs * parts, workers = std::min(threads, tasks);
  std::optional<Sums> dbias, drelative_bias, drelative_k;
  const std::vector<void*> none(workers, nullptr);
  std::vector<void*> same;
  g.dbias = g.drelative_bias = g.drelative_k = none.data();
  if (to[3]) {
    const Tensor& bias = *to[3];
    int64_t strides[4], stride = 1;
    for (int64_t dim = 4; dim-- > 0; stride *= bias.size(dim)) strides[dim] = bias.size(dim) == 1 ? 0 : stride;
    g.dbias_b = strides[0], g.dbias_h = strides[1], g.dbias_i = strides[2], g.dbias_j = strides[3];
    const int64_t of_scores[] = {a.batch, a.heads, a.queries, a.keys};
    g.dbias_once = std::equal(of_scores, of_scores + 4, bias.sizes().begin());
    if (g.dbias_once) {  // no sums: the gradient itself
      if (hides(a)) torch::stable::zero_(const_cast<Tensor&>(bias));
      same.assign(workers, mutable_data(bias));
      g.dbias = same.data();
    } else {
      const bool own = (strides[0] || a.batch == 1) && (strides[1] || a.heads == 1) && (strides[2] || parts == 1);
      dbias.emplace(a.type, bias.numel(), workers, own ? 1 : workers);
      g.dbias = dbias->pointers();
    }
  }
  if (to[4]) {
    drelative_bias.emplace(a.type, a.heads * a.relative_bias_length, workers, a.batch == 1 && parts == 1 ? 1 : workers);
    g.drelative_bias = drelative_bias->pointers();
  }
  if (to[6]) {
    drelative_k.emplace(a.type, a.heads * a.relative_k_length * a.features, workers, a.batch == 1 && parts == 1 ? 1 : workers);
    g.drelative_k = drelative_k->pointers();
  }
  const int64_t sums_bytes = kernel.sums_bytes(a), workspace_bytes = kernel.backward_workspace(g);
  const auto run = [&](int64_t task, void* sums, int64_t worker, void* workspace) {
    kernel.backward(g, task / parts / a.key_heads, task / parts % a.key_heads, task % parts, parts, sums, worker, workspace);
  };
  const auto store = [&](int64_t pair, const void* sums) {
    kernel.store_gradients(g, pair / a.key_heads, pair % a.key_heads, sums, parts);
  };
  // worker w has the tasks of its share: which adds what does not depend on who comes first
  const Buffer shared(parts > 1 ? tasks * sums_bytes : 0);
  const auto work = [&](int64_t worker) {
    const Buffer workspace(workspace_bytes), own(parts > 1 ? 0 : sums_bytes);
    for (int64_t task = tasks * worker / workers; task < tasks * (worker + 1) / workers; ++task) {
      void* sums = parts > 1 ? static_cast<char*>(shared.get()) + task * sums_bytes : own.get();
      run(task, sums, worker, workspace.get());
      if (parts == 1) store(task, sums);
    }
  };
  const auto all = [](int64_t count, const auto& body) {
    if (count == 1) return body(0);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  };
  all(workers, work);
  if (parts > 1) all(pairs, [&](int64_t pair) { store(pair, static_cast<char*>(shared.get()) + pair * parts * sums_bytes); });
  if (dbias) dbias->store(*to[3]);
  if (drelative_bias) drelative_bias->store(*to[4]);
  if (drelative_k) drelative_k->store(*to[6], a.scale);
}

// Without dout, neither v nor out is needed.
AttentionBackward backward_of(const std::optional<Tensor>& dout, const Tensor& q, const Tensor& k, const std::optional<Tensor>& v,
                              const std::optional<Tensor>& out, const Tensor& lse, const AttentionSpec& spec) {
  AttentionBackward g{};
  g.attention = attention_of(q, k, dout ? &*v : nullptr, spec);
  if (dout) g.dout = rows(*dout), g.out = rows(*out);
  g.lse = data(lse);
  return g;
}

// Of the rows beyond the queries that are valid, which see no key.
void clear_delta(const void* dlse, const Tensor& delta) {
  torch::stable::zero_(const_cast<Tensor&>(delta));
  if (!dlse) return;
  with_storage(type_of(delta.scalar_type()), [&]<class W>() {
    const auto* from = static_cast<const W*>(dlse);
    std::transform(from, from + delta.numel(), static_cast<W*>(mutable_data(delta)), [](W x) { return -x; });
  });
}

// [B, Hq, Tq, Tk], or [B, Tq, Tk] of the average over the heads
void add_weights(AttentionBackward& g, const std::optional<Tensor>& dweights, bool average) {
  if (!dweights) return;
  const auto strides = dweights->strides();
  g.dweights = {data(*dweights), strides[0], average ? 0 : strides[1], strides[average ? 1 : 2], strides[average ? 2 : 3]};
  g.dweights_factor = average ? 1.0 / g.attention.heads : 1;
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, FASTSEQ_ATTENTION_SPEC, bool saves) {
  return forward(q, k, v, FASTSEQ_ATTENTION_GIVEN, true, saves);
}

std::tuple<Tensor, Tensor, Tensor> attention_with_weights(Tensor q, Tensor k, Tensor v, FASTSEQ_ATTENTION_SPEC, bool average) {
  Attention a = attention_of(q, k, &v, FASTSEQ_ATTENTION_GIVEN);
  Tensor out = empty_rows(q, a.value_features), lse = empty_lse(q), weights = empty_weights(q, k, average);
  if (a.q_lengths || hollow(a)) clear(a, out, lse);
  a.out = results(out), a.lse = mutable_data(lse);
  run_weights(a, weights, average);
  return {out, lse, weights};
}

Tensor attention_weights(Tensor q, Tensor k, Tensor, FASTSEQ_ATTENTION_SPEC, bool average) {
  const Attention a = attention_of(q, k, nullptr, FASTSEQ_ATTENTION_GIVEN);
  Tensor weights = empty_weights(q, k, average);
  run_weights(a, weights, average);
  return weights;
}

std::vector<Tensor> attention_backward(std::optional<Tensor> dout, std::optional<Tensor> dlse, std::optional<Tensor> dweights, bool average,
                                       Tensor q, Tensor k, std::optional<Tensor> v, std::optional<Tensor> out, Tensor lse,
                                       FASTSEQ_ATTENTION_SPEC, std::vector<bool> wanted) {
  AttentionBackward g = backward_of(dout, q, k, v, out, lse, FASTSEQ_ATTENTION_GIVEN);
  g.dlse = data(dlse);
  add_weights(g, dweights, average);
  std::optional<Tensor> delta;
  if (wanted[7]) {
    delta = empty_lse(q);
    if (q_lengths || hollow(g.attention)) clear_delta(g.dlse, *delta);
    g.delta = mutable_data(*delta);
  }
  Gradients to;
  if (wanted[0]) to[0] = empty_rows(q, q.size(-1));
  if (wanted[1]) to[1] = empty_rows(k, k.size(-1));
  if (wanted[2] && v) to[2] = empty_rows(*v, v->size(-1));
  if (wanted[3] && bias) to[3] = empty({bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, bias->scalar_type());
  if (wanted[4] && relative_bias) to[4] = empty({relative_bias->size(0), relative_bias->size(1)}, relative_bias->scalar_type());
  if (wanted[5] && relative_q) to[5] = empty_rows(*relative_q, q.size(-1));
  if (wanted[6] && relative_k) to[6] = empty({relative_k->size(0), relative_k->size(1), relative_k->size(2)}, relative_k->scalar_type());
  run_backward(g, to);
  std::vector<Tensor> gradients;
  for (const auto& tensor : to) gradients.push_back(tensor ? *tensor : empty({0}, q.scalar_type()));
  gradients.push_back(delta ? *delta : empty({0}, wide_of(q.scalar_type())));
  return gradients;
}

// Half the error of the gradients of float32, where keys are many, would be that of a lse's rounding; of a chunk of keys they do without it.
Tensor lse_for_gradients(int64_t B, int64_t H, int64_t Tq, int64_t Tk, ScalarType type) {
  constexpr int64_t kKeysOfOneChunk = 64;
  if (type == ScalarType::Float && Tk > kKeysOfOneChunk) return empty({2, B, H, Tq}, type);
  return empty({B, H, Tq}, wide_of(type));
}

void attention_into(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec, const Tensor& out,
                    const std::optional<Tensor>& lse, const std::optional<Tensor>& weights, bool average) {
  Attention a = attention_of(q, k, &v, spec);
  a.out = results(out);
  if (lse) a.lse = mutable_data(*lse), a.saves = true;
  if (lse && lse->dim() == 4) {
    const int64_t numbers = lse->numel() / 2;
    float* const rest = static_cast<float*>(a.lse) + numbers;
    if (few_serves(a))
      std::memset(rest, 0, numbers * sizeof(float));
    else
      a.lse_rest = rest;
  }
  if (weights) return run_weights(a, *weights, average);
  run_forward(a);
}

void plain_attention_into(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal, bool bottom_right, bool time_first,
                          const Tensor& out) {
  const int64_t heads = time_first ? 2 : 1, time = 3 - heads;
  const auto rows_at = [&]<class P>(const Tensor& tensor, P* data) {
    const auto strides = tensor.strides();
    return RowsOf<P>{data, strides[0], strides[heads], strides[time]};
  };
  const auto of_q = q.sizes(), of_k = k.sizes();
  Attention a{};
  a.type = type_of(q.scalar_type());
  a.batch = of_q[0], a.heads = of_q[heads], a.key_heads = of_k[heads], a.queries = of_q[time], a.keys = of_k[time];
  a.features = of_q[3], a.value_features = v.size(3);
  a.q = rows_at(q, q.const_data_ptr()), a.k = rows_at(k, k.const_data_ptr()), a.v = rows_at(v, v.const_data_ptr());
  a.left = -1, a.right = causal ? 0 : -1, a.bottom_right = bottom_right, a.scale = scale;
  a.out = rows_at(out, out.mutable_data_ptr());
  a.lse_b = a.heads * a.queries, a.lse_h = a.queries;
  run_forward(a);
}

void attention_backward_into(const Tensor& dout, const std::optional<Tensor>& dweights, bool average, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& out, const Tensor& lse, const AttentionSpec& spec,
                             const std::optional<Tensor>& dq, const std::optional<Tensor>& dk, const std::optional<Tensor>& dv,
                             const std::optional<Tensor>& dbias) {
  AttentionBackward g = backward_of(dout, q, k, v, out, lse, spec);
  if (lse.dim() == 4) g.lse_rest = static_cast<const float*>(g.lse) + lse.numel() / 2;
  add_weights(g, dweights, average);
  run_backward(g, {dq, dk, dv, dbias});
}

}  // namespace fastseq::cpu
