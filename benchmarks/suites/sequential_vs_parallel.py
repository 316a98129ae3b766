"""Sequential against parallel: what recurrence costs against attention as the sequence grows."""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.environment import where
from ..measure.results import DOUBTFUL, Results, Row, reliable
from ..measure.timing import Effort
from ..providers.base import PROVIDERS
from ..providers.linear import LINEAR_PROVIDERS
from ..providers.recurrent import RECURRENT_PROVIDERS, forced_name
from ..report.model import (
    BYTE_UNITS,
    TIME_UNITS,
    Card,
    Cell,
    Figure,
    Section,
    Table,
    bytes_text,
    curve_of,
    power,
    ratio_cell,
    tick_text,
    time_cell,
    time_text,
)
from ..report.plots.style import end_labels, log_axes
from ..report.statistics import Crossover, crossover, power_law
from ..workloads.base import MODES, Workload
from ..workloads.linear import LinearWorkload

NAME = "sequential-vs-parallel"
SUMMARY = "time and memory against T: LSTM and GRU (eager loop, torch, fastseq), minGRU, attention (naive, fused, fastseq)"

CUDA_KERNELS = {cell: forced_name(cell, "cuda") for cell in ("LSTM", "GRU")}  # no choice of fastseq's own yet
RECURRENT = ("eager LSTMCell loop", "torch.nn.LSTM", "torch.nn.GRU", "fastseq.LSTM", "fastseq.GRU", *CUDA_KERNELS.values())
LINEAR = ("fastseq.MinGRU",)  # recurrence that is parallel in time
PARALLEL = ("naive attention", "fused attention", "fastseq attention", "attention block")
EVERY = RECURRENT + LINEAR + PARALLEL
BASELINE = {
    "eager LSTMCell loop": "torch.nn.LSTM",
    "fastseq.LSTM": "torch.nn.LSTM",
    "fastseq.GRU": "torch.nn.GRU",
    **{name: f"torch.nn.{cell}" for cell, name in CUDA_KERNELS.items()},
    **dict.fromkeys(LINEAR, "torch.nn.GRU"),
    "naive attention": "fused attention",
    "fastseq attention": "fused attention",
}
KNOWN = PROVIDERS | RECURRENT_PROVIDERS | LINEAR_PROVIDERS
CROSSOVER = tuple(field.name for field in fields(Crossover))
EQUAL = (
    "Equal means: the same input, batch and width, one layer each, causal, projections included. "
    "Parameters at width W: LSTM 8 W², GRU 6 W², minGRU 2 W², attention 4 W² (query, key, value, output). The attention "
    "block adds a feed-forward part of inner width 2 W, residuals and layer norms, so that it has the "
    "parameters of the LSTM."
)
MEASURED = (
    "Forward: inference mode. Forward + backward: one training step without the optimizer, gradients of "
    "the input and of every parameter. Peak memory: what torch's allocator handed out during the call, "
    "above parameters and input. Exponents: least squares on log T, log time over the upper half of T."
)


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    B, W = (16, 512) if cuda else (8, 256)
    lengths = [2**k for k in range(5, 10 if options.quick else 12)]
    effort = Effort(seconds=1.5, min_rounds=3, max_rounds=15) if options.quick else Effort(seconds=6.0, max_rounds=40)
    cases = []
    for T in lengths:
        for mode in MODES:
            participants = tuple(
                Participant(
                    name,
                    (LinearWorkload if name in LINEAR else Workload)(
                        KNOWN[name].function,
                        T,
                        B,
                        W,
                        W,
                        mode,
                        threads=threads,
                        dtype=options.dtype,
                        device=options.device,
                    ),
                )
                for name in EVERY
            )
            cases.append(Case(NAME, "length", participants, effort, tuple(BASELINE.items()), headline=True))
    return cases


def curve(rows: list[Row], provider: str, mode: str, quantity: str = "seconds") -> dict[int, float]:
    """T -> seconds, or bytes for quantity "memory". Only rows that passed their check."""
    found = {r.T: getattr(r, quantity) for r in rows if r.provider == provider and r.mode == mode and r.ok}
    return dict(sorted((T, float(v)) for T, v in found.items() if v is not None))


