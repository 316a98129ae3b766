"""The modules are tested on fastseq's kernels, though their calls are as short as those that go to torch's otherwise."""

from __future__ import annotations

import pytest

from fastseq.backends.torch import limits


@pytest.fixture(autouse=True)
def short_attention_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to torch's kernels is tested in tests/backends/test_torch.py."""
    monkeypatch.setattr(limits, "FAST_PATH", {True: 0, False: 0})
    monkeypatch.setattr(limits, "_KEYS_WITH_WEIGHTS", 0)
