"""Attention alone: dense against torch's kernels, the cases where torch is slow, decoding, and memory against length."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row, reliable
from ..measure.timing import Effort
from ..providers.attention import ATTENTION_PROVIDERS, EAGER, FLASH, FLEX, FORCED, OWN, OWN_MODULE, REFORMER, SDPA, TORCH_MODULE
from ..providers.onnx_attention import FUNCTIONS as ON_ONNX
from ..providers.onnx_attention import ONNX, ONNX_ATTENTION_PROVIDERS
from ..report.model import (
    BYTE_UNITS,
    Card,
    Cell,
    Figure,
    Section,
    Table,
    bytes_text,
    power,
    ratio_cell,
    target_cell,
    three_digits,
    tick_text,
    time_cell,
    time_text,
)
from ..report.plots.style import end_labels, log_axes
from ..report.statistics import power_law
from ..workloads.attention import CASES, FORMULA, AttentionWorkload
from ..workloads.base import ALL_MODES
from ..workloads.hashed import CHUNK, HASHED

NAME = "attention"
SUMMARY = "attention alone against torch (every backend), FlexAttention, flash-attn: dense, biased, windowed, hashed, decoding"

CORE = (SDPA, *FORCED, FLEX, FLASH, ONNX, OWN)
# What must be reached over the named provider on an H200 (the devices of other classes have no targets).
TARGETS: dict[str, tuple[str, float]] = {
    "hd 256": (SDPA, 1.0),
    "learned bias": (SDPA, 3.0),
    "T5 table": (SDPA, 4.0),
    "Transformer-XL": (EAGER, 6.0),
    "window": (SDPA, 8.0),
    "averaged weights": (TORCH_MODULE, 3.0),
    "padding + causal": (TORCH_MODULE, 1.8),
    "GQA + bias": (SDPA, 10.0),
}
DENSE_TARGETS = {"inference": 0.70, "backward": 0.55}  # over torch's cuDNN backend, at T of 4096 and more
DECODE_TARGET = 0.85  # of the copy bandwidth, at contexts of 8192 and more
TARGET_DEVICE = "H200"
LENGTH_CASES = ("dense", "window", "blocks", "t5", "transformer-xl", "bias")
FULL, WINDOW, BLOCKS, SHARED = "full causal", "window", "blocks", "shared query-key"
LENGTH_PROGRAMS = (EAGER, SDPA, OWN, REFORMER)


def plan(options: Options) -> list[Case]:
    cuda = options.device.startswith("cuda")
    dtype = "bfloat16" if cuda and options.dtype == "float32" else options.dtype
    threads = options.threads[-1] if options.threads else torch.get_num_threads()
    common: dict[str, Any] = {"threads": threads, "dtype": dtype, "device": options.device}
    if options.quick:
        effort = Effort(seconds=0.2, min_rounds=3, max_rounds=10)
    else:
        effort = Effort(seconds=1.0, min_rounds=5, max_rounds=40)
    cases: list[Case] = []

    def add(group: str, workload: AttentionWorkload, providers: tuple[str, ...], own: str, baseline: str) -> None:
        if cuda or workload.mode != "inference" or workload.function not in ON_ONNX:
            providers = tuple(name for name in providers if name != ONNX)
        participants = tuple(Participant(name, workload) for name in providers)
        cases.append(Case(NAME, group, participants, effort, ((own, baseline),)))

    def make(function: str, T: int, B: int, W: int, E: int, mode: str, **more: Any) -> AttentionWorkload:
        return AttentionWorkload(function, T, B, W, W, mode, heads=W // E, **(common | more))

    for E, T, causal, mode in product(*_dense_grid(cuda, options.quick), (False, True), ALL_MODES):
        W, tokens = _dense_size(cuda, options.quick)
        add("dense", make("dense", T, max(1, tokens // T), W, E, mode, causal=causal), CORE, OWN, SDPA)

    T, W, E, B = (4096, 2048, 128, 4) if cuda else (192, 128, 64, 2) if options.quick else (512, 256, 64, 2)
    long = 16384 if cuda else 2 * T
    window = 1024 if cuda else long // 8
    for name, function, more in (
        ("learned bias", "bias", {}),
        ("GQA + bias", "bias", {"kv_heads": max(1, W // E // 4)}),
        ("T5 table", "t5", {}),
        ("Transformer-XL", "transformer-xl", {"causal": True}),
        ("window", "window", {"causal": True, "window": window, "T": long, "B": 1}),
        ("averaged weights", "weights", {}),
        ("padding + causal", "padding", {}),
        ("hd 256", "dense", {"E": 256, "causal": True, "W": max(W, 256)}),
        ("fp32", "dense", {"causal": True, "dtype": "float32"}),
        ("TF32", "dense", {"causal": True, "dtype": "float32", "tf32": True}),
        ("deterministic", "dense", {"causal": True, "deterministic": True}),
    ):
        if name == "TF32" and not cuda:
            continue
        sizes: dict[str, Any] = {"T": T, "B": B, "W": W, "E": E, **more}
        for mode in ("inference", "training"):
            workload = make(function, mode=mode, **sizes)
            if CASES[function].module:
                add(name, workload, (TORCH_MODULE, OWN_MODULE), OWN_MODULE, TORCH_MODULE)
            else:
                eager = (EAGER,) if workload.function == "transformer-xl" else ()
                add(name, workload, (*eager, SDPA, FLEX, FLASH, ONNX, OWN), OWN, SDPA)

    contexts, batches, groups = _decode_grid(cuda, options.quick)
    for S, B, group in product(contexts, batches, groups):
        heads, E = (32, 128) if cuda else (8, 64)
        workload = make("decode", 1, B, heads * E, E, "inference", keys=S, kv_heads=heads // group)
        if 2 * workload.bytes < 24 << 30:
            add("decode", workload, (SDPA, FLEX, FLASH, ONNX, OWN), OWN, SDPA)

    for T, function in product(_lengths(cuda, options.quick), LENGTH_CASES):
        W, E = (1024, 128) if cuda else (128, 64)
        more = {"window": {"window": 1024 if cuda else 64}, "blocks": {"block": 128 if cuda else 16}}.get(function, {})
        causal = function not in ("t5", "bias")
        workload = make(function, T, 1, W, E, "training", causal=causal, **more)
        add("memory", workload, (EAGER, SDPA, OWN), OWN, SDPA)
    for T, block in product(_lengths(cuda, options.quick), (CHUNK, 0)):
        W, E = (1024, 128) if cuda else (128, 64)
        hashed = make(HASHED, T, 1, W, E, "training", causal=True, block=block or T)
        cases.append(Case(NAME, "memory", (Participant(REFORMER, hashed),), effort))
    return cases


def _dense_grid(cuda: bool, quick: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Head dims and lengths."""
    if cuda:
        return ((128,), (1024, 4096, 16384)) if quick else ((64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384))
    return ((64,), (128, 512)) if quick else ((64, 128, 256), (128, 256, 512, 1024, 2048))


