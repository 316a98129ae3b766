// Forward over a whole sequence in one launch, the recurrent weights on the chip: "Persistent RNNs: stashing recurrent weights on-chip"
// (Diamos et al., ICML 2016). FlashRNN (arXiv 2412.07752) is related work. docs/design/recurrence-on-a-gpu.md has the loop in ten lines.
#pragma once

#include "all_gather.cuh"
#include "quotient.h"
#include "step.cuh"

namespace fastseq::recurrent {

template <class C, class Tile, int kNTiles>
class ForwardStep : Step<C, AllGather<Tile, kNTiles, C::kGates, 1>, C::kStates> {
  using Base = Step<C, AllGather<Tile, kNTiles, C::kGates, 1>, C::kStates>;
  using typename Base::Number;
  using Base::arrived_, Base::engine_, Base::items_, Base::cta_, Base::rows_, Base::split_, Base::vectors_, Base::walk_;
  using Base::has_state, Base::carried, Base::offset_in_row, Base::offset_of_state, Base::works;
  using Base::kItems, Base::kSaved, Base::kStates, Base::kVectors;
  // Nobody waits for what a step stores, so it comes after what others wait for: of as many items as there are registers for.
  static constexpr int kLate = kItems <= 2 ? 1 : 0;

 public:
  FASTSEQ_DEVICE explicit ForwardStep(const ForwardParams& p, gpu::Smem& smem) : Base(p.walk, p.split, p.exchange, smem), p_(p) {}

