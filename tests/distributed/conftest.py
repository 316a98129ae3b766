from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from support.ranks import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Processes that stay for all tests of this folder."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    pool = Pool()
    yield pool
    pool.close()