def _dense_size(cuda: bool, quick: bool) -> tuple[int, int]:
    """Width and B T."""
    return (2048, 16384) if cuda else (128, 512) if quick else (256, 2048)


def _decode_grid(cuda: bool, quick: bool) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Contexts, batches, query heads for each key head."""
    if cuda:
        return ((2048, 16384), (1, 16), (1, 8)) if quick else ((512, 2048, 8192, 32768), (1, 4, 16, 64), (1, 4, 8))
    return ((512,), (1, 4), (1, 4)) if quick else ((512, 2048, 8192), (1, 8), (1, 4, 8))


def _lengths(cuda: bool, quick: bool) -> tuple[int, ...]:
    if cuda:
        return (1024, 4096) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    return (128, 256) if quick else (128, 256, 512, 1024, 2048)


GROUPS = ("dense", "decode", "memory")  # every other group is a case where torch is slow, named by it


def kind_of(row: Row) -> str:
    """What a row of the group "memory" is: its case, the causal dense one named FULL, the hashed one in a single chunk SHARED."""
    if row.function == HASHED:
        return SHARED if (row.detail or {})["block"] >= row.T else HASHED
    return FULL if row.function == "dense" else row.function


def curve(rows: list[Row], kind: str, provider: str, quantity: str = "seconds") -> dict[int, float]:
    """T -> seconds or bytes of a provider in the group "memory"; only rows that passed their check."""
    found = {
        r.T: getattr(r, quantity) for r in rows if r.group == "memory" and r.ok and r.provider == provider and kind_of(r) == kind
    }
    return dict(sorted((T, float(v)) for T, v in found.items() if v is not None))


def flops(row: Row) -> float:
    """FLOP/s by FORMULA."""
    assert row.detail is not None
    return row.detail["flops"] / row.seconds


def _unit(rows: list[Row]) -> tuple[float, str]:
    return (1e12, "TFLOP/s") if rows and rows[0].device.startswith("cuda") else (1e9, "GFLOP/s")


def copy_bandwidth(results: Results) -> float:
    """bytes/s of the largest copy, which is beyond every cache; NaN if none was measured."""
    return max((p.copy[max(p.copy)] for p in results.peaks if p.copy), default=float("nan"))


def _point(row: Row) -> tuple[Any, ...]:
    """Rows that compute the same."""
    d = row.detail or {}
    return (
        row.group,
        row.function,
        row.mode,
        row.T,
        row.B,
        row.H,
        row.dtype,
        *(d.get(k) for k in ("E", "kv_heads", "S", "causal")),
    )


def _points(rows: list[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(_point(row), {})[row.provider] = row
    return found


def own_of(participants: dict[str, Row]) -> Row | None:
    return participants.get(OWN) or participants.get(OWN_MODULE)


def fastest_other(participants: dict[str, Row]) -> Row | None:
    """The fastest program that is not fastseq's."""
    timed = [r for name, r in participants.items() if r.ok and r.time and name not in (OWN, OWN_MODULE)]
    return min(timed, key=lambda r: r.seconds, default=None)


