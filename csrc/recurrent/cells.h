// The cells that CUDA kernels exist for: one row each, X(struct in cells/, name of the cell in Python).
#pragma once

#include <cstdint>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"

#define FASTSEQ_CUDA_CELLS(X) \
  X(RnnTanh, "rnn_tanh")      \
  X(RnnRelu, "rnn_relu")      \
  X(Lstm, "lstm")             \
  X(Gru, "gru")

namespace fastseq::recurrent {

enum class Cell : int32_t {
#define FASTSEQ_CELL(type, name) k##type,
  FASTSEQ_CUDA_CELLS(FASTSEQ_CELL)
#undef FASTSEQ_CELL
};

// Numbers per hidden unit.
struct CellFacts {
  int gates, states, saved, vectors, own_recurrent;
};

inline CellFacts facts_of(Cell cell) {
  struct NoMath {
    using V = float;
  };
  switch (cell) {
#define FASTSEQ_CELL(type, name)                                                                                         \
  case Cell::k##type:                                                                                                    \
    return {type<NoMath>::kGates, type<NoMath>::kStates, type<NoMath>::kSaved, type<NoMath>::kVectors, type<NoMath>::kOwnRecurrent};
    FASTSEQ_CUDA_CELLS(FASTSEQ_CELL)
#undef FASTSEQ_CELL
  }
  return {};
}

}  // namespace fastseq::recurrent
