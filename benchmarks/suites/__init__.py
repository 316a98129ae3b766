"""The suites: which points are measured, and what their rows show. To add one is to list it here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..measure.case import Case, Options, Participant
from ..measure.results import Results
from ..providers import custom
from ..report.model import Figure, Section
from ..report.plots import heatmap, roofline
from . import (
    attention,
    attention_grid,
    cells,
    decode,
    distributed,
    limits,
    long_range,
    memory_use,
    models,
    recurrent,
    recurrent_gpu,
    recurrent_grid,
    resets,
    scan,
    sequential_vs_parallel,
    small_data,
    statements,
    systems,
    variable_length,
)


class Suite(Protocol):
    """A module in suites/ with these names."""

    NAME: str
    SUMMARY: str

    def plan(self, options: Options) -> list[Case]: ...

    def derive(self, results: Results) -> dict[str, Any]:
        """Figures that follow from the rows, JSON-able: fits, means, crossovers."""
        ...

    def present(self, results: Results) -> list[Section]: ...

    def picture(self, results: Results) -> Figure:
        """The suite in one figure, for a README."""
        ...


SUITES: dict[str, Suite] = {
    suite.NAME: suite
    for suite in (
        sequential_vs_parallel,
        recurrent,
        recurrent_grid,
        attention,
        attention_grid,
        cells,
        decode,
        variable_length,
        memory_use,
        long_range,
        small_data,
        scan,
        resets,
        statements,
        models,
        distributed,
        systems,
        limits,
    )
}
DEFAULT = sequential_vs_parallel.NAME


def plan(names: Sequence[str], options: Options) -> list[Case]:
    """The cases of these suites, with every provider that was added to them."""
    return [joined(case) for name in names for case in SUITES[name].plan(options)]


def joined(case: Case) -> Case:
    workloads = {p.provider: p.workload for p in case.participants}
    own = [(name, like) for name, like in custom.likes().items() if like in workloads]
    participants = tuple(Participant(name, workloads[like]) for name, like in own)
    return replace(case, participants=case.participants + participants, baseline=case.baseline + tuple(own))


def sections(results: Results) -> list[Section]:
    """What the suites of a run show, in the order of `SUITES`, each with its rooflines and maps."""
    found: list[Section] = []
    for name in sorted(results.suites(), key=list(SUITES).index):
        rows, of_suite = results.of_suite(name), SUITES[name].present(results)
        of_suite[0].figures += roofline.figures(rows) + heatmap.figures(rows, recurrent_gpu.ONE_LAYER)
        found += of_suite
    return found


def derive(results: Results) -> dict[str, Any]:
    """By suite, the figures that follow from its rows."""
    return {name: SUITES[name].derive(results) for name in results.suites()}
