// Backward over a whole sequence in one launch: gradients of the gates, from which large products outside give those of the weights
// and of the input.
//
// A CTA owns the same units as in the forward pass. What reaches the states of its units is a sum over the gate gradients of its
// whole team, always in the same order: the CTA gathers those and multiplies them with its columns of the weights (all_gather.cuh),
// or it adds up the products that others have made of theirs with their rows (reduce_scatter.cuh).
#pragma once

#include "all_gather.cuh"
#include "quotient.h"
#include "reduce_scatter.cuh"
#include "step.cuh"

namespace fastseq::recurrent {

template <class C, class Engine>
class BackwardStep : Step<C, Engine, 1 + C::kStates> {
  using Base = Step<C, Engine, 1 + C::kStates>;
  using typename Base::Number;
  using Base::arrived_, Base::engine_, Base::items_, Base::cta_, Base::rows_, Base::split_, Base::vectors_, Base::walk_;
  using Base::has_state, Base::carried, Base::offset_in_row, Base::offset_of_state, Base::works;
  using Base::kItems, Base::kSaved, Base::kStates, Base::kVectors;

 public:
  FASTSEQ_DEVICE explicit BackwardStep(const BackwardParams& p, gpu::Smem& smem) : Base(p.walk, p.split, p.exchange, smem), p_(p) {}

