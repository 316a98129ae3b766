"""What a layer can do rather than what it costs: how far it reaches, what it knows of order, what it learns from little data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..measure.results import Row
from ..providers.registry import EVERY_PROVIDER
from ..providers.systems import own_name
from ..report.findings import FAILS, FORMATS, HOLDS, Finding, Line, Meeting, Panel, Part
from ..report.statistics import Exponential, exponential
from ..suites import long_range as reach
from ..suites import small_data as little
from ..suites import statements as single
from ..suites import systems as whole
from ..workloads.experiments import SYMBOLS
from .evidence import EQUAL, by_size, highest, judge, less, line, lowest, meet

RECURRENT = ("fastseq.RNN", "fastseq.LSTM", "fastseq.GRU")
ATTENTION, BLOCK = "fastseq attention", "attention block"
RECALLED = (1 + 1 / SYMBOLS) / 2  # halfway between chance and certainty
UNKNOWN = math.log(SYMBOLS) / 2  # nats, halfway between chance and certainty
ROUNDING = math.sqrt(torch.finfo(torch.float64).eps)  # a change below it is none
DISTANCE, AMOUNT = "T, distance", "n, steps of the record that are trained on"


def _lines(rows: list[Row], names: Iterable[str], **how: Any) -> list[Line]:
    found = []
    for name in names:
        p = EVERY_PROVIDER[name]
        found.append(line([row for row in rows if row.provider == name], name, color=p.color, dashed=p.dashed, **how))
    return [a for a in found if a]


def long_range(rows: list[Row]) -> list[Finding]:
    """The gradient at initialization, compared at every distance, and what is recalled after training."""
    findings = []
    of_suite = [row for row in rows if row.suite == reach.NAME]
    for sizes, own in by_size(row for row in of_suite if row.group == reach.GRADIENT).items():
        layers, attention = _lines(own, RECURRENT), _lines(own, (ATTENTION,))
        holds = less(highest(layers, "best recurrent layer"), attention[0]) if attention else None
        if not holds:
            continue
        part = judge(holds, "at initialization, less gradient comes through recurrence than through attention")
        factors = ", ".join(f"{a.name} {fit.factor:.3g}" for a in layers if (fit := _decay(a)))
        T = holds.places[-1]
        far = ", ".join(f"{a.name} {a.values[T]:.2g}" for a in (*layers, *attention) if T in a.values)
        text = f"factor of the gradient for each step: {factors}; gradient across T = {T:g}: {far}"
        panel = Panel("Gradient at initialization", (*layers, *attention), "number", DISTANCE)
        findings.append(Finding(sizes, (part,), text, meet(highest(layers, "recurrence"), attention[0]), (panel,)))
    for sizes, own in by_size(row for row in of_suite if row.group == reach.RECALL).items():
        layers, attention = _lines(own, RECURRENT), _lines(own, (ATTENTION, BLOCK))
        recurrence, other = highest(layers, "best recurrent layer"), highest(attention, "best attention")
        if not recurrence or not other:
            continue
        parts = (
            judge({T: v < RECALLED for T, v in recurrence.values.items()}, "recurrence forgets, trained"),
            judge({T: v >= RECALLED for T, v in other.values.items()}, "attention recalls, trained"),
        )
        shared = recurrence.values.keys() & other.values.keys()
        text = "; ".join(
            f"T = {T:g}: {recurrence.values[T]:.0%} of recurrence, {other.values[T]:.0%} of attention" for T in sorted(shared)
        )
        panel = Panel("Accuracy of recall after a fixed budget", (*layers, *attention), "share", DISTANCE, log=False)
        findings.append(
            Finding(sizes, parts, f"recalled, best of each family, {text}; chance is {1 / SYMBOLS:.1%}", (), (panel,))
        )
    return findings


def vanishing(rows: list[Row]) -> list[Finding]:
    """The decay of the gradient for each step at initialization; mitigated is what decays, or grows, by less at a distance."""
    findings = []
    gradients = [row for row in rows if row.suite == reach.NAME and row.group == reach.GRADIENT]
    for sizes, own in by_size(gradients).items():
        layers = {a.name: a for a in _lines(own, RECURRENT)}
        plain = layers.pop(RECURRENT[0], None)
        fit = _decay(plain) if plain else None
        if plain is None or fit is None or not layers:
            continue
        parts = [_bounded(plain, fit)]
        for name, gated in layers.items() if parts[0].state == HOLDS else ():
            worse = less(plain, gated) if fit.factor < 1 else less(gated, plain)
            if worse:
                parts.append(judge(worse, f"{name} mitigates it"))
        factors = {a.name: found.factor for a in (plain, *layers.values()) if (found := _decay(a))}
        text = "factor of the gradient for each step: " + ", ".join(f"{name} {factor:.3g}" for name, factor in factors.items())
        panel = Panel("Gradient at initialization", (plain, *layers.values()), "number", DISTANCE)
        findings.append(Finding(sizes, tuple(parts), text, (), (panel,)))
    return findings


def _bounded(plain: Line, fit: Exponential) -> Part:
    span = f"T = {min(plain.values):g}…{max(plain.values):g}"
    if abs(math.log(fit.factor)) < EQUAL:
        return Part(FAILS, f"does not hold here, {span}: neither vanishes nor explodes", plain.name)
    return Part(HOLDS, f"holds for {span}: the gradient {'vanishes' if fit.factor < 1 else 'explodes'}", plain.name)


def _decay(a: Line) -> Exponential | None:
    return exponential(list(a.values), list(a.values.values()))


def small_data(rows: list[Row]) -> list[Finding]:
    """Test loss of an LSTM and of the attention block with as many parameters; seeds that overlap decide nothing."""
    findings = []
    for sizes, own in by_size(row for row in rows if row.suite == little.NAME).items():
        parts, figures, panels = [], [], []
        meetings: list[Meeting] = []
        for task in (little.TEXT, little.SERIES):
            of_task = [row for row in own if row.group == task]
            shown = {a.name: a for a in _lines(of_task, (*RECURRENT, BLOCK), x=_samples)}
            lstm, block = shown.get("fastseq.LSTM"), shown.get(BLOCK)
            holds = less(lstm, block) if lstm and block else None
            if not lstm or not block or not holds:
                continue
            parts.append(judge(holds, task, "n"))
            meetings += meet(lstm, block, task, "n")
            ends = sorted({holds.places[0], holds.places[-1]})
            figures.append(", ".join(f"{task}, n = {n:g}: {lstm.values[n]:.3g} against {block.values[n]:.3g}" for n in ends))
            panels.append(Panel(f"Test loss, {task}", tuple(shown.values()), "number", AMOUNT, log=False))
        if parts:
            text = f"test loss of the LSTM against that of the attention block, medians over seeds: {'; '.join(figures)}"
            findings.append(Finding(sizes, tuple(parts), text, tuple(meetings), tuple(panels)))
    return findings


def parity(rows: list[Row]) -> tuple[str, tuple[Panel, ...]]:
    """What gates that read the state can do, and gates that do not cannot; "" where it was not measured."""
    own = [row for row in rows if row.suite == reach.NAME and row.group == reach.PARITY]
    lines = _lines(own, reach.COUNT)
    shared = sorted(set.intersection(*(set(a.values) for a in lines))) if len(lines) > 1 else []
    if not shared:
        return "", ()
    each = [f"T = {T:g}: " + ", ".join(f"{a.name} {a.values[T]:.0%}" for a in lines) for T in shared]
    panel = Panel("Parity of T bits, named right", tuple(lines), "share", "T, bits", log=False)
    return f"parity of T bits, named right (chance is 50%), {'; '.join(each)}", (panel,)


def _samples(row: Row) -> float:
    return (row.detail or {})["samples"]


def order(rows: list[Row]) -> list[Finding]:
    """What changes by no more than rounding when the steps before change places does not know the order."""
    findings = []
    for sizes, own in _of_groups(rows, single.ORDER.values()).items():
        plain, told = ([row for row in own if row.group == single.ORDER[how]] for how in (single.PLAIN, single.POSITIONED))
        parts, figures = [], []
        for name in single.BLIND:
            for a in _lines(plain, (name,)):
                blind = {T: v < ROUNDING for T, v in a.values.items()}
                parts.append(judge(blind, f"{name} does not know the order"))
                figures.append(f"{name} without positions {max(a.values.values()):.2g}")
            for a in _lines(told, (name,)):
                parts.append(judge({T: v >= ROUNDING for T, v in a.values.items()}, f"{name} with positions knows it"))
                figures.append(f"with them {min(a.values.values()):.2g}")
        if parts:
            recurrent = _lines(plain, (single.LSTMS, single.HYBRID))
            figures += [f"{a.name} {min(a.values.values()):.2g}" for a in recurrent]
            shown = [
                replace(a, name=f"{a.name}, {how}")
                for how, of in ((single.PLAIN, plain), (single.POSITIONED, told))
                for a in _lines(of, single.BLIND)
            ]
            text = f"change of the last output when the steps before it change places: {', '.join(figures)}"
            panel = Panel("Change of the last output", (*shown, *recurrent), "number", "T, steps that change places")
            findings.append(Finding(sizes, tuple(parts), text, (), (panel,)))
    return findings


def fixed_context(rows: list[Row]) -> list[Finding]:
    """Where the token that is needed is known, with and without cached segments; known is a loss below half of chance's."""
    findings = []
    for sizes, own in _of_groups(rows, single.CONTEXT.values()).items():
        alone, cached = (
            line([row for row in own if row.group == single.CONTEXT[how]], how, color=color)
            for how, color in ((single.ALONE, "#d55e00"), (single.CACHED, "#0072b2"))
        )
        beyond = [{T: v for T, v in a.values.items() if T >= single.SEGMENT} for a in (alone, cached)]
        if not all(beyond):
            continue
        parts = (
            judge(
                {T: v > UNKNOWN for T, v in beyond[0].items()}, f"beyond {single.SEGMENT} steps, segments alone miss the token"
            ),
            judge({T: v < UNKNOWN for T, v in beyond[1].items()}, "cached segments see it"),
        )
        text = "; ".join(
            f"T = {T:g}: {v:.2g} alone, {cached.values[T]:.2g} cached" for T, v in alone.values.items() if T in cached.values
        )
        panel = Panel("Loss of the last token", (alone, cached), "number", "T, distance of the token that it needs", log=False)
        figures = f"loss of the last token in nats, {math.log(SYMBOLS):.2f} by chance, {text}"
        findings.append(Finding(sizes, parts, figures, meet(cached, alone), (panel,)))
    return findings


