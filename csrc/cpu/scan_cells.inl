// The cells of a scan: what is coefficient and addend of a step, and of their gradients those of what a cell is given. The equations stand in
// fastseq/reference/scan.py. Included by scan_kernel.inl after vector.inl.

template <class A>
struct Given {
  typename Lanes<A>::V a, b, gate, vector;
};

// A gate from its logits, and its distance to 1, neither of which cancels.
template <class A>
struct Gate {
  typename Lanes<A>::V open, shut;
  FASTSEQ_HOST_DEVICE explicit Gate(typename Lanes<A>::V x) {
    typename Lanes<A>::V scale, fraction;
    Math<A>::exp_parts(Math<A>::clamped(x, Lanes<A>::kLargest), -1, scale, fraction);
    const auto e = scale + scale * fraction;
    open = Math<A>::divide(typename Lanes<A>::V{} + 1, e + A(1)), shut = e * open;
  }
};

// g of minGRU: v + 1/2 from 0 on, else sigmoid(v); and its slope
template <class A>
struct Positive {
  typename Lanes<A>::V value, slope;
  FASTSEQ_HOST_DEVICE explicit Positive(typename Lanes<A>::V v) {
    const Gate<A> s(v);
    value = v >= 0 ? v + A(0.5) : s.open, slope = v >= 0 ? typename Lanes<A>::V{} + 1 : s.open * s.shut;
  }
};

