"""What generation costs beside its context, and what rows of unequal length cost, for both families."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..measure.results import Row
from ..providers.decode import DECODE_PROVIDERS
from ..providers.variable_length import VARIABLE_PROVIDERS
from ..report.findings import Finding, Line, Meeting, Panel
from ..report.model import bytes_text, time_text
from ..suites import decode
from ..suites import variable_length as lengths
from ..workloads.base import MODES
from ..workloads.decode import PREFILL, TOKENS
from .evidence import by_size, judge, less, line, lowest, meet

TITLES = {PREFILL: "prefill", TOKENS: "token by token"}
PADDED, SPREAD = "(padded)", "skewed"  # in the names of providers; the distribution of lengths


def infer_faster(rows: list[Row]) -> list[Finding]:
    """An attention block with a cache against the LSTM of as many parameters: the context at once, and token by token."""
    findings = []
    for sizes, own in by_size(row for row in rows if row.suite == decode.NAME).items():
        parts, figures, panels = [], [], []
        meetings: list[Meeting] = []
        for stage, title in TITLES.items():
            at = [row for row in own if _detail(row, "stage") == stage]
            blocks, layers = (_decoders(at, function) for function in ("block", "lstm"))
            block, lstm = lowest(blocks, "attention block"), lowest(layers, "LSTM")
            holds = less(block, lstm)
            if not holds:
                continue
            T = holds.places[-1]
            parts.append(judge(holds, title))
            meetings += meet(block, lstm, title)
            what = "prefill of" if stage == PREFILL else "a token after"
            figures.append(f"{what} T = {T:g}: {time_text(block.values[T])} against {time_text(lstm.values[T])} for the LSTM")
            kind = "Prefill" if stage == PREFILL else "Time per token"
            panels.append(Panel(kind, (*blocks, *layers), x_label="T, tokens of context"))
        state, cache = state_lines(own)
        if state and cache:
            T = max(cache.values)
            kept = bytes_text(cache.values[T]), bytes_text(state.values[T])
            figures.append(f"kept after T = {T:g}: {kept[0]} of keys and values against {kept[1]} of state")
            panels.append(Panel("Kept of the context", (cache, state), "bytes", "T, tokens of context"))
        if parts:
            findings.append(Finding(sizes, tuple(parts), "; ".join(figures), tuple(meetings), tuple(panels)))
    return findings


def state_lines(rows: Iterable[Row]) -> tuple[Line, Line]:
    """Bytes that the LSTM and the attention block keep of a context: the state and the cache."""
    at = [row for row in rows if row.suite == decode.NAME and _detail(row, "stage") == TOKENS]
    lstm, block = ([row for row in at if row.function == function] for function in ("lstm", "block"))
    return line(lstm, "LSTM's state", _state), line(block, "block's cache", _state)


def _state(row: Row) -> float:
    return float(_detail(row, "state bytes"))


def _detail(row: Row, key: str) -> Any:
    return (row.detail or {}).get(key)


def _calls(row: Row) -> float:
    """How many of them a time is for: the tokens that were generated one by one, or one prefill."""
    return _detail(row, "new") if _detail(row, "stage") == TOKENS else 1


def _decoders(rows: list[Row], function: str) -> list[Line]:
    every = (
        line([row for row in rows if row.provider == name], name, per=_calls, color=p.color, dashed=p.dashed)
        for name, p in DECODE_PROVIDERS.items()
        if p.function == f"decode {function}"
    )
    return [a for a in every if a]


def variable_length(rows: list[Row]) -> list[Finding]:
    """Whether the LSTM is fastest padded, as it would be if it had to pad, and attention without; on skewed lengths."""
    findings = []
    skewed = [row for row in rows if row.suite == lengths.NAME and _detail(row, "spread") == SPREAD]
    for sizes, own in by_size(skewed).items():
        parts, figures, panels = [], [], []
        meetings: list[Meeting] = []
        for mode, title in MODES.items():
            of_mode = [row for row in own if row.mode == mode]
            for function, family in (("lstm", "LSTM"), ("encoder", "attention")):
                every = [
                    line([row for row in of_mode if row.provider == name], name, color=p.color, dashed=p.dashed)
                    for name, p in VARIABLE_PROVIDERS.items()
                    if p.function == f"variable {function}"
                ]
                padded = lowest([a for a in every if PADDED in a.name], f"{family}, padded")
                tight = lowest([a for a in every if PADDED not in a.name], f"{family} without padding")
                holds = less(padded, tight) if function == "lstm" else less(tight, padded)
                if not holds:
                    continue
                T = holds.places[-1]
                best = f"{family} is fastest {'padded' if function == 'lstm' else 'without padding'}, {title}"
                parts.append(judge(holds, best))
                meetings += meet(padded, tight, title)
                values = f"{time_text(tight.values[T])} without padding, {time_text(padded.values[T])} with it"
                figures.append(f"{family}, {title}, longest row {T:g}: {values}")
                shown = tuple(a for a in every if a)
                panels.append(Panel(f"{family} on {SPREAD} lengths, {title}", shown, x_label="T, the longest row"))
        if parts:
            padding = max(_detail(row, "padding") for row in own)
            text = f"{'; '.join(figures)}; up to {padding:.0%} of a padded batch is padding"
            findings.append(Finding(sizes, tuple(parts), text, tuple(meetings), tuple(panels)))
    return findings