def hybrid(rows: list[Row]) -> list[Finding]:
    """On each axis: is the system of both as good as the better one of either kind? And is it better, where all learn as long?"""
    findings = []
    for sizes, own in by_size([row for row in rows if row.suite == whole.NAME], width=False).items():
        parts: list[Part] = []
        figures: list[str] = []
        panels: list[Panel] = []
        for group, what, unit in (
            (whole.STEP, "time of a training step", "seconds"),
            (whole.STEP, "memory of a training step", "bytes"),
            (whole.TOKEN, "time of a token", "seconds"),
            (whole.TEXT, "loss on a text after equal time", "number"),
        ):
            value = (lambda row: row.memory) if unit == "bytes" else None
            found = _lines([row for row in own if row.group == group], map(own_name, whole.FAMILY), value=value)
            if len(found) < len(whole.FAMILY):
                continue
            *others, both = found
            if group == whole.TEXT:
                holds, words = less(both, lowest(others, "better one of the others")), "below the better one"
            else:
                worse = less(lowest(others, "better one of the others"), both)
                holds, words = worse.turned(lambda v: v is not True), "as good as the better one"
            parts.append(judge(holds, f"{what}, {words}"))
            T, form = holds.places[-1], FORMATS[unit]
            figures.append(f"{what} at T = {T:g}: " + ", ".join(f"{a.name} {form(a.values[T])}" for a in found))
            panels.append(Panel(what.capitalize(), tuple(found), unit, log=group != whole.TEXT))
        if parts:
            findings.append(Finding(sizes, tuple(parts), "; ".join(figures), (), tuple(panels)))
    return findings + _recall_of_stacks(rows)


def _recall_of_stacks(rows: list[Row]) -> list[Finding]:
    findings = []
    for sizes, own in _of_groups(rows, (single.RECALL,)).items():
        lines = {a.name: a for a in _lines(own, single.STACKS)}
        if len(lines) < len(single.STACKS):
            continue
        both, others = lines[single.HYBRID], [lines[name] for name in single.STACKS if name != single.HYBRID]
        worse = less(both, highest(others, "better stack of one kind"))
        part = judge(worse.turned(lambda v: v is not True), "recall, as good as the better one")
        T = worse.places[-1]
        text = f"recall at T = {T:g}: " + ", ".join(f"{a.name} {a.values[T]:.0%}" for a in lines.values())
        panel = Panel("Recall of two layers", tuple(lines.values()), "share", DISTANCE, log=False)
        findings.append(Finding(sizes, (part,), text, (), (panel,)))
    return findings


def _of_groups(rows: Iterable[Row], groups: Iterable[str]) -> dict[str, list[Row]]:
    wanted = set(groups)
    return by_size(row for row in rows if row.suite == single.NAME and row.group in wanted)
