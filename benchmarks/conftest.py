"""`pytest benchmarks/`: operator benchmarks. `--benchmark-disable` runs each of them once, as a test."""

from __future__ import annotations

from typing import Any

import pytest

from fastseq.benchmarks import environment
from fastseq.benchmarks.cli import device_of


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastseq"] = environment.collect(device_of("auto"))


@pytest.fixture(scope="session")
def device() -> str:
    """The device that `python -m fastseq bench` would use."""
    return device_of("auto")
