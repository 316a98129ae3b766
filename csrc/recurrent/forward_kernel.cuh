// Forward over a whole sequence in one launch.
#pragma once

#include "engine.cuh"
#include "items.cuh"
#include "math.cuh"

namespace fastseq::recurrent {

template <template <class> class CellOf, class Tile, int kTiles>
class ForwardStep {
  using C = CellOf<Math<Tile::kExact>>;
  using Number = typename Tile::Number;
  using Engine_ = Engine<Tile, kTiles, C::kGates, 1>;
  static constexpr int kColumns = Engine_::kColumns;
  static constexpr int kItems = most_items(C::kGates, kColumns);
  // arrays of no elements are no C++
  static constexpr int kStates = C::kStates ? C::kStates : 1, kSaved = C::kSaved ? C::kSaved : 1;
  static constexpr int kVectors = C::kVectors ? C::kVectors : 1;
  // Nobody waits for what a step stores, so it comes after what others wait for, if there are registers to keep it in till then.
  static constexpr bool kStoreLate = kItems <= 2;

 public:
  FASTSEQ_DEVICE explicit ForwardStep(const ForwardParams& p, gpu::Smem& smem)
      : p_(p), place_(p.split), engine_(p.split, p.meeting, place_, smem), items_(p.split, place_, p.walk.hidden),
        states_(smem.take<float>(C::kStates * p.split.chunks * kColumns * p.split.units())),
        vectors_(smem.take<float>(C::kVectors * p.split.units())), rows_(p.walk, p.split, place_, smem),
        arrived_(smem.take<gpu::Mbarrier>(2)) {}

  FASTSEQ_DEVICE void run() {
    load_weights();
    engine_.begin(arrived_);
    for (int chunk = 0; chunk < p_.split.chunks; ++chunk) load_states(chunk);
    gpu::cta_sync();
    const int steps = rows_.longest();
    for (int s = 0; s < steps; ++s) {
      engine_.publish(s + 1);
      if (kStoreLate && s > 0) store_all(p_.split.chunks - 1, rows_.time(s - 1));
      const int t = rows_.time(s);
      for (int chunk = 0; chunk < p_.split.chunks; ++chunk) {
        fetch(chunk, t);
        if (chunk == 0) engine_.wait(s + 1);
        engine_.product(chunk);
        step(chunk, t);
        if (kStoreLate && chunk + 1 < p_.split.chunks) store_all(chunk, t);
      }
      gpu::cta_sync();
    }
    if (kStoreLate && steps > 0) store_all(p_.split.chunks - 1, rows_.time(steps - 1));
    engine_.end();
    for (int chunk = 0; chunk < p_.split.chunks; ++chunk) store_states(chunk);
  }

 private:
  FASTSEQ_DEVICE void load_weights() {
    const int hidden = p_.walk.hidden, bits = p_.split.unit_bits, units = p_.split.units();
    const auto* weight = static_cast<const Number*>(p_.weight) + int64_t{place_.lane} * C::kGates * hidden * hidden;
    const int first = place_.rank * units;
    engine_.load([&](int row, int depth) {  // row: gate * U + unit
      const int gate = row >> bits, unit = first + (row & (units - 1));
      const bool inside = gate < C::kGates && unit < hidden && depth < hidden;
      return inside ? weight[(int64_t{gate} * hidden + unit) * hidden + depth] : Number{};
    });
    FASTSEQ_ROLLED
    for (int i = gpu::tid(); i < C::kVectors * units; i += kThreads) {
      const int unit = first + (i & (units - 1));
      const auto* vector = static_cast<const Number*>(p_.vectors) + (int64_t{place_.lane} * C::kVectors + (i >> bits)) * hidden;
      vectors_[i] = p_.vectors && unit < hidden ? gpu::to_float(vector[unit]) : 0.0f;
    }
  }

  FASTSEQ_DEVICE float& state(int chunk, int which, int j) {
    return states_[(chunk * C::kStates + which) * kColumns * p_.split.units() + items_.index(j)];
  }

  FASTSEQ_DEVICE int64_t place_of_state(int chunk, int j, int numbers, int which) const {
    const int64_t row = int64_t{place_.lane} * p_.walk.batch + rows_.batch_row(chunk, items_.column(j));
    return (row * numbers + which) * p_.walk.hidden + items_.hidden_unit(j);
  }