def _name(row: Row) -> str:
    d = row.detail or {}
    groups = f" GQA {d['heads'] // d['kv_heads']}" if d["heads"] != d["kv_heads"] else ""
    causal = " causal" if d["causal"] else ""
    keys = f" S={d['S']}" if row.group == "decode" else ""
    what = f"{row.group} {row.function}" if row.group == "memory" else row.group
    return f"{what}{causal} {ALL_MODES[row.mode]} T={row.T}{keys} B={row.B} H={d['heads']}{groups} E={d['E']} {row.dtype}"


def derive(results: Results) -> dict[str, Any]:
    rows = results.of_suite(NAME)
    losses, untimed = [], []
    for participants in _points(rows).values():
        own, other = own_of(participants), fastest_other(participants)
        if own is None or other is None:
            continue
        if not own.ok:
            untimed.append({"point": _name(own), "reason": own.reason})
        elif own.seconds > other.seconds:
            losses.append({"point": _name(own), "to": other.provider, "ratio": other.seconds / own.seconds})
    growth = []
    for kind, provider in product(_kinds(rows), LENGTH_PROGRAMS):
        for quantity in ("seconds", "memory"):
            points = curve(rows, kind, provider, quantity)
            fit = power_law(list(points), list(points.values()))
            if fit:
                growth.append({"case": kind, "provider": provider, "quantity": quantity, "exponent": fit.exponent, "r2": fit.r2})
    return {"targets": _targets(results), "losses": losses, "untimed": untimed, "growth": growth}


