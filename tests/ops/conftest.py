"""Spreads a battery's tests over its cases, dtypes and the backends of this machine that support them."""

from __future__ import annotations

import itertools

import pytest
import torch

from support.battery import OpBattery
from support.cases import SMALL_RECURRENT_CASES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    battery = metafunc.cls
    if battery is None or not issubclass(battery, OpBattery):
        return
    values = {
        "case": battery.CASES,
        "small_case": battery.SMALL_CASES,
        "compiled_case": battery.COMPILED_CASES,
        "dtype": battery.DTYPES,
        "backend": battery.backends(),
    }
    names = [name for name in values if name in metafunc.fixturenames]
    if not names:
        return
    rows = list(itertools.product(*(values[name] for name in names)))
    if "backend" in names and {"case", "small_case"} & set(names):
        rows = [row for row in rows if _supported(battery(), dict(zip(names, row, strict=True)))]
    metafunc.parametrize(
        names,
        [pytest.param(*row, marks=_marks(metafunc, dict(zip(names, row, strict=True)))) for row in rows],
        ids=["-".join(str(value).removeprefix("torch.") for value in row) for row in rows],
    )


# What a forward and a backward pass in the interpreter are repeated for, so seldom.
_REPEATED = {
    "test_gradcheck": ("grouped",),
    "test_opcheck": ("grouped", "sinks-dead", str(SMALL_RECURRENT_CASES[0])),
    "test_rerun_is_bit_equal": ("grouped", str(SMALL_RECURRENT_CASES[0])),
}


def _marks(metafunc: pytest.Metafunc, row: dict) -> list[pytest.MarkDecorator]:
    """Triton's interpreter takes seconds where other backends take milliseconds: the usual run tries every case in fp32, once,
    and the small ones in bf16."""
    if row.get("backend") == "cuda-host" and metafunc.function.__name__ == "test_beyond_65535_steps":
        return [pytest.mark.slow]
    if row.get("backend") != "triton":
        return []
    case = row.get("case", row.get("small_case"))
    usual = _REPEATED.get(metafunc.function.__name__)
    if getattr(case, "heads", 1) == 40:  # 80 lanes; how lanes are shared among ops is no affair of a backend
        return [pytest.mark.slow]
    if getattr(case, "steps", 0) == 70:  # seven chunks where three are tried as well
        return [pytest.mark.slow]
    often = usual is None or str(case).removesuffix("-heads") in usual
    dtype = row.get("dtype", torch.float32)
    in_bfloat16 = dtype == torch.bfloat16 and usual is None and case in metafunc.cls.SMALL_CASES
    return [] if often and (dtype == torch.float32 or in_bfloat16) else [pytest.mark.slow]


def _supported(battery: OpBattery, row: dict) -> bool:
    case = row.get("case", row.get("small_case"))
    return battery.supports(case, row.get("dtype", torch.float64), row["backend"])
