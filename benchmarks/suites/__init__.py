"""The suites. A suite is a module with the names of presentation.Suite; listing it here is all it takes to
add one.
"""

from __future__ import annotations

from types import ModuleType

from . import recurrent, sequential_vs_parallel

SUITES: dict[str, ModuleType] = {suite.NAME: suite for suite in (sequential_vs_parallel, recurrent)}
DEFAULT = sequential_vs_parallel.NAME
