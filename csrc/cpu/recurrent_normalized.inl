// Steps of the cells with layer norm: what ForwardKernel and BackwardKernel do where units need their whole row before they can go on.
// Included inside the namespace of an instruction set, after both.
//
// A member of a team keeps what it computed of its own units, the team meets, and each member takes the statistics of every row itself:
// passes over rows that are in its cache, cheaper than to divide them and meet once more, and the same however the units are divided.

constexpr double kNormEpsilon = 1e-5;  // as torch.nn.LayerNorm

// The sum over the lanes.
template <class A, int S = Math<A>::kWidth / 2>
FASTSEQ_HOST_DEVICE A added_up(typename Math<A>::V v) {
  if constexpr (S == 0) {
    return v[0];
  } else {
    const auto other = [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      return __builtin_shufflevector(v, v, (J ^ S)...);
    }(std::make_integer_sequence<int, Math<A>::kWidth>());
    return added_up<A, S / 2>(v + other);
  }
}

// A row of `parts` parts of as many units each; load(part, u) gives a vector of it, zero beyond the units.
template <class A, int kParts>
struct NormalizedRow {
  using V = typename Math<A>::V;
  static constexpr int64_t W = Math<A>::kWidth;

  // In two passes: the squares are of distances from the mean of the first. What these have left of a mean is the rounding of its
  // sum, which may be more than units that hardly differ have, and joins it.
  template <class Load>
  static FASTSEQ_HOST_DEVICE Statistics<A> statistics(int64_t units, const Load& load) {
    V sums[kParts] = {}, rests[kParts] = {}, squares[kParts] = {};
    for (int64_t u = 0; u < units; u += W)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) sums[p] += load(p, u);
    const A count = kParts * units, first = total(sums) / count;
    const auto add = [&](int p, V distance) __attribute__((always_inline)) {
      rests[p] += distance, squares[p] += distance * distance;
    };
    int64_t u = 0;
    for (; u + W <= units; u += W)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) add(p, load(p, u) - first);
    if (u < units)
      for (int p = 0; p < kParts; ++p) {
        alignas(64) A within[W] = {};
        const V distance = load(p, u) - first;
        __builtin_memcpy(within, &distance, (units - u) * sizeof(A));
        add(p, *(const V*)within);
      }
    const A left = total(rests) / count, variance = total(squares) / count - left * left;
    return {first + left, A(1 / __builtin_sqrt(double(variance < 0 ? A(0) : variance) + kNormEpsilon))};
  }

  // Of the gradient of the normalized row, what the norm takes away: its mean and the mean of its product with the row.
  struct Taken {
    A mean, along;
  };
  template <class Load, class LoadGradient>
  static FASTSEQ_HOST_DEVICE Taken taken(int64_t units, Statistics<A> of_row, const Load& load, const LoadGradient& gradient) {
    V sums[kParts] = {}, products[kParts] = {};
    for (int64_t u = 0; u < units; u += W)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        const V grad = gradient(p, u);
        sums[p] += grad;
        products[p] += grad * of_row.normal(load(p, u));
      }
    const A count = kParts * units;
    return {total(sums) / count, total(products) / count};
  }

 private:
  static FASTSEQ_HOST_DEVICE A total(const V (&of_parts)[kParts]) {
    V sum = of_parts[0];
    for (int p = 1; p < kParts; ++p) sum += of_parts[p];
    return added_up<A>(sum);
  }
};

#define FASTSEQ_FORWARD                                                                     \
  template <class Product, class S, template <class> class Cell, bool kZoned, bool kFew> \
  void ForwardKernel<Product, S, Cell, kZoned, kFew>

// R h of a tile
FASTSEQ_FORWARD::keep_product(const Item<A>& item, int64_t from, int64_t to) const {
  const int64_t blocks = item.vectors / G;
  for (int64_t r = from; r < to; ++r)
    for (int64_t v = 0; v < item.vectors; ++v)
      *(V*)(buf.r + ((item.begin + r) * G + v / blocks) * buf.ldc + (item.tile * UB + v % blocks) * W) =
          *(const V*)(item.sums + (r * item.vectors + v) * W);
}

FASTSEQ_FORWARD::finish_normalized(int64_t active) {
  if (w.barrier) w.barrier->wait(w.weight);
  for (int64_t slot = 0; slot < active; ++slot) finish_gates(slot);
  if constexpr (C::kNormalizesC) {
    if (w.barrier) w.barrier->wait(w.weight);
    for (int64_t slot = 0; slot < active; ++slot) finish_cell(slot);
  }
}

