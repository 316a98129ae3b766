// Activations that end in bfloat16, where products of two are concerned.
// Included inside the namespace of an instruction set with AVX-512, after vector.inl.

struct ShortProducts : ShortMath {
  // In one division, whose divisor has to stay finite. How far its factors are from 1 a product does not tell: 14 bits will do.
  static FASTSEQ_HOST_DEVICE V sigmoid_tanh(V x, V y) {
    V scale, fraction;
    exp_parts(clamped(x, 60), -1, scale, fraction);
    const V e = tanh_dividend(y), divisor = ((scale * fraction + scale) + 1.0f) * (e + 2.0f);
    return e * (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)divisor);
  }
};
