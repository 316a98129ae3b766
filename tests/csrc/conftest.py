"""What tests of this folder share: programs, skipped where no compiler is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.triton_gate import loaded

build = loaded(Path(__file__).with_name("host_build.py"))


def host_program(name: str, sanitizer: str = "plain", *others: str, **where) -> Path:
    try:
        return build.host_program(name, sanitizer, *others, **where)
    except build.Unavailable as reason:
        pytest.skip(str(reason))


def gpu_program(name: str, capability: tuple[int, int], *flags: str) -> Path:
    try:
        return build.gpu_program(name, capability, *flags)
    except build.Unavailable as reason:
        pytest.skip(str(reason))
