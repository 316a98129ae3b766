"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastseq

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def names(block: str) -> dict[str, Any]:
    """What a block takes for granted."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "fastseq": fastseq,
        "torch": torch,
        "model": nn.LSTM(128, 8, batch_first=True),
        "x": torch.randn(2, 12, 128),
        "lengths": torch.tensor([12, 7]),
        "starts": torch.rand(2, 12) < 0.2,
        "q": torch.randn(2, 4, 12, 8),
        "k": torch.randn(2, 2, 12, 8),
        "v": torch.randn(2, 2, 12, 8),
        "slopes": torch.rand(4),
    }
    return given


def test_there_is_a_quick_start():
    assert len(BLOCKS) >= 1 and len(BLOCKS[0].strip().splitlines()) <= 16


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0][:50])
def test_block_runs(block):
    given = names(block)
    exec(compile(block, str(README), "exec"), given)
    assert isinstance(given["model"], fastseq.LSTM) and len(given["report"]) == 1


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 140
