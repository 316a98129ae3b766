// What the programs that run CPU kernels without torch share: arrays between pages that nobody may touch, and numbers as they are stored.
// Included inside a namespace, after cpu_harness.h: where a program includes the kernels' own source (FASTSEQ_LEVEL), that namespace
// has their storage types.

#if !defined(FASTSEQ_LEVEL)
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
#endif

// As the kernels name a storage type.
template <class S>
constexpr fastseq::cpu::Type kTypeOf = std::is_same_v<S, double>     ? fastseq::cpu::Type::kDouble
                                       : std::is_same_v<S, float>    ? fastseq::cpu::Type::kFloat
                                       : std::is_same_v<S, bfloat16> ? fastseq::cpu::Type::kBfloat16
                                                                     : fastseq::cpu::Type::kHalf;

using Doubles = std::vector<double>;

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Where arrays lie: against the page after them, or the one before, which nobody may touch.
bool at_the_end = true;

// What is not written is NaN. With AddressSanitizer, the rest of the first and last page is poisoned too.
template <class T>
class Array {
 public:
  explicit Array(int64_t count = 0) : count_(count) {
    const int64_t page = 4096, bytes = count * sizeof(T), inner = (bytes + page - 1) / page * page;
    size_ = inner + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    char* begin = base_ + page;
    if (inner) mprotect(begin, inner, PROT_READ | PROT_WRITE), std::memset(begin, 0xff, inner);
    data_ = reinterpret_cast<T*>(at_the_end ? begin + inner - bytes : begin);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(base_, size_);
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes);
#endif
  }
  ~Array() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(base_, size_);
#endif
    munmap(base_, size_);
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() const { return count_ ? data_ : nullptr; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t count() const { return count_; }

 private:
  int64_t count_, size_;
  char* base_;
  T* data_;
};

// Of the storage types: digits of the mantissa, exponent of the smallest normal number.
template <class S>
constexpr int kDigits = std::is_same_v<S, double> ? 53 : std::is_same_v<S, float> ? 24 : std::is_same_v<S, bfloat16> ? 8 : 11;

// Numbers here are moderate: neither subnormal nor too large.
template <class S>
S stored(double x) {
  if constexpr (std::is_floating_point_v<S>) {
    return S(x);
  } else {
    int exponent;
    const double mantissa = std::frexp(x, &exponent);
    const int least = std::is_same_v<S, float16> ? -13 : -125, digits = kDigits<S> - std::max(0, least - exponent);
    const float rounded = std::ldexp(std::nearbyint(std::ldexp(mantissa, digits)), exponent - digits);
    uint32_t bits;
    std::memcpy(&bits, &rounded, 4);
    if (std::is_same_v<S, bfloat16>) return {uint16_t(bits >> 16)};
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude < 0x38800000) return {uint16_t(sign | uint32_t(std::fabs(std::ldexp(rounded, 24))))};
    return {uint16_t(sign | ((magnitude - (112u << 23)) >> 13))};
  }
}

template <class S>
double value(S s) {
  if constexpr (std::is_floating_point_v<S>) {
    return s;
  } else if constexpr (std::is_same_v<S, bfloat16>) {
    const uint32_t bits = uint32_t(s.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  } else {
    const int exponent = s.bits >> 10 & 31, mantissa = s.bits & 1023;
    const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    return s.bits >> 15 ? -magnitude : magnitude;
  }
}
