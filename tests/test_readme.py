"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_is_a_quick_start():
    assert len(BLOCKS) >= 1 and len(BLOCKS[0].strip().splitlines()) <= 16


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0][:50])
def test_block_runs(block):
    torch.manual_seed(0)
    given: dict[str, Any] = {}  # it takes nothing for granted
    exec(compile(block, str(README), "exec"), given)
    assert isinstance(given["model"], fastseq.LSTM)


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 140