def _targets(results: Results) -> list[dict[str, Any]]:
    """Each with the least value over its points; none on devices that have no targets."""
    if TARGET_DEVICE not in str(results.environment.get("device name", "")):
        return []
    points = list(_points(results.of_suite(NAME)).values())
    found = []

    def judge(name: str, target: float, values: list[tuple[float, list[Row]]]) -> None:
        least, rows = min((value for value, _ in values), default=None), [row for _, of in values for row in of]
        reached = least is not None and least >= target
        found.append({"target": name, "least": target, "found": least, "reached": reached, "reliable": reliable(rows)})

    cudnn = next(iter(FORCED))
    for mode, target in DENSE_TARGETS.items():
        values = _over([p for p in points if _is(p, "dense", mode) and _first(p).T >= 4096 and _E(p) < 256], cudnn)
        judge(f"dense, hd 64 and 128, T ≥ 4096, {ALL_MODES[mode]}, over {cudnn}", target, values)
    for name, (provider, target) in TARGETS.items():
        mode = "inference" if name in ("hd 256", "averaged weights", "padding + causal") else "training"
        judge(f"{name}, {ALL_MODES[mode]}, over {provider}", target, _over([p for p in points if _is(p, name, mode)], provider))
    copy = copy_bandwidth(results)
    shares = [
        (_gb(r) * 1e9 / copy, [r])
        for p in points
        if _is(p, "decode", "inference") and (r := own_of(p)) and r.ok and _S(p) >= 8192
    ]
    judge("decode, context ≥ 8192, share of copy bandwidth", DECODE_TARGET, shares)
    return found


def _first(participants: dict[str, Row]) -> Row:
    return next(iter(participants.values()))


def _is(participants: dict[str, Row], group: str, mode: str) -> bool:
    row = _first(participants)
    return (row.group, row.mode) == (group, mode)


def _E(participants: dict[str, Row]) -> int:
    return (_first(participants).detail or {})["E"]


def _S(participants: dict[str, Row]) -> int:
    return (_first(participants).detail or {})["S"]


def _over(points: list[dict[str, Row]], provider: str) -> list[tuple[float, list[Row]]]:
    """Speed-ups of fastseq over a provider, where both have a time, with these two rows."""
    pairs = [(p.get(provider), own_of(p)) for p in points]
    return [(base.seconds / own.seconds, [base, own]) for base, own in pairs if base and own and base.ok and own.ok]


def _gb(row: Row) -> float:
    """GB/s at which keys and values were gone through."""
    assert row.detail is not None
    return row.detail["bytes"] / row.seconds / 1e9


def _kinds(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(kind_of(r) for r in rows if r.group == "memory"))


def present(results: Results) -> list[Section]:
    rows, derived = results.of_suite(NAME), derive(results)
    text = [
        f"{_unit(rows)[1]}: {FORMULA}; H query heads, T queries, S keys, E features. Backward: timed alone, through one graph.",
        "Every provider computes on the same tensors under the same flags, and has a time only if outputs and gradients are "
        "within twice the error of the textbook form in that dtype, against fp64. Masks and bucket indices without gradient "
        "are built before the clock starts, on all sides; biases with gradient, inside.",
    ]
    tables = [_target_table(derived), *_dense_tables(rows), _feature_table(rows), _decode_table(results, rows)]
    tables += [_length_table(rows, derived, quantity) for quantity in ("memory", "seconds")]
    tables += [_loss_table(derived), _what_ran(rows)]
    figures = [_dense_figure(rows), _memory_figure(rows)]
    return [
        Section("Attention", text, _cards(rows), [f for f in figures if f], [t for t in tables if t.rows]),
    ]


def picture(results: Results) -> Figure:
    rows = results.of_suite(NAME)
    figure = _dense_figure(rows) or _memory_figure(rows)
    if figure is None:
        raise ValueError("--picture: this run of the suite attention has neither dense rows nor memory rows")
    return figure


