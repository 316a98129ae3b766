// Quotients without a division.
#pragma once

#include <cstdint>

#include "../common/portable.h"

namespace fastseq::recurrent {

// Of numbers below kMostDepth by units up to 64, below 4096 by others up to 128.
constexpr int kMostDepth = 16384;
class Quotient {
 public:
  constexpr FASTSEQ_HOST_DEVICE explicit Quotient(int by) : inverse_(((1u << 20) + by - 1) / by) {}
  constexpr FASTSEQ_HOST_DEVICE int of(int number) const { return static_cast<int>(number * inverse_ >> 20); }

 private:
  uint32_t inverse_;
};

}  // namespace fastseq::recurrent
