"""Spreads a battery's tests over its cases, dtypes and the backends of this machine."""

from __future__ import annotations

import pytest

from fastseq import backends
from fastseq.testing.battery import OpBattery


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    battery = metafunc.cls
    if battery is None or not issubclass(battery, OpBattery):
        return
    for fixture, values in (
        ("case", battery.CASES),
        ("small_case", battery.SMALL_CASES),
        ("compiled_case", battery.COMPILED_CASES),
        ("dtype", battery.DTYPES),
    ):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, values, ids=str)
    if "backend" in metafunc.fixturenames:
        able = [name for name, module in backends.BACKENDS.items() if "cpu" in module.devices or "any" in module.devices]
        metafunc.parametrize("backend", [name for name in able if backends.BACKENDS[name].ops])