FASTSEQ_FORWARD::finish_gates(int64_t slot) {
  const int64_t row = steps.row(t, slot);
  const A* product = buf.r + slot * G * buf.ldc;
  const auto load = [&](int g, int64_t u) { return Memory<A, A>::load(product + g * buf.ldc + u, H - u); };
  const Statistics<A> of_product = NormalizedRow<A, G>::statistics(H, load);
  for (int64_t u = units.begin; u < units.end; u += W) {
    const int64_t n = H - u;
    V gx[G], r[G], normal[G], inner[C::kVectors], saved[G], c[K + 1], h_next, c_next[K + 1];
    for (int g = 0; g < G; ++g) {
      if (x)
        gx[g] = *(const V*)(projected_input({u / (UB * W), 0, 0, NV, nullptr}, slot) + g * W);
      else
        gx[g] = given_gates(row * D * GH + g * H + u, n);
      r[g] = load(g, u);
      normal[g] = of_product.normal(r[g]);
    }
    for (int v = 0; v < C::kVectors; ++v) inner[v] = vectors ? Memory<S, A>::load(vectors + v * H + u, n) : V{};
    for (int k = 0; k < K; ++k) c[k] = *(const V*)(buf.c + (slot * K + k) * buf.ldc + u);
    const V h = projected ? V{} : old_h->load(slot, u);
    Cell<Activations>::forward(gx, normal, inner, h, c, saved, h_next, c_next);
    if (gates) {
      S* to = gates + row * D * kSaved * H + u;
      for (int g = 0; g < G; ++g) Memory<S, A>::store(to + g * H, saved[g], n), Memory<S, A>::store(to + (G + g) * H, r[g], n);
    }
    if constexpr (C::kNormalizesC) {
      *(V*)(buf.fresh + slot * buf.ldc + u) = c_next[0];
      *(V*)(buf.o + slot * buf.ldc + u) = saved[G - 1];
    } else {
      keep_output(slot, row, u, h_next);
    }
  }
}

FASTSEQ_FORWARD::finish_cell(int64_t slot) {
  const int64_t row = steps.row(t, slot);
  const A* fresh = buf.fresh + slot * buf.ldc;
  const auto load = [&](int, int64_t u) { return Memory<A, A>::load(fresh + u, H - u); };
  const Statistics<A> of_c = NormalizedRow<A, 1>::statistics(H, load);
  for (int64_t u = units.begin; u < units.end; u += W) {
    const int64_t n = H - u;
    V inner[C::kVectors], c = load(0, u);
    for (int v = 0; v < C::kVectors; ++v) inner[v] = vectors ? Memory<S, A>::load(vectors + v * H + u, n) : V{};
    keep_output(slot, row, u, Cell<Activations>::output(*(const V*)(buf.o + slot * buf.ldc + u), inner, of_c.normal(c)));
    V* state = (V*)(buf.c + slot * buf.ldc + u);
    if constexpr (kZoned) c = keep_c.held(keep_c.load(row * D * H + u, n), *state, c);
    *state = c;
    if (c_all) Memory<A, A>::store(c_all + row * D * H + u, c, n);
  }
}

// a step's output: what a projection sees, or h
FASTSEQ_FORWARD::keep_output(int64_t slot, int64_t row, int64_t u, V h) {
  const int64_t n = H - u;
  if (projected) return buf.m.template store<A>(slot, u, h, n);
  if constexpr (kZoned) h = keep_h.held(keep_h.load(row * D * P + u, n), old_h->load(slot, u), Memory<S, A>::rounded(h));
  new_h->template store<S>(slot, u, h, n);
  if constexpr (Product::kWatched) watch.see(h, n);
  Memory<S, A>::store(y + row * D * P + u, h, n);
}

#undef FASTSEQ_FORWARD
#define FASTSEQ_BACKWARD                                                        \
  template <class Product, class S, template <class> class Cell, bool kZoned> \
  void BackwardKernel<Product, S, Cell, kZoned>

FASTSEQ_BACKWARD::finish_normalized(int64_t active) {
  if constexpr (C::kNormalizesC) {
    for (int64_t slot = 0; slot < active; ++slot) through_output(slot);
    if (w.barrier) w.barrier->wait(w.weight);
  }
  for (int64_t slot = 0; slot < active; ++slot) through_gates(slot);
  if (w.barrier) w.barrier->wait(w.weight);
  for (int64_t slot = 0; slot < active; ++slot) through_product_norm(slot);
}

// from the output's gradient to that of N(c)
FASTSEQ_BACKWARD::through_output(int64_t slot) const {
  const int64_t row = steps.row(t, slot);
  const Proposed proposed(*this, slot, row);
  const Statistics<A> of_c = of_slot[slot] = NormalizedRow<A, 1>::statistics(H, proposed);
  for (int64_t u = units.begin; u < units.end; u += W) {
    const int64_t n = H - u;
    V inner[C::kVectors];
    for (int v = 0; v < C::kVectors; ++v) inner[v] = vectors ? Memory<S, A>::load(vectors + v * H + u, n) : V{};
    const V dm = *(const V*)(buf.dm + slot * buf.ldp + u);
    const V o = Memory<S, A>::load(gates + (row * D * kSaved + G - 1) * H + u, n);
    V& dgate = *(V*)(buf.dnormal + (slot * G + G - 1) * buf.ldp + u);
    *(V*)(buf.dnormal_c + slot * buf.ldp + u) = Cell<M>::output_backward(dm, o, inner, of_c.normal(proposed(0, u)), dgate);
  }
}

