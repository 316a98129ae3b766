from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from support.ranks import Pool


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on ranks run on one worker: another one would start processes of its own."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Processes that stay for all tests of this folder."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    pool = Pool()
    yield pool
    pool.close()
