"""The suites: modules with the names of presentation.Suite. To add one is to list it here."""

from __future__ import annotations

from types import ModuleType

from . import attention, cells, recurrent, sequential_vs_parallel

SUITES: dict[str, ModuleType] = {suite.NAME: suite for suite in (sequential_vs_parallel, recurrent, cells, attention)}
DEFAULT = sequential_vs_parallel.NAME