  FASTSEQ_DEVICE void run() {
    load_weights();
    engine_.begin(arrived_);
    for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) load_states(batch_tile);
    gpu::cta_sync();
    const int steps = rows_.longest();
    for (int s = 0; s < steps; ++s) {
      engine_.publish(s + 1);
      if (s > 0) store_late(split_.batch_tiles - 1, rows_.time(s - 1));
      const int t = rows_.time(s);
      for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) {
        fetch(batch_tile, t);
        if (batch_tile == 0) engine_.wait(s + 1);
        engine_.product(batch_tile);
        step(batch_tile, t);
        if (batch_tile + 1 < split_.batch_tiles) store_late(batch_tile, t);
      }
      gpu::cta_sync();
    }
    if (steps > 0) store_late(split_.batch_tiles - 1, rows_.time(steps - 1));
    for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) store_states(batch_tile);
  }

 private:
  FASTSEQ_DEVICE void load_weights() {
    const int hidden = walk_.hidden, units = split_.units, first = cta_.rank * units;
    const Number* weight = this->weight_of(p_.weight);
    const Quotient per_units(units);
    engine_.load([&](int row, int depth) {  // row: gate * U + unit
      const int gate = per_units.of(row), unit = first + row - gate * units;
      const bool inside = gate < C::kGates && unit < hidden && depth < hidden;
      return inside ? weight[(int64_t{gate} * hidden + unit) * hidden + depth] : Number{};
    });
    this->load_vectors(p_.vectors);
  }

  FASTSEQ_DEVICE void load_states(int batch_tile) {
    FASTSEQ_ROLLED
    for (int j = 0; items_.exists(j); ++j) {
      const bool given = has_state(batch_tile, j);
      const auto* h0 = static_cast<const Number*>(p_.h0);
      engine_.own(batch_tile, items_.unit(j), items_.column(j)) = given && h0 ? h0[offset_of_state(batch_tile, j, 1, 0)] : Number{};
      for (int k = 0; k < C::kStates; ++k) {
        carried(batch_tile, k, j) = given && p_.c0 ? p_.c0[offset_of_state(batch_tile, j, C::kStates, k)] : 0.0f;
      }
      if (given && rows_.cut(p_.resets.rows, batch_tile, items_.column(j), rows_.time(0))) begin_anew(batch_tile, j);
    }
  }

  FASTSEQ_DEVICE void begin_anew(int batch_tile, int j) {
    const auto* h = static_cast<const Number*>(p_.resets.h);
    engine_.own(batch_tile, items_.unit(j), items_.column(j)) = h ? h[offset_of_state(batch_tile, j, 1, 0)] : Number{};
    for (int k = 0; k < C::kStates; ++k) {
      carried(batch_tile, k, j) = p_.resets.c ? p_.resets.c[offset_of_state(batch_tile, j, C::kStates, k)] : 0.0f;
    }
  }

  FASTSEQ_DEVICE void store_states(int batch_tile) {
    FASTSEQ_ROLLED
    for (int j = 0; items_.exists(j); ++j) {
      if (!has_state(batch_tile, j)) continue;
      static_cast<Number*>(p_.h_n)[offset_of_state(batch_tile, j, 1, 0)] = engine_.own(batch_tile, items_.unit(j), items_.column(j));
      for (int k = 0; k < C::kStates; ++k) p_.c_n[offset_of_state(batch_tile, j, C::kStates, k)] = carried(batch_tile, k, j);
    }
  }

  // Reads the input of a step ahead of the moment that needs it.
  FASTSEQ_DEVICE void fetch(int batch_tile, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!works(batch_tile, j, t)) continue;
      const int64_t row = rows_.row(batch_tile, items_.column(j), t);
      FASTSEQ_UNROLL
      for (int g = 0; g < C::kGates; ++g) x_[j][g] = static_cast<const Number*>(p_.x_gates)[offset_in_row(row, j, C::kGates, g)];
      cut_[j] = rows_.cut(p_.resets.rows, batch_tile, items_.column(j), rows_.after(t));
    }
  }

  FASTSEQ_DEVICE void step(int batch_tile, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!works(batch_tile, j, t)) continue;
      const int unit = items_.unit(j), column = items_.column(j);
      float x[C::kGates], r[C::kGates], vectors[kVectors], c[kStates];
      engine_.sums(r, column, unit);
      FASTSEQ_UNROLL
      for (int g = 0; g < C::kGates; ++g) x[g] = gpu::to_float(x_[j][g]);
      FASTSEQ_UNROLL
      for (int v = 0; v < C::kVectors; ++v) vectors[v] = vectors_[v * split_.units + unit];
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) c[k] = carried(batch_tile, k, j);
      Number& h = engine_.own(batch_tile, unit, column);
      float h_new;
      C::forward(x, r, vectors, gpu::to_float(h), c, saved_[j], h_new, c_[j]);
      h = y_[j] = gpu::from_float<Number>(h_new);
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) carried(batch_tile, k, j) = c_[j][k];
      if (cut_[j]) begin_anew(batch_tile, j);
      if (j >= kLate) store(batch_tile, j, t);
    }
  }

  // Writes what the last step() found and did not store.
  FASTSEQ_DEVICE void store_late(int batch_tile, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kLate; ++j) {
      if (works(batch_tile, j, t)) store(batch_tile, j, t);
    }
  }

  FASTSEQ_DEVICE void store(int batch_tile, int j, int t) {
    const int64_t row = rows_.row(batch_tile, items_.column(j), t);
    static_cast<Number*>(p_.y)[offset_in_row(row, j, 1, 0)] = y_[j];
    if (p_.c) {
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) p_.c[offset_in_row(row, j, C::kStates, k)] = c_[j][k];
    }
    if (p_.gates) {
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kSaved; ++k) {
        static_cast<Number*>(p_.gates)[offset_in_row(row, j, C::kSaved, k)] = gpu::from_float<Number>(saved_[j][k]);
      }
    }
  }

  const ForwardParams& p_;
  // of the batch tile in work
  Number x_[kItems][C::kGates];
  Number y_[kItems];
  float c_[kItems][kStates], saved_[kItems][kSaved];
  uint8_t cut_[kItems];  // before the next step
};

template <template <class> class CellOf, class Tile, int kNTiles>
FASTSEQ_KERNEL(kThreads) forward_kernel(FASTSEQ_PARAMETERS ForwardParams p) {
  gpu::Smem smem;
  ForwardStep<CellOf<Math<Tile::kExact>>, Tile, kNTiles>(p, smem).run();
}

}  // namespace fastseq::recurrent
