"""What a layer costs in time and memory as sequences grow: recurrent layers against attention, and kinds of attention."""

from __future__ import annotations

from collections.abc import Callable

from ..measure.results import Row
from ..providers.attention import ATTENTION_PROVIDERS, OWN, REFORMER
from ..providers.systems import own_name
from ..report.findings import FAILS, FORMATS, HOLDS, INCONCLUSIVE, PARTLY, Finding, Line, Meeting, Panel, Part
from ..report.model import bytes_text, power, time_text
from ..report.statistics import local_exponents, power_law
from ..suites import attention as alone
from ..suites import decode, memory_use, systems
from ..suites import sequential_vs_parallel as length
from ..workloads.base import MODES
from ..workloads.hashed import HASHED
from ..workloads.systems import SYSTEMS
from . import learning
from .evidence import Answers, by_size, crossing, judge, less, line, lowest, meet, unreliable
from .serving import state_lines

FLAT = 0.5  # below this exponent the time counts as not growing with T
TRANSFORMER = "attention block"  # has the parameters of the LSTM
LSTMS = ("torch.nn.LSTM", "fastseq.LSTM", length.CUDA_KERNELS["LSTM"])
LAYERS = (*LSTMS, "torch.nn.GRU", "fastseq.GRU", length.CUDA_KERNELS["GRU"])
ATTENTION = ("naive attention", "fused attention")
FUSED = ("fused attention", "fastseq attention")
Compare = Callable[[Line, Line], Answers]


def _lines(rows: list[Row], providers: tuple[str, ...], mode: str, quantity: str = "seconds") -> list[Line]:
    own = {name: [r for r in rows if (r.provider, r.mode) == (name, mode)] for name in providers}
    value = None if quantity == "seconds" else lambda row: row.memory
    known = length.KNOWN
    return [line(of, name, value, color=known[name].color, dashed=known[name].dashed) for name, of in own.items()]


def _of(rows: list[Row], suite: str) -> dict[str, list[Row]]:
    return by_size(row for row in rows if row.suite == suite)


def parallel_ops(rows: list[Row]) -> list[Finding]:
    """O(1) sequential operations would show as a time that does not grow with T, O(T) as one that does.

    Beside it stands recurrence that is parallel in time: what that buys here, and what it gives up.
    """
    findings = []
    given_up, shown = learning.parity(rows)
    for sizes, own in _of(rows, length.NAME).items():
        parts, figures, panels = [], [], []
        for mode, title in MODES.items():
            every = _lines(own, length.EVERY, mode)
            attention = lowest(_lines(own, FUSED, mode), "fused attention")
            layer = lowest(_lines(own, LAYERS, mode), "fastest recurrent layer")
            if len(attention.values) < 2 or len(layer.values) < 2:
                continue
            panels.append(Panel(f"Time of a layer, {title}", tuple(a for a in every if a)))
            doubt = unreliable(attention, title) or unreliable(layer, title)
            fits = [power_law(list(a.firm), list(a.firm.values())) for a in (attention, layer)]
            if doubt or not fits[0] or not fits[1]:
                parts.append(doubt or Part(INCONCLUSIVE, "inconclusive, no two times are beyond doubt", title))
                continue
            parts.append(_flatness(attention, fits[1].exponent, title))
            T = max(layer.firm)
            figures.append(
                f"{title}: time grows as {power(fits[0].exponent)} for fused attention and {power(fits[1].exponent)} for the "
                f"fastest recurrent layer, which takes {time_text(layer.values[T] / T)} per step"
                + "".join(_bought(a, layer, attention) for a in every if a.name in length.LINEAR)
            )
        if parts:
            figures += [given_up] if given_up else []
            findings.append(Finding(sizes, tuple(parts), "; ".join(figures), (), (*panels, *shown)))
    return findings


def _bought(scan: Line, layer: Line, attention: Line) -> str:
    """What recurrence that is parallel in time takes beside that which is not, and beside attention."""
    fit = power_law(list(scan.firm), list(scan.firm.values()))
    shared = scan.firm.keys() & layer.firm.keys() & attention.firm.keys()
    if unreliable(scan) or not fit or not shared:
        return ""
    T = max(shared)
    than = {"that layer": layer, attention.name: attention}
    times = ", ".join(f"{a.values[T] / scan.values[T]:.2f} times as fast as {name}" for name, a in than.items())
    return f", and as {power(fit.exponent)} for recurrence that is parallel in time, {scan.name}: {times} at T = {T:g}"


