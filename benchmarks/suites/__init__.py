"""The suites: modules with the names of presentation.Suite. To add one is to list it here."""

from __future__ import annotations

from types import ModuleType

from . import (
    attention,
    cells,
    decode,
    limits,
    long_range,
    memory_use,
    models,
    recurrent,
    sequential_vs_parallel,
    small_data,
    statements,
    variable_length,
)

SUITES: dict[str, ModuleType] = {
    suite.NAME: suite
    for suite in (
        sequential_vs_parallel,
        recurrent,
        attention,
        cells,
        decode,
        variable_length,
        memory_use,
        long_range,
        small_data,
        statements,
        models,
        limits,
    )
}
DEFAULT = sequential_vs_parallel.NAME
