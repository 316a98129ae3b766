// Backward over a whole sequence in one launch: gradients of the gates, from which large products outside give those of the weights
// and of the input.
//
// A CTA owns the same units as in the forward pass, but columns of the weights instead of rows: it gathers the gate gradients of its
// whole team and sums what reaches the states of its units, always in the same order.
#pragma once

#include "engine.cuh"
#include "items.cuh"
#include "math.cuh"

namespace fastseq::recurrent {

template <template <class> class CellOf, class Tile, int kTiles>
class BackwardStep {
  using C = CellOf<Math<Tile::kExact>>;
  using Number = typename Tile::Number;
  using Engine_ = Engine<Tile, kTiles, 1, C::kGates>;
  static constexpr int kColumns = Engine_::kColumns;
  static constexpr int kItems = most_items(C::kGates, kColumns);
  static constexpr int kStates = C::kStates ? C::kStates : 1, kSaved = C::kSaved ? C::kSaved : 1;
  static constexpr int kVectors = C::kVectors ? C::kVectors : 1;

 public:
  FASTSEQ_DEVICE explicit BackwardStep(const BackwardParams& p, gpu::Smem& smem)
      : p_(p), place_(p.split), engine_(p.split, p.meeting, place_, smem), items_(p.split, place_, p.walk.hidden),
        states_(smem.take<float>((1 + C::kStates) * p.split.chunks * kColumns * p.split.units())),
        vectors_(smem.take<float>(C::kVectors * p.split.units())), rows_(p.walk, p.split, place_, smem),
        arrived_(smem.take<gpu::Mbarrier>(2)) {}

  FASTSEQ_DEVICE void run() {
    load_weights();
    engine_.begin(arrived_);
    const int steps = rows_.longest();
    for (int chunk = 0; chunk < p_.split.chunks; ++chunk) load_gradients(chunk);
    for (int s = 0; s <= steps; ++s) {
      const int t = rows_.time(steps - 1 - s);
      for (int chunk = 0; chunk < p_.split.chunks; ++chunk) {
        if (s < steps) fetch(chunk, t);
        if (s > 0) {
          if (chunk == 0) engine_.wait(s);
          engine_.product(chunk);
          gather(chunk);
        }
        if (s < steps) step(chunk, t);
      }
      if (s == steps) break;
      gpu::cta_sync();
      engine_.publish(s + 1);
    }
    engine_.end();
    for (int chunk = 0; chunk < p_.split.chunks; ++chunk) store_gradients(chunk);
  }

 private:
  // What is read of a step.
  struct Inputs {
    float dy, h, h_before, dc[kStates], c[kStates], c_before[kStates], saved[kSaved];
  };

  FASTSEQ_DEVICE void load_weights() {
    const int hidden = p_.walk.hidden, bits = p_.split.unit_bits, units = p_.split.units();
    const auto* weight = static_cast<const Number*>(p_.weight) + int64_t{place_.lane} * C::kGates * hidden * hidden;
    const int first = place_.rank * units;
    engine_.load([&](int row, int depth) {  // row: own unit; depth: (CTA * G + gate) * U + its unit
      const int sender = (depth >> bits) / C::kGates, gate = (depth >> bits) % C::kGates;
      const int from = (sender << bits) + (depth & (units - 1)), to = first + row;
      const bool inside = row < units && from < hidden && to < hidden;
      return inside ? weight[(int64_t{gate} * hidden + from) * hidden + to] : Number{};
    });
    FASTSEQ_ROLLED
    for (int i = gpu::tid(); i < C::kVectors * units; i += kThreads) {
      const int unit = first + (i & (units - 1));
      const auto* vector = static_cast<const Number*>(p_.vectors) + (int64_t{place_.lane} * C::kVectors + (i >> bits)) * hidden;
      vectors_[i] = p_.vectors && unit < hidden ? gpu::to_float(vector[unit]) : 0.0f;
    }
  }

  // gradient of h (which = 0) or of a wide state
  FASTSEQ_DEVICE float& gradient(int chunk, int which, int j) {
    return states_[(chunk * (1 + C::kStates) + which) * kColumns * p_.split.units() + items_.index(j)];
  }

  FASTSEQ_DEVICE int64_t place_of_state(int chunk, int j, int numbers, int which) const {
    const int64_t row = int64_t{place_.lane} * p_.walk.batch + rows_.batch_row(chunk, items_.column(j));
    return (row * numbers + which) * p_.walk.hidden + items_.hidden_unit(j);
  }

  FASTSEQ_DEVICE void load_gradients(int chunk) {
    FASTSEQ_ROLLED
    for (int j = 0; items_.exists(j); ++j) {
      const bool given = rows_.exists(chunk, items_.column(j)) && items_.has_unit(j);
      const auto* dh_n = static_cast<const Number*>(p_.dh_n);
      gradient(chunk, 0, j) = given && dh_n ? gpu::to_float(dh_n[place_of_state(chunk, j, 1, 0)]) : 0.0f;
      for (int k = 0; k < C::kStates; ++k) {
        gradient(chunk, 1 + k, j) = given && p_.dc_n ? p_.dc_n[place_of_state(chunk, j, C::kStates, k)] : 0.0f;
      }
    }
  }

