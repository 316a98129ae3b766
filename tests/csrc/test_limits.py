"""The kernels that measure barriers and hand-offs: every CTA counts the steps in what the others send it."""

from __future__ import annotations

import pytest
import torch

from support import cuda_host

pytestmark = pytest.mark.skipif(cuda_host.available() is not None, reason=str(cuda_host.available()))
STEPS, SEEDS = 9, 12


@pytest.mark.parametrize(("ctas", "vectors"), ((4, 32), (3, 5), (1, 1)))
@pytest.mark.parametrize("kind", ("grid barrier", "cluster barrier", "grid hand-off", "cluster hand-off"))
def test_every_cta_sees_every_step(kind, ctas, vectors):
    host = cuda_host.kernels()
    operands = torch.full((32 * ctas * vectors,), 255, dtype=torch.uint8)
    for seed in range(SEEDS):
        host.seed(seed)
        flags, results = torch.zeros(ctas, dtype=torch.int32), torch.full((ctas,), -1, dtype=torch.int32)
        host.exchange(kind, STEPS, ctas, vectors, flags.data_ptr(), operands.data_ptr(), results.data_ptr())
        assert results.tolist() == [STEPS] * ctas
    host.seed(0)


def test_another_kind_is_refused():
    with pytest.raises(RuntimeError, match="no such exchange"):
        cuda_host.kernels().exchange("stroll", 1, 1, 1, 0, 0, 0)