def _target_table(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = []
    for t in derived["targets"]:
        verdict = target_cell(t)
        body.append([t["target"], f"{t['least']:g}", "–" if t["found"] is None else f"{t['found']:.2f}", verdict])
    return Table("Targets", ["", "at least", "lowest point", ""], body)


def _dense_tables(rows: list[Row]) -> list[Table]:
    dense = [r for r in rows if r.group == "dense"]
    lengths = sorted({r.T for r in dense})
    scale, unit = _unit(dense)
    tables = []
    for E, causal, mode in product(sorted({_of(r, "E") for r in dense}), (False, True), ALL_MODES):
        at = {(r.provider, r.T): r for r in dense if r.mode == mode and _of(r, "E") == E and _of(r, "causal") == causal}
        body: list[list[Cell | str]] = []
        for provider in CORE:
            own = [at.get((provider, T)) for T in lengths]
            if any(r and r.ok for r in own):
                body.append([provider, *(_flops_cell(r, scale) for r in own), _roofline_cell([r for r in own if r and r.ok])])
        own_rows = [at.get((OWN, T)) for T in lengths]
        if any(own_rows):
            body.append([f"{OWN} over {SDPA}", *(ratio_cell(r) for r in own_rows), ""])
        title = f"{unit}, {'causal' if causal else 'full'}, head dim {E}, {ALL_MODES[mode]}"
        tables.append(Table(title, ["", *(f"T={T}" for T in lengths), "of roofline, longest"], body))
    return tables


def _of(row: Row, key: str) -> Any:
    return (row.detail or {})[key]


def _flops_cell(row: Row | None, scale: float) -> Cell:
    if row is None or not row.ok:
        return time_cell(row)
    return Cell(three_digits(flops(row) / scale), "", f"{time_text(row.seconds)}; {', '.join(row.chose)}")


def _roofline_cell(rows: list[Row]) -> Cell:
    row = rows[-1]
    return (
        Cell(f"{row.of_roofline:.0%}", "", f"bound by {row.roofline['bound']}: {row.roofline['note']}")
        if row.roofline
        else Cell("–", "weak")
    )


def _feature_table(rows: list[Row]) -> Table:
    """One line for each case and mode: every provider's time, the speed-up over torch, and over the fastest other program."""
    body: list[list[Cell | str]] = []
    for participants in _points([r for r in rows if r.group not in GROUPS]).values():
        own, first = own_of(participants), _first(participants)
        other = fastest_other(participants)
        against = Cell("–", "weak")
        if own and own.ok and other:
            ratio = other.seconds / own.seconds
            against = Cell(f"{ratio:.2f}×", "good" if ratio > 1.05 else "bad" if ratio < 1 else "", other.provider)
        torch_row = participants.get(SDPA) or participants.get(TORCH_MODULE)
        memory = [bytes_text(r.memory if r and r.ok else None) for r in (torch_row, own)]
        d = first.detail or {}
        size = (
            f"T={first.T} B={first.B} H={d['heads']}"
            + (f"/{d['kv_heads']}" if d["kv_heads"] != d["heads"] else "")
            + f" E={d['E']}"
        )
        times = [time_cell(participants.get(p)) for p in (EAGER, SDPA, FLEX, FLASH, ONNX)]
        if torch_row is not None and torch_row.provider == TORCH_MODULE:
            times[1] = time_cell(torch_row)
        chosen = ", ".join(torch_row.chose[:1]) if torch_row and torch_row.ok else ""
        body.append([first.group, ALL_MODES[first.mode], size, *times, time_cell(own), ratio_cell(own), against, *memory, chosen])
    programs = ["eager", "torch", "FlexAttention", "flash-attn", "ONNX Runtime", "fastseq"]
    columns = ["case", "mode", "size", *programs, "vs torch", "vs fastest other"]
    return Table(
        "Where torch is slow",
        [*columns, "torch peak", "fastseq peak", "torch chose"],
        body,
        "torch: scaled_dot_product_attention with a mask for the case, or nn.MultiheadAttention for averaged weights and for "
        "padding. T5 table: the bias is gathered inside. Transformer-XL: the term over distances is a mask for torch.",
    )


def _decode_table(results: Results, rows: list[Row]) -> Table:
    body: list[list[Cell | str]] = []
    copy = copy_bandwidth(results)
    for participants in _points([r for r in rows if r.group == "decode"]).values():
        own, first = own_of(participants), _first(participants)
        line: list[Cell | str] = [str(_of(first, "S")), str(first.B), str(_of(first, "heads") // _of(first, "kv_heads"))]
        for name in (SDPA, FLEX, FLASH, ONNX, OWN):
            r = participants.get(name)
            line.append(Cell(f"{three_digits(_gb(r))} GB/s", "", time_text(r.seconds)) if r and r.ok else time_cell(r))
        share = f"{_gb(own) * 1e9 / copy:.0%}" if own and own.ok else "–"
        body.append([*line, share, ratio_cell(own)])
    return Table(
        "Decoding: one query against a cache",
        ["context", "B", "GQA", SDPA, FLEX, FLASH, ONNX, OWN, "of copy", "vs torch"],
        body,
        f"GB/s of keys, values, query and result. Of copy: fastseq's share of the bandwidth of a copy beyond every cache, "
        f"{copy / 1e9:.0f} GB/s read and written in this run; a cache of keys that fits one of the device's own is above it.",
    )


def _length_table(rows: list[Row], derived: dict[str, Any], quantity: str) -> Table:
    at = {(kind_of(r), r.provider, r.T): r for r in rows if r.group == "memory"}
    lengths = sorted({T for _, _, T in at})
    growth = {(g["case"], g["provider"]): g["exponent"] for g in derived["growth"] if g["quantity"] == quantity}
    body: list[list[Cell | str]] = []
    for kind, provider in product(_kinds(rows), LENGTH_PROGRAMS):
        found = [at.get((kind, provider, T)) for T in lengths]
        if not any(found):
            continue
        if quantity == "memory":
            cells = [Cell(bytes_text(r.memory)) if r and r.ok else time_cell(r) for r in found]
        else:
            cells = [time_cell(r) for r in found]
        exponent = growth.get((kind, provider))
        body.append([kind, provider, *cells, "–" if exponent is None else power(exponent)])
    title = "Peak memory" if quantity == "memory" else "Time"
    note = (
        f"{HASHED}: Reformer's, one round of hashing, chunks of {CHUNK}; {SHARED}: the same program with a single chunk, that is "
        "attention to every earlier position."
    )
    columns = ["case", "", *(f"T={T}" for T in lengths), "grows as"]
    any_hashed = HASHED in _kinds(rows)
    return Table(f"{title} against T, forward + backward, B=1", columns, body, note if any_hashed else "")


def _loss_table(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = [
        [loss["point"], Cell(f"{loss['ratio']:.2f}×", "bad"), loss["to"]]
        for loss in sorted(derived["losses"], key=lambda x: x["ratio"])
    ]
    body += [[u["point"], Cell("no time", "bad"), u["reason"] or ""] for u in derived["untimed"]]
    return Table(f"Points that fastseq loses: {len(body)}", ["point", "against the fastest other", ""], body)


def _what_ran(rows: list[Row]) -> Table:
    body: list[list[Cell | str]] = []
    for provider in (*ATTENTION_PROVIDERS, ONNX):
        own = [r for r in rows if r.provider == provider]
        if not own:
            continue
        wrong = [r for r in own if r.status == "wrong"]
        errors = [
            r.check["error"] / r.check["bound"] for r in own if r.check and r.check["error"] is not None and r.check["bound"]
        ]
        status = (
            Cell(f"{len(wrong)} wrong", "bad", wrong[0].reason or "")
            if wrong
            else Cell(f"≤ {max(errors):.0%}" if errors else "–")
        )
        reasons = list(dict.fromkeys(r.reason for r in own if r.reason))
        chosen = sorted({name for r in own for name in r.chose})
        timed = f"{sum(r.ok for r in own)} of {len(own)}"
        body.append([provider, timed, status, ", ".join(chosen) or "–", "; ".join(reasons[:4])])
    return Table(
        "What ran",
        ["", "points timed", "error, of its bound", "implementations", "why not the others"],
        body,
        "A provider that refuses a call, or was wrong, has no time and no speed-up.",
        folded=True,
    )


def _cards(rows: list[Row]) -> list[Card]:
    cards = []
    for participants in _points([r for r in rows if r.group in TARGETS and r.mode == "training"]).values():
        own = own_of(participants)
        if own and own.ok and own.ratio and not own.doubtful:
            value = own.ratio["median"]
            tone = "good" if value > 1.05 else "bad" if value < 1 else ""
            cards.append(Card(f"{value:.2f}×", f"{own.group}, T={own.T}, forward + backward, over {own.ratio['baseline']}", tone))
    return cards


def _dense_figure(rows: list[Row]) -> Figure | None:
    dense = [r for r in rows if r.group == "dense" and r.ok]
    if len({r.T for r in dense}) < 2:
        return None
    middle = sorted({_of(r, "E") for r in dense})
    E = 128 if 128 in middle else middle[0]
    scale, unit = _unit(dense)
    shown = [r for r in dense if _of(r, "E") == E]

    def draw(canvas: Any, theme: Any) -> None:
        every = canvas.subplots(2, 2)
        for axes, (causal, mode) in zip(every.flat, product((False, True), ("inference", "backward")), strict=True):
            title = f"{'causal' if causal else 'full'}, {ALL_MODES[mode]}, head dim {E}: {unit}"
            lines = {
                p: {r.T: flops(r) / scale for r in shown if (r.provider, r.mode, _of(r, "causal")) == (p, mode, causal)}
                for p in CORE
            }
            _lines(axes, theme, title, lines, lambda v: f"{v:g}", 2)

    return Figure(f"{unit} against T, head dim {E}", FORMULA, draw, (11.5, 8.4))


def _memory_figure(rows: list[Row]) -> Figure | None:
    kinds = [k for k in _kinds(rows) if len(curve(rows, k, SDPA, "memory")) > 1][:6]
    if not kinds:
        return None

    def draw(canvas: Any, theme: Any) -> None:
        every = canvas.subplots(-(-len(kinds) // 3), min(3, len(kinds)), squeeze=False)
        for axes in every.flat[len(kinds) :]:
            axes.set_visible(False)
        for axes, kind in zip(every.flat, kinds, strict=False):
            lines = {p: curve(rows, kind, p, "memory") for p in (EAGER, SDPA, OWN)}
            _lines(axes, theme, f"{kind}: peak memory", lines, lambda v: tick_text(v, BYTE_UNITS), 4)

    caption = "Peak of what one call, forward and backward, allocated beside its operands."
    return Figure("Peak memory against T", caption, draw, (11.5, 3.6 * -(-len(kinds) // 3)))


def _lines(axes: Any, theme: Any, title: str, lines: dict[str, dict[int, float]], y_format: Any, y_base: int) -> None:
    lengths = sorted({T for line in lines.values() for T in line})
    log_axes(axes, theme, title=title, x=[float(T) for T in lengths], y_format=y_format, y_base=y_base)
    ends = []
    for name, line in lines.items():
        if not line:
            continue
        provider, own = (ATTENTION_PROVIDERS | ONNX_ATTENTION_PROVIDERS)[name], name == OWN
        T = sorted(line)
        style = {"linestyle": "--" if provider.dashed else "-", "linewidth": 2.6 if own else 1.5, "zorder": 4 if own else 3}
        axes.plot(T, [line[t] for t in T], color=provider.color, marker="o", markersize=4 if own else 3, **style)
        ends.append((line[T[-1]], name, provider.color))
    if ends:
        axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.06)
        end_labels(axes, ends)