  FASTSEQ_DEVICE void store_gradients(int chunk) {
    FASTSEQ_ROLLED
    for (int j = 0; items_.exists(j); ++j) {
      if (!rows_.exists(chunk, items_.column(j)) || !items_.has_unit(j)) continue;
      static_cast<Number*>(p_.dh0)[place_of_state(chunk, j, 1, 0)] = gpu::from_float<Number>(gradient(chunk, 0, j));
      for (int k = 0; k < C::kStates; ++k) p_.dc0[place_of_state(chunk, j, C::kStates, k)] = gradient(chunk, 1 + k, j);
    }
  }

  FASTSEQ_DEVICE bool works(int chunk, int j, int t) const {
    return items_.exists(j) && rows_.active(chunk, items_.column(j), t) && items_.has_unit(j);
  }

  // Reads what a step needs ahead of the moment that needs it.
  FASTSEQ_DEVICE void fetch(int chunk, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!works(chunk, j, t)) continue;
      const int column = items_.column(j), unit = items_.hidden_unit(j), before = rows_.before(chunk, column, t);
      const int64_t row = rows_.row(chunk, column, t);
      const auto at = [&](int numbers, int which) { return place_of(p_.walk, row, place_.lane, numbers, which, unit); };
      Inputs& in = in_[j];
      in.dy = p_.dy ? gpu::to_float(static_cast<const Number*>(p_.dy)[at(1, 0)]) : 0.0f;
      in.h = gpu::to_float(static_cast<const Number*>(p_.y)[at(1, 0)]);
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kSaved; ++k) in.saved[k] = gpu::to_float(static_cast<const Number*>(p_.gates)[at(C::kSaved, k)]);
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) {
        in.dc[k] = p_.dc ? p_.dc[at(C::kStates, k)] : 0.0f;
        in.c[k] = p_.c[at(C::kStates, k)];
      }
      if (before >= 0) {
        const int64_t row_before = rows_.row(chunk, column, before);
        in.h_before = gpu::to_float(static_cast<const Number*>(p_.y)[place_of(p_.walk, row_before, place_.lane, 1, 0, unit)]);
        FASTSEQ_UNROLL
        for (int k = 0; k < C::kStates; ++k) in.c_before[k] = p_.c[place_of(p_.walk, row_before, place_.lane, C::kStates, k, unit)];
      } else {
        in.h_before = p_.h0 ? gpu::to_float(static_cast<const Number*>(p_.h0)[place_of_state(chunk, j, 1, 0)]) : 0.0f;
        FASTSEQ_UNROLL
        for (int k = 0; k < C::kStates; ++k) in.c_before[k] = p_.c0 ? p_.c0[place_of_state(chunk, j, C::kStates, k)] : 0.0f;
      }
    }
  }

  // Adds what the later step's gates say of h.
  FASTSEQ_DEVICE void gather(int chunk) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (items_.exists(j)) gradient(chunk, 0, j) += engine_.sum(items_.column(j), items_.unit(j));
    }
  }

  FASTSEQ_DEVICE void step(int chunk, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!items_.exists(j)) continue;
      const int unit = items_.unit(j), column = items_.column(j);
      if (!works(chunk, j, t)) {
        FASTSEQ_UNROLL
        for (int g = 0; g < C::kGates; ++g) engine_.own(chunk, unit, column, g) = Number{};
        continue;
      }
      const Inputs& in = in_[j];
      float vectors[kVectors], dc[kStates], dc_before[kStates], dx[C::kGates], dr[C::kGates], dh_direct;
      FASTSEQ_UNROLL
      for (int v = 0; v < C::kVectors; ++v) vectors[v] = vectors_[v * p_.split.units() + unit];
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) dc[k] = gradient(chunk, 1 + k, j) + in.dc[k];
      C::backward(gradient(chunk, 0, j) + in.dy, dc, in.saved, vectors, in.h_before, in.c_before, in.h, in.c, dx, dr, dh_direct, dc_before);
      gradient(chunk, 0, j) = dh_direct;
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) gradient(chunk, 1 + k, j) = dc_before[k];
      const int64_t row = rows_.row(chunk, column, t);
      FASTSEQ_UNROLL
      for (int g = 0; g < C::kGates; ++g) {
        const Number sent = gpu::from_float<Number>(dr[g]);
        engine_.own(chunk, unit, column, g) = sent;
        const int64_t at = place_of(p_.walk, row, place_.lane, C::kGates, g, items_.hidden_unit(j));
        static_cast<Number*>(p_.dgates)[at] = gpu::from_float<Number>(dx[g]);
        const int own = g - (C::kGates - C::kOwnRecurrent);
        if (own >= 0) {
          const int64_t there = place_of(p_.walk, row, place_.lane, C::kOwnRecurrent, own, items_.hidden_unit(j));
          static_cast<Number*>(p_.drecurrent)[there] = sent;
        }
      }
    }
  }

  const BackwardParams& p_;
  const Place place_;
  Engine_ engine_;
  const Items<kColumns> items_;
  float* states_;   // [chunks][1 + K][items]
  float* vectors_;  // [V][U]
  const Rows<kColumns> rows_;
  gpu::Mbarrier* arrived_;
  Inputs in_[kItems];  // of the chunk in work
};

template <template <class> class CellOf, class Tile, int kTiles>
FASTSEQ_KERNEL(kThreads) backward_kernel(FASTSEQ_PARAMETERS BackwardParams p) {
  gpu::Smem smem;
  BackwardStep<CellOf, Tile, kTiles>(p, smem).run();
}

}  // namespace fastseq::recurrent
