// Matrix products of a warp in the fragment layouts of PTX's mma.m16n8k16 and m16n8k8, and 16-bit numbers.
//
// Lane l is in group g = l / 4 at place t = l % 4. Of d it has rows g and g + 8, columns 2t and 2t + 1. Of a it has those rows,
// and of b column g; along k it has pairs of 16-bit values at 2t and 2t + 8, or single values of 32 bits at t and t + 4.

#include <bit>
#include <cstdint>

#include "state.h"

namespace fastseq::gpu::host {

namespace {

// eight columns
using Row [[gnu::vector_size(32)]] = float;

float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// Of 32 bits the tensor core reads TF32's 19.
float tf32_to_float(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000); }

template <int kDepth, class Unpack>
void multiply(MmaArguments* const* lanes, Unpack unpack) {
  constexpr int kPerRegister = kDepth == 16 ? 2 : 1;
  float a[16][kDepth];
  Row b[kDepth], d[16];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaArguments& own = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kPerRegister; ++i) {
        const int k = kPerRegister * (t + 4 * half) + i;
        a[g][k] = unpack(own.a[2 * half], i);
        a[g + 8][k] = unpack(own.a[2 * half + 1], i);
        b[k][g] = unpack(own.b[half], i);
      }
      d[g + 8 * half][2 * t] = own.d[2 * half];
      d[g + 8 * half][2 * t + 1] = own.d[2 * half + 1];
    }
  }
  for (int m = 0; m < 16; ++m) {
    Row sum{};
    for (int k = 0; k < kDepth; ++k) sum += a[m][k] * b[k];
    d[m] += sum;
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void multiply_fragments(Product product, MmaArguments* const* lanes) {
  switch (product) {
    case Product::kHalf:
      return multiply<16>(lanes, [](uint32_t word, int i) { return half_to_float(static_cast<uint16_t>(word >> 16 * i)); });
    case Product::kBfloat16:
      return multiply<16>(lanes, [](uint32_t word, int i) { return bfloat16_to_float(static_cast<uint16_t>(word >> 16 * i)); });
    case Product::kTf32: return multiply<8>(lanes, [](uint32_t word, int) { return tf32_to_float(word); });
  }
}

int conflicts(const unsigned char* const (&rows)[8]) {
  int most = 0;
  for (int i = 0; i < 8; ++i) {
    int same = 0;
    for (int j = 0; j < 8; ++j) {
      bool seen = false;
      for (int before = 0; before < j; ++before) seen |= rows[before] == rows[j];
      same += !seen && (reinterpret_cast<uintptr_t>(rows[i]) - reinterpret_cast<uintptr_t>(rows[j])) % 128 / 16 == 0;
    }
    most = same > most ? same : most;
  }
  return most - 1;
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  if (magnitude >= 0x7c00u << 13) return std::bit_cast<float>(sign | 0x7f800000 | magnitude);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f));
}

uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more
  if (magnitude < 0x38800000) {                       // subnormal: adding 0.5 shifts and rounds to multiples of 2^-24
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace fastseq::gpu::host