// to the gradients of the gates, and of N(R h)
FASTSEQ_BACKWARD::through_gates(int64_t slot) const {
  const int64_t row = steps.row(t, slot);
  const Before before(*this, slot);
  const S* saved_of = gates + row * D * kSaved * H;
  const auto product = [&](int g, int64_t u) { return Memory<S, A>::load(saved_of + (G + g) * H + u, H - u); };
  const Proposed proposed(*this, slot, row);
  typename NormalizedRow<A, 1>::Taken taken{};
  if constexpr (C::kNormalizesC)
    taken = NormalizedRow<A, 1>::taken(H, of_slot[slot], proposed, [&](int, int64_t u) {
      return Memory<A, A>::load(buf.dnormal_c + slot * buf.ldp + u, H - u);
    });
  else
    of_slot[slot] = NormalizedRow<A, G>::statistics(H, product);
  const Statistics<A> of_row = of_slot[slot];
  for (int64_t u = units.begin; u < units.end; u += W) {
    const int64_t n = H - u;
    V saved[G], inner[C::kVectors], normal[G], c[K + 1], dc[K + 1], dx[G], dr[G], h{}, dh_direct, dc_prev[K + 1], dc_kept{};
    for (int g = 0; g < G; ++g) {
      saved[g] = Memory<S, A>::load(saved_of + g * H + u, n);
      normal[g] = of_row.normal(product(g, u));
    }
    for (int v = 0; v < C::kVectors; ++v) inner[v] = vectors ? Memory<S, A>::load(vectors + v * H + u, n) : V{};
    const V dm = *(const V*)(buf.dm + slot * buf.ldp + u);
    if constexpr (C::kNormalizesC) {
      const A* c_before = before.c(u);
      c[0] = c_before ? Memory<A, A>::load(c_before, n) : V{};
      dc[0] = *(const V*)(buf.dc + slot * buf.ldp + u);
      if (dc_all) dc[0] += Memory<A, A>::load(dc_all + row * D * H + u, n);
      if constexpr (kZoned) {
        const V keep = keep_c.load(row * D * H + u, n);
        dc_kept = keep * dc[0];
        dc[0] = (A(1) - keep) * dc[0];
      }
      const V dnormal_c = *(const V*)(buf.dnormal_c + slot * buf.ldp + u);
      dc[0] += of_row.scale * (dnormal_c - taken.mean - of_row.normal(proposed(0, u)) * taken.along);
      dx[G - 1] = *(const V*)(buf.dnormal + (slot * G + G - 1) * buf.ldp + u);
    } else {
      if (const S* h_before = before.h(u)) h = Memory<S, A>::load(h_before, n);
    }
    Cell<M>::backward(dm, dc, saved, inner, h, c, normal, dx, dr, dh_direct, dc_prev);
    for (int g = 0; g < G; ++g) {
      Memory<S, A>::store(dgates + row * D * GH + g * H + u, dx[g], n);
      *(V*)(buf.dnormal + (slot * G + g) * buf.ldp + u) = dr[g];
    }
    if constexpr (C::kNormalizesC) *(V*)(buf.dc + slot * buf.ldp + u) = dc_prev[0] + dc_kept;
    if (!projected) *(V*)(buf.dh + slot * buf.ldh + u) += dh_direct;
  }
}

// to the gradient of R h
FASTSEQ_BACKWARD::through_product_norm(int64_t slot) {
  const int64_t row = steps.row(t, slot);
  const S* saved_of = gates + (row * D * kSaved + G) * H;
  const auto product = [&](int g, int64_t u) { return Memory<S, A>::load(saved_of + g * H + u, H - u); };
  const auto gradient = [&](int g, int64_t u) { return Memory<A, A>::load(buf.dnormal + (slot * G + g) * buf.ldp + u, H - u); };
  const Statistics<A> of_product = C::kNormalizesC ? NormalizedRow<A, G>::statistics(H, product) : of_slot[slot];
  const auto taken = NormalizedRow<A, G>::taken(H, of_product, product, gradient);
  for (int64_t u = units.begin; u < units.end; u += W)
    for (int g = 0; g < G; ++g) {
      const V normal = of_product.normal(product(g, u));
      const V dr = of_product.scale * (gradient(g, u) - taken.mean - normal * taken.along);
      Memory<S, A>::store(drecurrent + row * D * GH + g * H + u, dr, H - u);
      new_dgates->template store<S>(slot, g * H + u, dr, H - u);
      if constexpr (Product::kWatched) watch.see(dr, H - u);
    }
}

#undef FASTSEQ_BACKWARD
