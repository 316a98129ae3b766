"""The modules are tested on fastseq's kernels, though their calls are as short as those that go to torch's otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastseq.backends.torch import limits


@pytest.fixture(autouse=True)
def short_calls_are_ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What goes to torch's kernels is tested in tests/backends/test_torch.py."""
    none = limits.Steps(0, 0)
    for cell in limits._STEPS:
        monkeypatch.setitem(limits._STEPS, cell, ((none,) * 3,) * 2)
    monkeypatch.setattr(limits, "FAST_PATH", {True: 0, False: 0})
    monkeypatch.setattr(limits, "_KEYS_WITH_WEIGHTS", 0)
    yield