  FASTSEQ_DEVICE void run() {
    load_weights();
    engine_.begin(arrived_);
    const int steps = rows_.longest();
    for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) load_gradients(batch_tile);
    for (int s = 0; s <= steps; ++s) {
      const int t = rows_.time(steps - 1 - s);
      for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) {
        if (s < steps) fetch(batch_tile, t);
        fetch_cuts(batch_tile, t);
        if (s > 0) {
          if (batch_tile == 0) engine_.wait(s);
          engine_.product(batch_tile);
          add_reached(batch_tile);
        }
        if (s < steps) step(batch_tile, t);
      }
      if (s == steps) break;
      gpu::cta_sync();
      engine_.publish(s + 1);
    }
    for (int batch_tile = 0; batch_tile < split_.batch_tiles; ++batch_tile) store_gradients(batch_tile);
  }

 private:
  // What is read of a step.
  struct Inputs {
    float dy, h, h_before, dc[kStates], c[kStates], c_before[kStates], saved[kSaved];
  };

  FASTSEQ_DEVICE void load_weights() {
    const int hidden = walk_.hidden, units = split_.units, first = cta_.rank * units;
    const Number* weight = this->weight_of(p_.weight);
    const Quotient per_units(units);
    engine_.load([&](int row, int depth) {
      int gate = per_units.of(depth), from = depth - gate * units, to = row;  // depth: gate * U + own unit; row: unit of the team
      bool inside = gate < C::kGates;
      if constexpr (Engine::kSendsSums) {
        from += first;
      } else {  // depth: (CTA * G + gate) * U + its unit; row: own unit
        const int sender = gate / C::kGates;
        gate %= C::kGates, from += sender * units, to += first, inside = row < units;
      }
      inside = inside && from < hidden && to < hidden;
      return inside ? weight[(int64_t{gate} * hidden + from) * hidden + to] : Number{};
    });
    this->load_vectors(p_.vectors);
  }

  // gradient of h (which = 0) or of a wide state
  FASTSEQ_DEVICE float& gradient(int batch_tile, int which, int j) { return carried(batch_tile, which, j); }

  FASTSEQ_DEVICE void load_gradients(int batch_tile) {
    FASTSEQ_ROLLED
    for (int j = 0; items_.exists(j); ++j) {
      const bool given = has_state(batch_tile, j);
      const auto* dh_n = static_cast<const Number*>(p_.dh_n);
      gradient(batch_tile, 0, j) = given && dh_n ? gpu::to_float(dh_n[offset_of_state(batch_tile, j, 1, 0)]) : 0.0f;
      for (int k = 0; k < C::kStates; ++k) {
        gradient(batch_tile, 1 + k, j) = given && p_.dc_n ? p_.dc_n[offset_of_state(batch_tile, j, C::kStates, k)] : 0.0f;
      }
    }
  }

  FASTSEQ_DEVICE void store_gradients(int batch_tile) {
    FASTSEQ_ROLLED
    for (int j = 0; items_.exists(j); ++j) {
      if (!has_state(batch_tile, j)) continue;
      static_cast<Number*>(p_.dh0)[offset_of_state(batch_tile, j, 1, 0)] = gpu::from_float<Number>(gradient(batch_tile, 0, j));
      for (int k = 0; k < C::kStates; ++k) p_.dc0[offset_of_state(batch_tile, j, C::kStates, k)] = gradient(batch_tile, 1 + k, j);
    }
  }

  // Reads what a step needs ahead of the moment that needs it.
  FASTSEQ_DEVICE void fetch(int batch_tile, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!works(batch_tile, j, t)) continue;
      const int column = items_.column(j), before = rows_.before(batch_tile, column, t);
      const int64_t row = rows_.row(batch_tile, column, t);
      const auto at = [&](int numbers, int which) { return offset_in_row(row, j, numbers, which); };
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
        const int64_t row_before = rows_.row(batch_tile, column, before);
        in.h_before = gpu::to_float(static_cast<const Number*>(p_.y)[offset_in_row(row_before, j, 1, 0)]);
        FASTSEQ_UNROLL
        for (int k = 0; k < C::kStates; ++k) in.c_before[k] = p_.c[offset_in_row(row_before, j, C::kStates, k)];
      } else {
        in.h_before = p_.h0 ? gpu::to_float(static_cast<const Number*>(p_.h0)[offset_of_state(batch_tile, j, 1, 0)]) : 0.0f;
        FASTSEQ_UNROLL
        for (int k = 0; k < C::kStates; ++k) in.c_before[k] = p_.c0 ? p_.c0[offset_of_state(batch_tile, j, C::kStates, k)] : 0.0f;
      }
    }
  }

  FASTSEQ_DEVICE void fetch_cuts(int batch_tile, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      const bool there = items_.exists(j) && items_.has_unit(j);
      cut_[j] = there ? rows_.cut(p_.resets.rows, batch_tile, items_.column(j), t) : uint8_t{0};
      cut_after_[j] = there ? rows_.cut(p_.resets.rows, batch_tile, items_.column(j), rows_.after(t)) : uint8_t{0};
    }
  }

  // The reset state gets a gradient, the step before nothing of it.
  FASTSEQ_DEVICE void cut_off(float& grad, float* sums, int64_t offset) {
    if (sums) sums[offset] += grad;
    grad = 0;
  }

  // Adds what the later step's gates say of h.
  FASTSEQ_DEVICE void add_reached(int batch_tile) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!items_.exists(j)) continue;
      float reached[1];
      engine_.sums(reached, items_.column(j), items_.unit(j));
      gradient(batch_tile, 0, j) += reached[0];
      if (cut_after_[j]) cut_off(gradient(batch_tile, 0, j), p_.resets.dh, offset_of_state(batch_tile, j, 1, 0));
    }
  }

  FASTSEQ_DEVICE void step(int batch_tile, int t) {
    FASTSEQ_UNROLL
    for (int j = 0; j < kItems; ++j) {
      if (!items_.exists(j)) continue;
      const int unit = items_.unit(j), column = items_.column(j);
      if (!works(batch_tile, j, t)) {
        FASTSEQ_UNROLL
        for (int g = 0; g < C::kGates; ++g) engine_.send(batch_tile, unit, column, g, Number{});
        continue;
      }
      Inputs& in = in_[j];
      if (cut_[j]) {
        const auto* h = static_cast<const Number*>(p_.resets.h);
        in.h_before = h ? gpu::to_float(h[offset_of_state(batch_tile, j, 1, 0)]) : 0.0f;
        FASTSEQ_UNROLL
        for (int k = 0; k < C::kStates; ++k) {
          in.c_before[k] = p_.resets.c ? p_.resets.c[offset_of_state(batch_tile, j, C::kStates, k)] : 0.0f;
        }
      }
      float vectors[kVectors], dc[kStates], dc_before[kStates], dx[C::kGates], dr[C::kGates], dh_direct;
      FASTSEQ_UNROLL
      for (int v = 0; v < C::kVectors; ++v) vectors[v] = vectors_[v * split_.units + unit];
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) dc[k] = gradient(batch_tile, 1 + k, j) + in.dc[k];
      C::backward(gradient(batch_tile, 0, j) + in.dy, dc, in.saved, vectors, in.h_before, in.c_before, in.h, in.c, dx, dr, dh_direct,
                  dc_before);
      gradient(batch_tile, 0, j) = dh_direct;
      FASTSEQ_UNROLL
      for (int k = 0; k < C::kStates; ++k) {
        gradient(batch_tile, 1 + k, j) = dc_before[k];
        if (cut_[j]) cut_off(gradient(batch_tile, 1 + k, j), p_.resets.dc, offset_of_state(batch_tile, j, C::kStates, k));
      }
      const int64_t row = rows_.row(batch_tile, column, t);
      FASTSEQ_UNROLL
      for (int g = 0; g < C::kGates; ++g) {
        const Number sent = gpu::from_float<Number>(dr[g]);
        engine_.send(batch_tile, unit, column, g, sent);
        static_cast<Number*>(p_.dgates)[offset_in_row(row, j, C::kGates, g)] = gpu::from_float<Number>(dx[g]);
        const int own = g - (C::kGates - C::kOwnRecurrent);
        if (own >= 0) static_cast<Number*>(p_.drecurrent)[offset_in_row(row, j, C::kOwnRecurrent, own)] = sent;
      }
    }
  }

  const BackwardParams& p_;
  // of the batch tile in work
  Inputs in_[kItems];
  uint8_t cut_[kItems], cut_after_[kItems];  // before this step, before the step after it
};

template <template <class> class CellOf, class Tile, int kNTiles>
FASTSEQ_KERNEL(kThreads) backward_kernel(FASTSEQ_PARAMETERS BackwardParams p) {
  using C = CellOf<Math<Tile::kExact>>;
  gpu::Smem smem;
  BackwardStep<C, AllGather<Tile, kNTiles, 1, C::kGates>>(p, smem).run();
}

template <template <class> class CellOf, class Tile>
FASTSEQ_KERNEL(kThreads) backward_reduce_scatter_kernel(FASTSEQ_PARAMETERS BackwardParams p) {
  using C = CellOf<Math<Tile::kExact>>;
  gpu::Smem smem;
  BackwardStep<C, ReduceScatter<Tile, C::kGates>>(p, smem).run();
}

}  // namespace fastseq::recurrent
