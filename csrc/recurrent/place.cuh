// The place of a CTA among those of a launch.
#pragma once

#include "../common/prims.cuh"
#include "params.h"

namespace fastseq::recurrent {

struct Place {
  int team, rank, lane, part;

  FASTSEQ_DEVICE explicit Place(const Split& s)
      : team(s.first_team + gpu::bid() / s.ctas), rank(gpu::bid() % s.ctas), lane(team / s.parts), part(team % s.parts) {}
};

}  // namespace fastseq::recurrent
