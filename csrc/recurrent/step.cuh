// What the forward and the backward kernel know of their place in a layer.
#pragma once

#include "batch_rows.cuh"
#include "cta_coords.cuh"
#include "math.cuh"
#include "thread_map.cuh"

namespace fastseq::recurrent {

// kCarried: numbers that a unit of a sequence carries from step to step, in fp32.
template <class C, class Engine, int kCarried>
class Step {
 protected:
  using Number = typename Engine::Number;
  static constexpr int kColumns = Engine::kColumns;
  static constexpr int kItems = most_items(Engine::kMostUnits, kColumns);
  // arrays of no elements are no C++
  static constexpr int kStates = C::kStates ? C::kStates : 1, kSaved = C::kSaved ? C::kSaved : 1;
  static constexpr int kVectors = C::kVectors ? C::kVectors : 1;

  FASTSEQ_DEVICE Step(const Walk& walk, const Split& split, const ExchangeBuffers& buffers, gpu::Smem& smem)
      : walk_(walk), split_(split), cta_(split), engine_(split, buffers, cta_, smem), items_(split, cta_, walk.hidden),
        carried_(smem.take<float>(kCarried * split.batch_tiles * kColumns * split.units)),
        vectors_(smem.take<float>(C::kVectors * split.units)), rows_(walk, split, cta_, smem),
        arrived_(smem.take<gpu::Mbarrier>(2)) {}

  FASTSEQ_DEVICE const Number* weight_of(const void* weight) const {
    return static_cast<const Number*>(weight) + int64_t{cta_.lane} * C::kGates * walk_.hidden * walk_.hidden;
  }

  FASTSEQ_DEVICE void load_vectors(const void* vectors) {
    FASTSEQ_ROLLED
    for (int i = gpu::tid(); i < C::kVectors * split_.units; i += kThreads) {
      const int which = i / split_.units, unit = cta_.rank * split_.units + i % split_.units;
      const auto* vector = static_cast<const Number*>(vectors) + (int64_t{cta_.lane} * C::kVectors + which) * walk_.hidden;
      vectors_[i] = vectors && unit < walk_.hidden ? gpu::to_float(vector[unit]) : 0.0f;
    }
  }

  FASTSEQ_DEVICE float& carried(int batch_tile, int which, int j) {
    return carried_[(batch_tile * kCarried + which) * kColumns * split_.units + items_.index(j)];
  }

  // in a state [D, B, numbers * H]
  FASTSEQ_DEVICE int64_t offset_of_state(int batch_tile, int j, int numbers, int which) const {
    const int64_t row = int64_t{cta_.lane} * walk_.batch + rows_.batch_row(batch_tile, items_.column(j));
    return (row * numbers + which) * walk_.hidden + items_.hidden_unit(j);
  }

  // in a tensor [rows, D, numbers * H]
  FASTSEQ_DEVICE int64_t offset_in_row(int64_t row, int j, int numbers, int which) const {
    return ((row * walk_.lanes + cta_.lane) * numbers + which) * walk_.hidden + items_.hidden_unit(j);
  }

  FASTSEQ_DEVICE bool has_state(int batch_tile, int j) const { return rows_.exists(batch_tile, items_.column(j)) && items_.has_unit(j); }

  FASTSEQ_DEVICE bool works(int batch_tile, int j, int t) const {
    return items_.exists(j) && rows_.active(batch_tile, items_.column(j), t) && items_.has_unit(j);
  }

  const Walk& walk_;
  const Split& split_;
  const CtaCoords cta_;
  Engine engine_;
  const ThreadMap<kColumns> items_;
  float* carried_;     // [batch_tiles][kCarried][items]
  float* vectors_;  // [V][U]
  const BatchRows<kColumns> rows_;
  gpu::Mbarrier* arrived_;
};

}  // namespace fastseq::recurrent