def _flatness(attention: Line, layer_exponent: float, about: str) -> Part:
    flat, first, last = 0.0, min(attention.firm), max(attention.firm)
    for _, high, slope in local_exponents(list(attention.firm), list(attention.firm.values())):
        if slope >= FLAT:
            break
        flat = high
    if layer_exponent < FLAT:
        return Part(FAILS, f"does not hold here: the recurrence does not grow with T, T = {first:g}…{last:g}", about)
    if flat == last:
        return Part(HOLDS, f"holds for T = {first:g}…{last:g}: attention takes no longer for longer sequences", about)
    if flat:
        return Part(PARTLY, f"holds only up to T = {flat:g}: beyond it attention grows as well", about)
    return Part(FAILS, f"does not hold here as time, T = {first:g}…{last:g}: attention grows as well", about)


def train_faster(rows: list[Row]) -> list[Finding]:
    """One training step at equal parameters and equal tokens: an attention block against the fastest LSTM."""
    findings = []
    for sizes, own in _of(rows, length.NAME).items():
        (block,) = _lines(own, (TRANSFORMER,), "training")
        lstms = _lines(own, LSTMS, "training")
        lstm = lowest(lstms, "LSTM")
        holds = less(block, lstm)
        if not holds:
            continue
        tokens: dict[float, int] = {row.T: row.tokens for row in own}
        figures = ", ".join(
            f"T = {T:g}: {tokens[T] / block.values[T]:,.0f} tokens/s against {tokens[T] / lstm.values[T]:,.0f} for the LSTM"
            for T in sorted({holds.places[0], holds.places[-1]})
        )
        meetings = meet(block, lstm)
        crosses = crossing(block, lstm)
        where = "; no crossover in the measured range" if crosses and not crosses.count else ""
        panel = Panel("Training step at equal parameters", (block, *(a for a in lstms if a)))
        text = f"{figures}{where} (equal parameters and tokens, best of {' and '.join(a.name for a in lstms if a)})"
        findings.append(Finding(sizes, (judge(holds),), text, meetings, (panel,)))
    return findings


def memory_more(rows: list[Row]) -> list[Finding]:
    return _memory(rows, lambda attention, layer: less(layer, attention))


def memory_less(rows: list[Row]) -> list[Finding]:
    return _memory(rows, less)


def _memory(rows: list[Row], compare: Compare) -> list[Finding]:
    """Both claims follow from the same lines by opposite comparisons, so where one holds the other does not."""
    findings = []
    for sizes, own in by_size(row for row in rows if row.suite in (length.NAME, memory_use.NAME)).items():
        layers = _lines(own, LAYERS, "training", "memory")
        layer = lowest(layers, "smallest recurrent layer")
        parts, figures, shown = [], [], []
        meetings: list[Meeting] = []
        for attention in _lines(own, ATTENTION, "training", "memory"):
            holds = compare(attention, layer)
            if not holds:
                continue
            T = holds.places[-1]
            parts.append(judge(holds, attention.name))
            figures.append(f"{attention.name} {bytes_text(attention.values[T])}")
            meetings += meet(attention, layer)
            shown.append(attention)
        if parts:
            figures.append(f"smallest recurrent layer {bytes_text(layer.values[max(layer.values)])}")
            text = f"peak of a training step at T = {max(layer.values)}, equal width: {', '.join(figures)}"
            panel = Panel("Peak memory of a training step", (*(a for a in layers if a), *shown), "bytes")
            findings.append(Finding(sizes, tuple(parts), text, tuple(meetings), (panel,)))
    return findings + _inference(rows, compare)


def _inference(rows: list[Row], compare: Compare) -> list[Finding]:
    """What is kept of a context while tokens are generated."""
    findings = []
    for sizes, own in by_size(row for row in rows if row.suite == decode.NAME).items():
        state, cache = state_lines(own)
        holds = compare(cache, state)
        if holds:
            T = holds.places[-1]
            text = (
                f"kept after T = {T:g}: {bytes_text(cache.values[T])} of keys and values, {bytes_text(state.values[T])} of state"
            )
            panel = Panel("Kept of the context", (cache, state), "bytes", "T, tokens of context")
            findings.append(Finding(sizes, (judge(holds, "generation"),), text, meet(cache, state), (panel,)))
    return findings


