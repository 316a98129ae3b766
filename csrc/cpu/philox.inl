// Random numbers that are told by their place. Included after vector.inl.

// Philox 4x32-10 (Salmon et al., 2011) over lanes: four random numbers in each.
struct Philox {
  // as many lanes as a vector of scores has; those of double are half as wide
  template <class A>
  struct Of {
    static constexpr int kBytes = 4 * Math<A>::kWidth;
    typedef uint32_t U __attribute__((vector_size(kBytes)));
    typedef uint64_t U64 __attribute__((vector_size(kBytes)));

    // high and low halves of constant times x
    static FASTSEQ_HOST_DEVICE void product(uint32_t constant, U x, U& high, U& low) {
      const U64 even = half(constant, (U64)x), odd = half(constant, (U64)x >> 32);
      low = (U)((even & 0xffffffff) | odd << 32);
      high = (U)(even >> 32 | (odd & ~uint64_t(0xffffffff)));
    }
    // constant times the lower half of each lane
    static FASTSEQ_HOST_DEVICE U64 half(uint32_t constant, U64 x) {
#if defined(__AVX512F__)
      if constexpr (kBytes == 64) return (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi64(constant));
#endif
#if defined(__AVX2__)
      if constexpr (kBytes == 32) return (U64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(constant));
#endif
#if defined(__SSE2__)
      if constexpr (kBytes == 16) return (U64)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(constant));
#endif
      return (x & 0xffffffff) * uint64_t(constant);
    }

    static FASTSEQ_HOST_DEVICE void random(uint64_t seed, U c0, U c1, U c2, U (&numbers)[4]) {
      U c3{};
      uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        U high_a, low_a, high_b, low_b;
        product(0xD2511F53, c0, high_a, low_a);
        product(0xCD9E8D57, c2, high_b, low_b);
        c0 = high_b ^ c1 ^ k0, c1 = low_b, c2 = high_a ^ c3 ^ k1, c3 = low_a;
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
      }
      numbers[0] = c0, numbers[1] = c1, numbers[2] = c2, numbers[3] = c3;
    }
  };
};