  FASTSEQ_DEVICE void load_states(int chunk) {
    FASTSEQ_ROLLED
    for (int j = 0; items_.exists(j); ++j) {
      const bool given = rows_.exists(chunk, items_.column(j)) && items_.has_unit(j);
      const auto* h0 = static_cast<const Number*>(p_.h0);
      engine_.own(chunk, items_.unit(j), items_.column(j)) = given && h0 ? h0[place_of_state(chunk, j, 1, 0)] : Number{};
      for (int k = 0; k < C::kStates; ++k) {
        state(chunk, k, j) = given && p_.c0 ? p_.c0[place_of_state(chunk, j, C::kStates, k)] : 0.0f;
      }
    }
  }

  FASTSEQ_DEVICE void store_states(int chunk) {
    FASTSEQ_ROLLED
    for (int j = 0; items_.exists(j); ++j) {
      if (!rows_.exists(chunk, items_.column(j)) || !items_.has_unit(j)) continue;
      static_cast<Number*>(p_.h_n)[place_of_state(chunk, j, 1, 0)] = engine_.own(chunk, items_.unit(j), items_.column(j));
      for (int k = 0; k < C::kStates; ++k) p_.c_n[place_of_state(chunk, j, C::kStates, k)] = state(chunk, k, j);
    }
  }

  FASTSEQ_DEVICE bool works(int chunk, int j, int t) const {
    return items_.exists(j) && rows_.active(chunk, items_.column(j), t) && items_.has_unit(j);
  }

  // Reads the input of a step ahead of the moment that needs it.
  FASTSEQ_DEVICE void fetch(int chunk, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!works(chunk, j, t)) continue;
      const int64_t row = rows_.row(chunk, items_.column(j), t);
      FASTSEQ_UNROLL
      for (int g = 0; g < C::kGates; ++g) {
        const int64_t at = place_of(p_.walk, row, place_.lane, C::kGates, g, items_.hidden_unit(j));
        x_[j][g] = static_cast<const Number*>(p_.x_gates)[at];
      }
    }
  }

  FASTSEQ_DEVICE void step(int chunk, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!works(chunk, j, t)) continue;
      const int unit = items_.unit(j), column = items_.column(j);
      float x[C::kGates], r[C::kGates], vectors[kVectors], c[kStates];
      FASTSEQ_UNROLL
      for (int g = 0; g < C::kGates; ++g) {
        x[g] = gpu::to_float(x_[j][g]);
        r[g] = engine_.sum(column, g * p_.split.units() + unit);
      }
      FASTSEQ_UNROLL
      for (int v = 0; v < C::kVectors; ++v) vectors[v] = vectors_[v * p_.split.units() + unit];
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) c[k] = state(chunk, k, j);
      Number& h = engine_.own(chunk, unit, column);
      float h_new;
      C::forward(x, r, vectors, gpu::to_float(h), c, saved_[j], h_new, c_[j]);
      h = y_[j] = gpu::from_float<Number>(h_new);
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) state(chunk, k, j) = c_[j][k];
      if (!kStoreLate) store(chunk, j, t);
    }
  }

  // Writes what the last step() found.
  FASTSEQ_DEVICE void store_all(int chunk, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (works(chunk, j, t)) store(chunk, j, t);
    }
  }

  FASTSEQ_DEVICE void store(int chunk, int j, int t) {
    const int64_t row = rows_.row(chunk, items_.column(j), t);
    const int unit = items_.hidden_unit(j);
    static_cast<Number*>(p_.y)[place_of(p_.walk, row, place_.lane, 1, 0, unit)] = y_[j];
    if (p_.c) {
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) p_.c[place_of(p_.walk, row, place_.lane, C::kStates, k, unit)] = c_[j][k];
    }
    if (p_.gates) {
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kSaved; ++k) {
        const int64_t at = place_of(p_.walk, row, place_.lane, C::kSaved, k, unit);
        static_cast<Number*>(p_.gates)[at] = gpu::from_float<Number>(saved_[j][k]);
      }
    }
  }

  const ForwardParams& p_;
  const Place place_;
  Engine_ engine_;
  const Items<kColumns> items_;
  float* states_;   // [chunks][K][items]
  float* vectors_;  // [V][U]
  const Rows<kColumns> rows_;
  gpu::Mbarrier* arrived_;
  // of the chunk in work
  Number x_[kItems][C::kGates];
  Number y_[kItems];
  float c_[kItems][kStates], saved_[kItems][kSaved];
};

template <template <class> class CellOf, class Tile, int kTiles>
FASTSEQ_KERNEL(kThreads) forward_kernel(FASTSEQ_PARAMETERS ForwardParams p) {
  gpu::Smem smem;
  ForwardStep<CellOf, Tile, kTiles>(p, smem).run();
}

}  // namespace fastseq::recurrent