def compare(rows: list[Row], a: str, b: str, mode: str) -> dict[str, Any] | None:
    """Where provider `a` meets `b`, of the times beyond doubt. `void`: why there is no answer, if there is none."""
    at = {(r.provider, r.T): r for r in rows if r.mode == mode and r.provider in (a, b) and r.ok and r.time}
    pairs = [(at[a, T], at[b, T]) for T in sorted({T for _, T in at}) if (a, T) in at and (b, T) in at]
    firm = [pair for pair in pairs if not any(row.doubtful for row in pair)]
    spread = [(p.interval[0] / q.interval[1], p.interval[1] / q.interval[0]) for p, q in firm]
    times = [[row.seconds for row in of] for of in zip(*firm, strict=True)] or [[], []]
    found = crossover([p.T for p, _ in firm], *times, spread=spread)
    if not pairs:
        return None
    void = ""
    if len(pairs) - len(firm) > DOUBTFUL * len(pairs):
        void = f"contended or noisy at {len(pairs) - len(firm)} of {len(pairs)} T"
    elif found and found.count > 1:
        void = f"crosses {found.count} times"
    return (asdict(found) if found and not void else dict.fromkeys(CROSSOVER)) | {"void": void}


def derive(results: Results) -> dict[str, Any]:
    rows = results.of_suite(NAME)
    fits, crossings = [], []
    for mode in MODES:
        for provider in EVERY:
            for quantity in ("seconds", "memory"):
                points = curve(rows, provider, mode, quantity)
                fit = power_law(list(points), list(points.values()))
                if fit:
                    fits.append({"provider": provider, "mode": mode, "quantity": quantity} | asdict(fit))
        for recurrent in RECURRENT + LINEAR:
            for parallel in PARALLEL:
                meeting = compare(rows, parallel, recurrent, mode)
                if meeting:
                    crossings.append({"mode": mode, "a": parallel, "b": recurrent} | meeting)
    return {"fits": fits, "crossovers": crossings}


def present(results: Results) -> list[Section]:
    rows = results.of_suite(NAME)
    derived = derive(results)
    w = rows[0]
    sizes = f"B={w.B}, width {w.H}, {w.dtype}, " + (_threads(w.threads) if w.device == "cpu" else w.device)
    tables = []
    for mode, title in MODES.items():
        tables.append(_times(rows, derived, mode, f"Time, {title}"))
        tables.append(_crossovers(derived, mode, f"Crossover length, {title}"))
        tables.append(_memory(rows, derived, mode, f"Peak memory, {title}"))
    tables.append(_implementations(rows))
    forward = _figure(rows, "inference", "Forward alone: time and peak memory against sequence length")
    figures = [figure for figure in (_training(rows), forward) if figure.curves]
    return [Section(f"Sequential against parallel: {sizes}", [EQUAL, MEASURED], _cards(rows, derived), figures, tables)]


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def picture(results: Results) -> Figure:
    """With the device and sizes in it, for where no page says them."""
    figure = _training(results.of_suite(NAME))
    title = textwrap.fill(f"Sequential against parallel, lower is better: {_sizes(results)}", 125)

    def draw(canvas: Any, theme: Any) -> None:
        figure.draw(canvas, theme)
        canvas.suptitle(title, color=theme.ink, fontsize=11.5, x=0.01, ha="left")

    return replace(figure, draw=draw)


def _training(rows: list[Row]) -> Figure:
    return _figure(rows, "training", "Sequential against parallel, a training step: time and peak memory")


def _sizes(results: Results) -> str:
    w = results.of_suite(NAME)[0]
    return f"{where(results.environment)}, B={w.B}, width {w.H}, {w.dtype}"


def _at(rows: list[Row], provider: str, mode: str, T: int) -> Row | None:
    return next((r for r in rows if (r.provider, r.mode, r.T) == (provider, mode, T)), None)


def _there(rows: list[Row]) -> list[str]:
    """Providers that could run here, in their order."""
    ran = {row.provider for row in rows if row.status != "unavailable"}
    return [provider for provider in EVERY if provider in ran]


def _lengths(rows: list[Row]) -> list[int]:
    return sorted({r.T for r in rows})


def _fit_text(derived: dict[str, Any], provider: str, mode: str, quantity: str) -> Cell:
    for fit in derived["fits"]:
        if (fit["provider"], fit["mode"], fit["quantity"]) == (provider, mode, quantity):
            return Cell(power(fit["exponent"]), "", f"R² {fit['r2']:.4f}, from T={fit['start']}")
    return Cell("–", "weak")


def _r2_text(derived: dict[str, Any], provider: str, mode: str, quantity: str) -> str:
    for fit in derived["fits"]:
        if (fit["provider"], fit["mode"], fit["quantity"]) == (provider, mode, quantity):
            return f"{fit['r2']:.3f}"
    return "–"