def overhead(rows: list[Row]) -> list[Finding]:
    """Training step of causal attention over a window, over blocks and over hashed chunks, against all keys."""
    findings = []
    for sizes, own in _of([row for row in rows if row.group == "memory"], alone.NAME).items():
        parts, figures, panels = [], [], []
        meetings: list[Meeting] = []
        for quantity, what, unit in (("seconds", "time", "seconds"), ("memory", "memory", "bytes")):
            lines = {kind: _kind(own, kind, quantity) for kind in COLORS}
            for kind, every, name in CHEAPER:
                sparse, full, about = lines[kind], lines[every], f"{what}, {name}"
                holds = less(sparse, full)
                if not holds:
                    continue
                T, text = holds.places[-1], FORMATS[unit]
                parts.append(judge(holds, about))
                figures.append(f"{about} {text(sparse.values[T])} against {text(full.values[T])} at T = {T}")
                meetings += meet(sparse, full, about)
            panels.append(Panel(f"{what.capitalize()} of a training step", tuple(a for a in lines.values() if a), unit))
        if parts:
            hashed = any(a.name == HASHED for panel in panels for a in panel.lines)
            programs = f"hashed attention by {REFORMER}" if hashed else "hashed attention not measured"
            said = f"{OWN}, forward + backward: {'; '.join(figures)}; {programs}"
            findings.append(Finding(sizes, tuple(parts), said, tuple(meetings), tuple(panels)))
    return findings + _whole_systems(rows)


def _whole_systems(rows: list[Row]) -> list[Finding]:
    """The same of models: those with cheaper attention beside those with all keys, at equal parameters."""
    findings = []
    steps = [row for row in rows if row.suite == systems.NAME and row.group == systems.STEP]
    for sizes, own in by_size(steps, width=False).items():
        parts: list[Part] = []
        figures: list[str] = []
        panels: list[Panel] = []
        meetings: list[Meeting] = []
        for quantity, what, unit in (("seconds", "time", "seconds"), ("memory", "memory", "bytes")):
            lines = {name: _system(own, name, quantity) for pair in SYSTEM_PAIRS for name in pair}
            for cheaper, full in SYSTEM_PAIRS:
                about, holds = f"{what}, {cheaper} beside {full}", less(lines[cheaper], lines[full])
                if not holds:
                    continue
                T, text = holds.places[-1], FORMATS[unit]
                parts.append(judge(holds, about))
                values = f"{text(lines[cheaper].values[T])} against {text(lines[full].values[T])}"
                figures.append(f"{about} {values} at T = {T}")
                meetings += meet(lines[cheaper], lines[full], about)
            panels.append(Panel(f"{what.capitalize()} of a training step, systems", tuple(a for a in lines.values() if a), unit))
        if parts:
            findings.append(Finding(sizes, tuple(parts), "; ".join(figures), tuple(meetings), tuple(panels)))
    return findings


SYSTEM_PAIRS = (("Longformer", "BERT"), ("Reformer", "GPT"), ("Transformer-XL", "GPT"))


def _system(rows: list[Row], name: str, quantity: str) -> Line:
    own = [row for row in rows if row.provider == own_name(name)]
    return line(own, name, None if quantity == "seconds" else lambda row: row.memory, color=SYSTEMS[name].color)


COLORS = {
    alone.FULL: ATTENTION_PROVIDERS[OWN].color,
    alone.WINDOW: "#0072b2",
    alone.BLOCKS: "#d55e00",
    HASHED: ATTENTION_PROVIDERS[REFORMER].color,
    alone.SHARED: "#7c889e",
}
CHEAPER = (
    (alone.WINDOW, alone.FULL, "sliding window"),
    (alone.BLOCKS, alone.FULL, "block-sparse"),
    (HASHED, alone.FULL, "hashed beside fused"),
    (HASHED, alone.SHARED, "hashed beside all keys of its own program"),
)


def _kind(rows: list[Row], kind: str, quantity: str) -> Line:
    program = REFORMER if kind in (HASHED, alone.SHARED) else OWN
    own = [row for row in rows if row.provider == program and alone.kind_of(row) == kind]
    return line(own, kind, None if quantity == "seconds" else lambda row: row.memory, color=COLORS[kind])
