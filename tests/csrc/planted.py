"""Faults that are planted into the sources of the CPU kernels, for the programs that cpu_build.py makes of them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.triton_gate import loaded

from .conftest import build

cpu = loaded(Path(__file__).with_name("cpu_build.py"))
WRONG, LEFT = "wrong result", "exit status -11"


def program(level: str, cases: tuple[str, ...], *flags: str, **where) -> Path:
    if level not in cpu.levels():
        pytest.skip(f"this processor has no {level}")
    try:
        return cpu.program(level, cases, *flags, **where)
    except build.Unavailable as reason:
        pytest.skip(str(reason))


@dataclass(frozen=True)
class Fault:
    """Some words of a file, found there once, are replaced by others; a pattern is then in what the program says."""

    name: str
    file: str
    old: str
    new: str
    seen: str
    sanitizer: str = "plain"
    level: str = "avx2"
    cases: tuple[str, ...] = ("X(float, LayerNormLstm)",)


def expect(fault: Fault, tmp_path: Path) -> None:
    """That a program made of sources with the fault tells it."""
    for folder in ("csrc/cpu", "csrc/recurrent/cells", "csrc/common", "tests/csrc"):
        shutil.copytree(build.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "emulator"))
    file = tmp_path / "csrc/cpu" / fault.file
    text = file.read_text()
    assert text.count(fault.old) == 1
    file.write_text(text.replace(fault.old, fault.new))
    path = program(fault.level, fault.cases, *cpu.SANITIZERS[fault.sanitizer], tree=tmp_path)
    assert re.search(fault.seen, cpu.failure(path))