template <class V>
FASTSEQ_HOST_DEVICE V square_root(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
  else return (V)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm256_sqrt_ps((__m256)x);
  else return (V)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  if constexpr (sizeof(x[0]) == 4) return (V)_mm_sqrt_ps((__m128)x);
  else return (V)_mm_sqrt_pd((__m128d)x);
#else
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// A cell is made of what it is given; alone: there is no state before the step. backward leaves what a cell does not have as it is.
template <class A, ScanCell kCell>
struct Transition;

template <class A>
struct Transition<A, ScanCell::kGiven> {
  using V = typename Lanes<A>::V;
  V coefficient, addend;
  FASTSEQ_HOST_DEVICE Transition(const Given<A>& x, bool) : coefficient(x.a), addend(x.b) {}
  FASTSEQ_HOST_DEVICE void backward(V of_coefficient, V of_addend, Given<A>& of) const { of.a = of_coefficient, of.b = of_addend; }
};

template <class A>
struct Transition<A, ScanCell::kLog> {
  using V = typename Lanes<A>::V;
  V coefficient, addend;
  FASTSEQ_HOST_DEVICE Transition(const Given<A>& x, bool) : coefficient(Math<A>::exp(x.a)), addend(x.b) {}
  FASTSEQ_HOST_DEVICE void backward(V of_coefficient, V of_addend, Given<A>& of) const {
    of.a = of_coefficient * coefficient, of.b = of_addend;
  }
};

template <class A>
struct Transition<A, ScanCell::kMinGru> {
  using V = typename Lanes<A>::V;
  Positive<A> candidate;
  V z, coefficient, addend;
  FASTSEQ_HOST_DEVICE Transition(const Given<A>& x, bool)
      : candidate(x.b), z(Math<A>::sigmoid(x.a)), coefficient(A(1) - z), addend(z * candidate.value) {}
  FASTSEQ_HOST_DEVICE void backward(V of_coefficient, V of_addend, Given<A>& of) const {
    of.a = (of_addend * candidate.value - of_coefficient) * z * coefficient, of.b = of_addend * z * candidate.slope;
  }
};

// Of the gates' logits p = 1 + e^-i and q = 1 + e^-f, all over the largest term: their shares are f / (f + i) = p / (p + q) and q / (p + q),
// whatever underflows.
template <class A>
struct Transition<A, ScanCell::kMinLstm> {
  using V = typename Lanes<A>::V;
  Positive<A> candidate;
  V of_forget, of_input, p, q, part, coefficient, input, addend;
  FASTSEQ_HOST_DEVICE Transition(const Given<A>& x, bool) : candidate(x.b) {
    const V largest = Math<A>::maximum(Math<A>::maximum(-x.gate, -x.a), V{});
    const V one = Math<A>::exp(-largest);
    of_forget = Math<A>::exp(-x.a - largest), of_input = Math<A>::exp(-x.gate - largest);
    p = one + of_input, q = one + of_forget;
    part = Math<A>::divide(V{} + 1, p + q);
    coefficient = p * part, input = q * part, addend = input * candidate.value;
  }
  FASTSEQ_HOST_DEVICE void backward(V of_coefficient, V of_addend, Given<A>& of) const {
    const V of_share = (of_coefficient - of_addend * candidate.value) * part;
    of.a = of_share * coefficient * of_forget, of.gate = -(of_share * input * of_input);
    of.b = of_addend * input * candidate.slope;
  }
};

template <class A>
struct Transition<A, ScanCell::kHgrn> {
  using V = typename Lanes<A>::V;
  Gate<A> f, i;
  V value, span, lets_in, coefficient, addend;
  FASTSEQ_HOST_DEVICE Transition(const Given<A>& x, bool) : f(x.a), i(x.b), value(x.b) {
    span = A(1) - x.vector, lets_in = span * f.shut;
    coefficient = x.vector + span * f.open, addend = lets_in * (value * i.open);
  }
  FASTSEQ_HOST_DEVICE void backward(V of_coefficient, V of_addend, Given<A>& of) const {
    const V of_f = of_coefficient - of_addend * (value * i.open);
    of.a = of_f * (lets_in * f.open), of.vector = of_f * f.shut;
    of.b = of_addend * lets_in * i.open * (A(1) + value * i.shut);
  }
};

template <class A>
struct Transition<A, ScanCell::kRgLru> {
  using V = typename Lanes<A>::V;
  bool alone;
  Gate<A> r, i;
  V value, log, coefficient, root, addend;
  FASTSEQ_HOST_DEVICE Transition(const Given<A>& x, bool alone_) : alone(alone_), r(x.a), i(x.gate), value(x.b) {
    log = -(x.vector * r.open), coefficient = Math<A>::exp(log);
    root = alone ? V{} + 1 : square_root(Math<A>::at_least(one_minus_square(), A(1e-30)));
    addend = root * i.open * value;
  }
  // 1 - e^(2 log) as the parts of e's power give it
  FASTSEQ_HOST_DEVICE V one_minus_square() const {
    V scale, fraction;
    Math<A>::exp_parts(Math<A>::at_least(log, Lanes<A>::kLargest / -2), 2, scale, fraction);
    return (A(1) - scale) - scale * fraction;
  }
  FASTSEQ_HOST_DEVICE void backward(V of_coefficient, V of_addend, Given<A>& of) const {
    const V of_root = of_addend * i.open * value;
    const V of_log = (alone ? of_coefficient : of_coefficient - of_root * Math<A>::divide(coefficient, root)) * coefficient;
    of.a = of_log * log * r.shut, of.vector = -(of_log * r.open);
    of.gate = of_root * root * i.shut, of.b = of_addend * root * i.open;
  }
};

template <class A>
struct Transition<A, ScanCell::kQrnn> {
  using V = typename Lanes<A>::V;
  Gate<A> f;
  V z, coefficient, addend;
  FASTSEQ_HOST_DEVICE Transition(const Given<A>& x, bool) : f(x.a), z(Math<A>::tanh(x.b)), coefficient(f.open), addend(f.shut * z) {}
  FASTSEQ_HOST_DEVICE void backward(V of_coefficient, V of_addend, Given<A>& of) const {
    of.a = (of_coefficient - of_addend * z) * (f.open * f.shut), of.b = of_addend * f.shut * (A(1) - z * z);
  }
};

template <class A>
struct Transition<A, ScanCell::kQrnnIfo> {
  using V = typename Lanes<A>::V;
  Gate<A> f, i;
  V z, coefficient, addend;
  FASTSEQ_HOST_DEVICE Transition(const Given<A>& x, bool)
      : f(x.a), i(x.gate), z(Math<A>::tanh(x.b)), coefficient(f.open), addend(i.open * z) {}
  FASTSEQ_HOST_DEVICE void backward(V of_coefficient, V of_addend, Given<A>& of) const {
    of.a = of_coefficient * (f.open * f.shut), of.gate = of_addend * z * (i.open * i.shut), of.b = of_addend * i.open * (A(1) - z * z);
  }
};