def _times(rows: list[Row], derived: dict[str, Any], mode: str, title: str) -> Table:
    lengths = _lengths(rows)
    body: list[list[Cell | str]] = []
    for provider in _there(rows):
        longest = next((r for T in reversed(lengths) if (r := _at(rows, provider, mode, T)) and r.ok), None)
        body.append(
            [provider]
            + [time_cell(_at(rows, provider, mode, T)) for T in lengths]
            + [_fit_text(derived, provider, mode, "seconds"), _r2_text(derived, provider, mode, "seconds")]
            + (
                [
                    f"{longest.seconds / longest.T * 1e6:.1f}",
                    _roofline_cell(longest),
                    longest.roofline["bound"],
                    _baseline_cell(longest),
                ]
                if longest and longest.roofline
                else ["–"] * 4
            )
        )
    return Table(
        title,
        [
            "",
            *(f"T={T}" for T in lengths),
            "grows as",
            "R²",
            "µs per step",
            "of roofline",
            "bound by",
            "vs torch",
        ],
        body,
        "µs per step, share of the roofline and speed-up at the longest T measured. Roofline: the time that "
        "the peaks measured in this run allow for the same arithmetic and weights (causal half of the "
        "scores for attention). vs torch: torch.nn for the recurrent layers, its GRU for minGRU, "
        "torch's fused attention for the other two.",
    )


def _roofline_cell(row: Row) -> Cell:
    assert row.roofline is not None
    return Cell(f"{row.of_roofline:.0%}", "", f"bound by {row.roofline['bound']}: {row.roofline['note']}")


def _baseline_cell(row: Row) -> Cell:
    return ratio_cell(row) if row.ratio else Cell("", "weak")


def _memory(rows: list[Row], derived: dict[str, Any], mode: str, title: str) -> Table:
    lengths = _lengths(rows)
    body: list[list[Cell | str]] = []
    for provider in _there(rows):
        at = [_at(rows, provider, mode, T) for T in lengths]
        body.append(
            [
                provider,
                *(bytes_text(r.memory if r and r.ok else None) for r in at),
                _fit_text(derived, provider, mode, "memory"),
            ]
        )
    return Table(title, ["", *(f"T={T}" for T in lengths), "grows as"], body)


def crossover_text(meeting: dict[str, Any]) -> str:
    """Who is faster: `a` is attention, `b` the recurrence."""
    if meeting["void"]:
        return f"inconclusive: {meeting['void']}"
    names = {"a": "attention", "b": "recurrence"}
    if meeting["at"] is None:
        return "equal (all T)" if meeting["before"] == "neither" else f"{names[meeting['before']]} (all T)"
    return f"{names[meeting['after']]} above T ≈ {meeting['at']:.0f} ({meeting['low']:.0f}…{meeting['high']:.0f})"


def _crossovers(derived: dict[str, Any], mode: str, title: str) -> Table:
    found = {(c["b"], c["a"]): c for c in derived["crossovers"] if c["mode"] == mode}
    body: list[list[Cell | str]] = []
    for recurrent in RECURRENT + LINEAR:
        cells = [found.get((recurrent, parallel)) for parallel in PARALLEL]
        if not any(cells):
            continue
        body.append([recurrent, *(_crossover_cell(c) for c in cells)])
    note = (
        "Who is faster. Interpolated in log-log between measured lengths, with the interval that the spreads leave open; "
        "differences below 3 % decide nothing, and curves that cross more than once have no crossover."
    )
    return Table(title, ["", *(f"against {name}" for name in PARALLEL)], body, note)


def _crossover_cell(meeting: dict[str, Any] | None) -> Cell:
    return Cell(crossover_text(meeting), "weak" if meeting["void"] else "") if meeting else Cell("–", "weak")


def _implementations(rows: list[Row]) -> Table:
    body: list[list[Cell | str]] = []
    for provider in dict.fromkeys(row.provider for row in rows):
        own = [r for r in rows if r.provider == provider]
        ran = sorted({name for r in own for name in r.chose})
        errors = [r.check["error"] for r in own if r.check and r.check["error"] is not None]
        bad = [r for r in own if r.status == "wrong"]
        status = (
            Cell(f"{len(bad)} wrong", "bad", bad[0].reason or "")
            if bad
            else Cell(f"error ≤ {max(errors):.1e}" if errors else "–")
        )
        reason = next((r.reason for r in own if r.reason), "")
        count = next((f"{r.parameters:,}" for r in own if r.parameters), "–")
        body.append([provider, count, status, ", ".join(ran) or reason or "–"])
    return Table(
        "What ran",
        ["", "parameters", "checked against fp64", "operators that show the implementation"],
        body,
        folded=True,
        note="Error: largest deviation of outputs and gradients from the fp64 reference, relative to the "
        "largest value of the tensor.",
    )


