// Which part of the work a CTA does, among those of a launch.
#pragma once

#include "../common/prims.cuh"
#include "params.h"

namespace fastseq::recurrent {

struct CtaCoords {
  int team, rank;  // of the whole call; in its team
  int lane, part;  // of the team: its lane, its part of the batch

  FASTSEQ_DEVICE explicit CtaCoords(const Split& s)
      : team(s.first_team + gpu::bid() / s.ctas), rank(gpu::bid() % s.ctas), lane(team / s.parts), part(team % s.parts) {}
};

}  // namespace fastseq::recurrent
