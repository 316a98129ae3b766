// Sigmoid, alone and times tanh, in fewer operations than Math has them, for recurrence of few rows, where no product hides the gates.
// Included inside the namespace of an instruction set, after vector.inl.

// They go without the rest of log2(e): as if their argument were wrong by a fifth of its own rounding.
template <class A>
struct Activation : Math<A> {
  using typename Math<A>::V, typename Math<A>::I;
  using L = Lanes<A>;
  using Math<A>::at_least, Math<A>::at_most, Math<A>::divide;

  // sigmoid = 1 / this: 1 + e^-x, for arguments of at least `least`
  static FASTSEQ_HOST_DEVICE V sigmoid_divisor(V x, A least = -L::kLargest) {
    x = at_least(at_most(x, L::kLargest), least);
    const V shifted = L::kRound - x * L::kLog2e;
    const V n = shifted - L::kRound, fraction = power(-n - x * L::kLog2e);
    const V scale = (V)(((I)shifted << L::kMantissa) + L::kOne);
    return scale * fraction + (scale + A(1));
  }
  static FASTSEQ_HOST_DEVICE V sigmoid(V x) { return divide(V{} + 1, sigmoid_divisor(x)); }

  // e^2|x| - 1, formed without cancellation
  static FASTSEQ_HOST_DEVICE V tanh_dividend(V x) {
    const V a = at_most((V)((I)x & ~L::kSign), L::kTanhIsOne);
    const V shifted = a * (2 * L::kLog2e) + L::kRound;
    const V fraction = power(a * (2 * L::kLog2e) - (shifted - L::kRound));
    const V scale = (V)(((I)shifted << L::kMantissa) + L::kOne);
    return scale * fraction + (scale - A(1));
  }

  // by one division: nothing is derived from the factors
  static FASTSEQ_HOST_DEVICE V sigmoid_tanh(V x, V y) {
    constexpr A kLeast = -60;  // below it sigmoid is less than 1e-26, and the divisor might become infinite
    const V e = tanh_dividend(y);
    return with_sign_of(divide(e, sigmoid_divisor(x, kLeast) * (e + A(2))), y);
  }

 private:
  // 2^f - 1, |f| <= 1/2
  static FASTSEQ_HOST_DEVICE V power(V f) {
    constexpr int last = sizeof(L::kExp2) / sizeof(A) - 1;
    V q = V{} + L::kExp2[last];
#pragma GCC unroll 16
    for (int i = last - 1; i >= 0; --i) q = q * f + L::kExp2[i];
    return f * q;
  }
  static FASTSEQ_HOST_DEVICE V with_sign_of(V a, V x) { return (V)((I)a ^ ((I)x & L::kSign)); }
};