def _cards(rows: list[Row], derived: dict[str, Any]) -> list[Card]:
    """Nothing from a row that is contended or noisy."""
    cards = []
    T = _lengths(rows)[-1]
    for cell in ("LSTM", "GRU"):
        row = _at(rows, f"fastseq.{cell}", "training", T)
        if row and row.ok and row.ratio and not row.doubtful:
            value, (low, high) = row.ratio["median"], row.ratio_interval
            tone = "good" if low > 1 else "bad" if high < 1 else ""
            label = f"({low:.2f} to {high:.2f}) training step of fastseq.{cell} over torch.nn.{cell}, T={T}"
            cards.append(Card(f"{value:.2f}×", label, tone))
    for c in derived["crossovers"]:
        if (c["mode"], c["a"], c["b"]) == ("training", "attention block", "fastseq.LSTM") and not c["void"]:
            who = {"a": "the attention block", "b": "fastseq.LSTM", "neither": "neither"}[c["after"]]
            label = f"crossover of attention block and fastseq.LSTM (equal parameters), training: {who} is faster"
            if c["at"]:
                cards.append(Card(f"T ≈ {c['at']:.0f}", f"({c['low']:.0f} to {c['high']:.0f}) {label} above it"))
            else:
                cards.append(Card("none", f"{label} for all T = {c['first']}…{c['last']}"))
    for provider in ("fastseq.LSTM", "naive attention"):
        growth = _fit_text(derived, provider, "training", "seconds")
        if growth.tone != "weak" and reliable([r for r in rows if (r.provider, r.mode) == (provider, "training")]):
            cards.append(Card(growth.text, f"growth of the time of {provider}, forward + backward"))
    return cards


QUANTITIES = ("seconds", "memory")


def _figure(rows: list[Row], mode: str, title: str) -> Figure:
    """Of one layer at equal batch and width."""
    shown = {quantity: {name: curve(rows, name, mode, quantity) for name in EVERY} for quantity in QUANTITIES}
    T = _lengths(rows)[-1]
    longest = [r for r in rows if r.mode == mode and r.T == T and r.ok]

    def draw(canvas: Any, theme: Any) -> None:
        for axes, quantity in zip(canvas.subplots(1, len(QUANTITIES)), QUANTITIES, strict=True):
            _panel(axes, theme, rows, mode, quantity)

    return Figure(
        title,
        "One layer at equal batch and width, lower is better. Time: the median of interleaved rounds, its band from the 20 % to "
        "the 80 % quantile; memory: what the call allocated at most. Beside a name how it grows: both axes are logarithmic, so "
        "every power of T is a straight line, and its exponent the slope.",
        draw,
        (11.5, 4.6),
        alt=f"At T = {T}: " + "; ".join(f"{r.provider} {time_text(r.seconds)} and {bytes_text(r.memory)}" for r in longest),
        curves=frozenset(curve_of(name, points) for of in shown.values() for name, points in of.items() if points),
    )


def _panel(axes: Any, theme: Any, rows: list[Row], mode: str, quantity: str) -> None:
    lengths = _lengths(rows)
    units, base = (TIME_UNITS, 10) if quantity == "seconds" else (BYTE_UNITS, 4)
    title = f"{'Time' if quantity == 'seconds' else 'Peak memory'}, {MODES[mode]}"
    log_axes(
        axes,
        theme,
        title=title,
        x=[float(T) for T in lengths],
        y_base=base,
        y_format=lambda v: tick_text(v, units),
    )
    ends = []
    for name in EVERY:
        points, provider = curve(rows, name, mode, quantity), KNOWN[name]
        if not points:
            continue
        own = name.startswith("fastseq")
        axes.plot(
            list(points),
            list(points.values()),
            color=provider.color,
            linewidth=2.6 if own else 1.5,
            marker="o",
            markersize=4.2 if own else 3.2,
            linestyle="--" if provider.dashed else "-",
            zorder=4 if own else 3,
        )
        if quantity == "seconds":
            band = [
                (r.T, r.time["low"], r.time["high"]) for r in rows if (r.provider, r.mode) == (name, mode) and r.ok and r.time
            ]
            T, low, high = zip(*sorted(band), strict=True)
            axes.fill_between(T, low, high, color=provider.color, alpha=0.18, linewidth=0)
        fit = power_law(list(points), list(points.values()))
        label = f"{name}, parallel in time" if name in LINEAR else name
        ends.append((points[max(points)], f"{label}  {power(fit.exponent)}" if fit else label, provider.color))
    if not ends:
        return
    axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.06)
    end_labels(axes, [(y, label, color) for y, label, color in ends if math.isfinite(y)])
