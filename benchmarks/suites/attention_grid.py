"""The grid of attention on a CPU: torch's best setting against fastseq at every point, and a gate for each claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..providers.attention import EAGER, FLEX_ON_CPU, MATH, OWN, OWN_MODULE, SDPA, TORCH_MODULE
from ..providers.models import AFTER, BEFORE
from ..providers.onnx_attention import FUNCTIONS as ON_ONNX
from ..providers.onnx_attention import ONNX
from ..report.model import Cell, Figure, Section, Table, time_cell
from ..report.plots.strip import Strip, draw
from ..roofline.peaks import Peaks
from ..workloads.attention import AttentionWorkload
from ..workloads.attention_stand_ins import AttentionStandIn, AttentionStandInWorkload, Encoder
from ..workloads.base import MODES, Workload
from . import gates
from .recurrent import over_onnx

NAME = "attention-grid"
SUMMARY = "attention on a CPU, every point: fp32 and bf16, short and long, windows, biases, modules, decoding; the gates over it"

HEADS = 8
LEAST = 0.97  # of torch's speed at every point: what a run can tell from being as fast
SAME = 0.97  # of torch's error: what is as exact
TORCH, FLEXS, ONNXS, BANDWIDTH, ALONE = "torch", "FlexAttention", "ONNX Runtime", "read bandwidth", "one thread"
OTHERS = {TORCH: (SDPA, MATH, EAGER, TORCH_MODULE, BEFORE), FLEXS: (FLEX_ON_CPU,), ONNXS: (ONNX,)}
OURS = (OWN, OWN_MODULE, AFTER)
GROUPS = {
    "dense": "attention, no mask or causal",
    "window": "128 keys on either side of a query",
    "scores": "what is added to the scores, or caps them",
    "modules": "nn.MultiheadAttention",
    "encoder": "nn.TransformerEncoder, four layers",
    "decode": "one query against a cache, eight query heads for a key head",
}
ENCODER = AttentionStandIn("nn.TransformerEncoder", Encoder, 1, 64)


@dataclass(frozen=True)
class EncoderWorkload(AttentionStandInWorkload):
    """Its own lengths and batches; dropout in training, as the module has it by default."""

    @property
    def row(self) -> AttentionStandIn:
        return ENCODER


def plan(options: Options) -> list[Case]:
    quick, cores = options.quick, torch.get_num_threads()
    threads = options.threads or ((1,) if quick or cores == 1 else (1, 2))
    dtypes = ("float32", "bfloat16") if options.dtype == "float32" else (options.dtype,)
    effort = Effort(seconds=0.1, min_rounds=3, max_rounds=15) if quick else Effort(seconds=0.5, min_rounds=5, max_rounds=60)
    cases = []

    def add(group: str, w: Workload, torchs: tuple[str, ...], own: str = OWN, others: tuple[str, ...] = ()) -> None:
        w = replace(w, device=options.device)
        inference = w.device == "cpu" and w.mode == "inference"
        others += (ONNX,) if inference and w.function in ON_ONNX and w.dtype == "float32" else ()
        participants = tuple(Participant(name, w) for name in (*torchs, own, *(others if inference else ())))
        cases.append(Case(NAME, group, participants, effort, ((own, torchs[0]),)))

    def make(function: str, T: int, E: int, mode: str, dtype: str, **more: Any) -> AttentionWorkload:
        sizes = {"B": 1, "heads": HEADS, "threads": threads[0], **more}
        width = sizes["heads"] * E
        return AttentionWorkload(function, T=T, I=width, H=width, mode=mode, dtype=dtype, **sizes)

    lengths = (32, 128, 512) if quick else (16, 32, 64, 128, 256, 512, 2048)
    for E, dtype, T, causal, mode, n in product((64, 128), dtypes, lengths, (False, True), MODES, threads):
        if quick and (E, T) not in ((64, 32), (64, 128), (64, 512), (128, 128)):
            continue
        if n > threads[0] and (E, mode) != (64, "inference"):
            continue
        add("dense", make("dense", T, E, mode, dtype, causal=causal, threads=n), (SDPA, MATH))
    for T, dtype in product((1024,) if quick else (1024, 4096), dtypes):
        add("window", make("band", T, 64, "inference", dtype, window=128), (SDPA,), others=(FLEX_ON_CPU,))
    for function, T, dtype in product(("bias", "alibi", "softcap", "t5"), (256,) if quick else (128, 512), dtypes):
        torchs = (EAGER,) if function == "softcap" else (SDPA, MATH)
        flex = () if quick or function == "bias" else (FLEX_ON_CPU,)
        for mode in MODES if function in ("bias", "t5") else ("inference",):
            add("scores", make(function, T, 64, mode, dtype), torchs, others=flex)
    for function, T, B, dtype in product(("self", "weights"), (32, 128) if quick else (32, 128, 512), (1, 8), dtypes):
        if not (quick and dtype != dtypes[0]):
            add("modules", make(function, T, 64, "inference", dtype, B=B, heads=4), (TORCH_MODULE,), OWN_MODULE)
    for T, B, mode, dtype in product((32, 128), (1, 8), MODES, dtypes):
        if not (quick and (B * T > 256 or dtype != dtypes[0])):
            dropout = 0.1 if mode == "training" else 0.0
            sizes: dict[str, Any] = {"heads": 4, "layers": 4, "vocabulary": 0, "dropout": dropout, "threads": threads[0]}
            add("encoder", EncoderWorkload(ENCODER.name, T, B, 256, 256, mode, dtype=dtype, **sizes), (BEFORE,), AFTER)
    for S, B, dtype in product((1024, 8192) if quick else (1024, 4096, 32768), (1, 8), dtypes):
        add("decode", make("decode", 1, 128, "inference", dtype, B=B, keys=S, kv_heads=1), (SDPA,))
    return cases


def _of(r: Row, key: str) -> Any:
    return (r.detail or {}).get(key)


def _in(group: str, mode: str = "", dtype: str = "", **wanted: Any) -> Callable[[Row], bool]:
    """Rows of a group with one thread, and these values of columns or details; a tuple: any of them."""

    def counts(r: Row) -> bool:
        if r.group != group or r.threads != 1 or mode not in ("", r.mode) or dtype not in ("", r.dtype):
            return False
        found = {key: getattr(r, key, None) if hasattr(r, key) else _of(r, key) for key in wanted}
        return all(found[key] in (value if isinstance(value, tuple) else (value,)) for key, value in wanted.items())

    return counts


def _either(*ways: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda r: any(way(r) for way in ways)


def _pair(title: str, counts: Callable[[bool], Callable[[Row], bool]], *limits: tuple[float, float]) -> list[gates.Gate]:
    """Of full attention and of causal, whose limits differ."""
    names = ("full", "causal")
    return [
        gates.Gate(f"{title}, {name}", must, goal, counts(name == "causal"), over=TORCH)
        for name, (must, goal) in zip(names, limits, strict=True)
    ]


def _large(causal: bool) -> Callable[[Row], bool]:
    wide: dict[str, Any] = {"mode": "inference", "dtype": "float32", "causal": causal}
    return _either(_in("dense", T=2048, **wide), _in("dense", E=128, T=(128, 256, 512), **wide))


def _more_threads(r: Row) -> bool:
    return r.group == "dense" and r.threads > 1 and r.T >= 128


def _learned(title: str, dtype: str, must: float, goal: float) -> gates.Gate:
    return gates.Gate(f"{title} forward + backward", must, goal, _in("dense", "training", dtype), mean=True, over=TORCH)


MIDDLE = (128, 256, 512)
GATES = (
    *_pair(
        "fp32 forward, T 128 to 512, E 64",
        lambda causal: _in("dense", "inference", "float32", T=MIDDLE, E=64, causal=causal),
        (1.3, 1.5),
        (1.9, 2.5),
    ),
    *_pair("fp32 forward, T 2048 or E 128", _large, (1.1, 1.4), (1.25, 1.7)),
    *_pair(
        "bf16 forward, T from 128 on",
        lambda causal: _in("dense", "inference", "bfloat16", T=(*MIDDLE, 2048), causal=causal),
        (1.85, 2.4),
        (2.3, 4.0),
    ),
    _learned("fp32", "float32", 1.25, 1.6),
    _learned("bf16", "bfloat16", 2.5, 4.0),
    gates.Gate("forward, T = 16, 32, 64", 1.2, 2.0, _in("dense", "inference", T=(16, 32, 64)), over=TORCH),
    gates.Gate("window ±128, T = 1024", 3.0, 5.0, _in("window", T=1024), over=TORCH),
    gates.Gate("window ±128, T = 4096", 8.0, 15.0, _in("window", T=4096), over=TORCH),
    gates.Gate("window ±128", 1.2, 2.0, _in("window"), over=FLEXS),
    gates.Gate("dense bias, forward", 1.3, 2.0, _in("scores", "inference", function="bias"), over=TORCH),
    gates.Gate("ALiBi, forward", 6.0, 10.0, _in("scores", "inference", function="alibi"), over=TORCH),
    gates.Gate("softcap, forward", 4.0, 8.0, _in("scores", "inference", function="softcap"), over=TORCH),
    gates.Gate("T5 table, forward", 4.0, 8.0, _in("scores", "inference", function="t5"), over=TORCH),
    gates.Gate("dense bias with gradient, forward + backward", 1.5, 3.0, _in("scores", "training", function="bias"), over=TORCH),
    gates.Gate("T5 table with gradient, forward + backward", 4.0, 8.0, _in("scores", "training", function="t5"), over=TORCH),
    gates.Gate("nn.MultiheadAttention, eval, without weights", 1.05, 1.3, _in("modules", function="self"), over=TORCH),
    gates.Gate("nn.MultiheadAttention, eval, with weights", 1.1, 1.5, _in("modules", function="weights"), over=TORCH),
    gates.Gate("nn.TransformerEncoder, eval", 1.05, 1.3, _in("encoder", "inference"), over=TORCH),
    gates.Gate("nn.TransformerEncoder, training", 1.1, 1.3, _in("encoder", "training"), over=TORCH),
    gates.Gate("decoding, share of the read bandwidth", 0.8, 0.95, _in("decode"), over=BANDWIDTH),
    gates.Gate("every point", LEAST, 1.1, lambda r: r.group != "decode", over=TORCH),
    gates.Gate("every point that ONNX Runtime has", 1.0, 1.0, lambda r: r.group != "decode", over=ONNXS),
    gates.Gate("speed-up with more threads, over that with one", 0.9, 1.0, _more_threads, over=ALONE),
    gates.Gate("error against fp64, root mean square: torch's least over ours", SAME, 2.0, lambda r: True, over=gates.ERROR),
)
PARTIAL = (FLEXS, ONNXS, ALONE)  # which have not every point


@dataclass(frozen=True)
class Points:
    """Rows by what they compute, and by whom."""

    rows: dict[tuple[Any, ...], dict[str, Row]]
    peaks: list[Peaks]

    @classmethod
    def of(cls, results: Results) -> Points:
        rows: dict[tuple[Any, ...], dict[str, Row]] = {}
        for r in results.of_suite(NAME):
            rows.setdefault(point_of(r), {})[r.provider] = r
        return cls(rows, results.peaks)

    def others(self, own: Row, which: str) -> list[Row]:
        at = self.rows.get(point_of(own), {})
        return [at[name] for name in OTHERS[which] if name in at and at[name].ok]

    def speed_up(self, own: Row, which: str) -> float | None:
        """Over the fastest of them, by medians."""
        times = [r.seconds for r in self.others(own, which) if r.time]
        return min(times) / own.seconds if times and own.ok and own.time else None


def point_of(r: Row, threads: int = 0) -> tuple[Any, ...]:
    return r.group, r.function, r.mode, r.dtype, r.T, r.B, r.H, threads or r.threads, str(r.detail)


def value_of(own: Row, gate: gates.Gate, points: Points) -> float | None:
    """What a gate asks of a row; None where that has no figure."""
    if gate.over == gates.ERROR:
        least = min((_rms(r) for r in points.others(own, TORCH) if _rms(r)), default=None)
        return least / _rms(own) if own.ok and least and _rms(own) else None
    if gate.over == BANDWIDTH:
        peaks = next((p for p in points.peaks if p.threads == own.threads), None)
        size = float(_of(own, "bytes") or 0)
        return size / own.seconds / peaks.read_bandwidth(size) if own.ok and own.time and peaks else None
    if gate.over == ALONE:
        single = next((r for name, r in points.rows.get(point_of(own, 1), {}).items() if name in OURS), None)
        pair = points.speed_up(own, TORCH), points.speed_up(single, TORCH) if single else None
        return pair[0] / pair[1] if pair[0] and pair[1] else None
    return points.speed_up(own, gate.over)


def _rms(r: Row) -> float:
    return (r.check or {}).get("rms") or 0.0


def name_of(r: Row) -> str:
    what = ("causal " if _of(r, "causal") else "") + (f"S={_of(r, 'S')} " if r.group == "decode" else "")
    E = f" E={r.H // _of(r, 'heads')}" if _of(r, "heads") else ""
    return f"{r.group} {r.function} {what}{r.dtype} {MODES[r.mode]} T={r.T} B={r.B}{E} threads={r.threads}"


def derive(results: Results) -> dict[str, Any]:
    points = Points.of(results)
    own = [r for r in results.of_suite(NAME) if r.provider in OURS]
    ratios = [(ratio, r) for r in own if (ratio := points.speed_up(r, TORCH)) is not None]
    verdicts = [_verdict(gate, [r for r in own if gate.counts(r)], points) for gate in GATES]
    return {
        "gates": verdicts,
        "losses": [name_of(r) for ratio, r in sorted(ratios, key=lambda pair: pair[0]) if ratio < LEAST],
        "untimed": [f"{name_of(r)}: {r.reason}" for r in own if not r.ok],
    }


def _verdict(gate: gates.Gate, counted: list[Row], points: Points) -> dict[str, Any]:
    return gates.verdict(gate, counted, lambda r: value_of(r, gate, points), name_of, partial=gate.over in PARTIAL)


def present(results: Results) -> list[Section]:
    points, derived = Points.of(results), derive(results)
    rows = results.of_suite(NAME)
    text = [
        "Speed-up is torch's median time over fastseq's, Python included, all measured in turn in one process; above 1 fastseq "
        "is faster. torch's is the faster of scaled_dot_product_attention as it chooses and of its math path; of capped scores, "
        f"which it has no kernel for, the formula. {HEADS} heads and B=1 unless it is said. ALiBi: torch's mask is made of the "
        "slopes in every call. T5: the bias is gathered in every call. ONNX Runtime has as many threads.",
        "Errors are those of outputs and, in training, of all gradients against fp64, of the actual sizes.",
    ]
    tables = [gates.table(derived["gates"]), *(_matrix(points, rows, group) for group in GROUPS), _onnx(points, rows)]
    tables.append(_losses(derived))
    cards = gates.cards(derived["gates"], TORCH)
    return [Section("The grid of attention on a CPU", text, cards, [picture(results)], [t for t in tables if t.rows])]


def _matrix(points: Points, rows: list[Row], group: str) -> Table:
    """Every point of a group: times, speed-ups and errors."""
    body: list[list[Cell | str]] = []
    for own in (r for r in rows if r.group == group and r.provider in OURS):
        line: list[Cell | str] = [name_of(own).removeprefix(f"{group} ")]
        fastest = min(points.others(own, TORCH), key=lambda r: r.seconds if r.time else float("inf"), default=None)
        line += [
            fastest.provider if fastest else "–",
            time_cell(fastest),
            time_cell(own),
            _ratio(own, points.speed_up(own, TORCH)),
        ]
        line += [_ratio(own, points.speed_up(own, which)) for which in (FLEXS, ONNXS)]
        errors = [min((_rms(r) for r in points.others(own, TORCH) if _rms(r)), default=0.0), _rms(own)]
        body.append([*line, *(f"{error:.1e}" if error else "–" for error in errors), ", ".join(own.chose)])
    columns = [
        "",
        "torch's fastest",
        "torch",
        "fastseq",
        "speed-up",
        "vs FlexAttention",
        "vs ONNX Runtime",
        "torch's error",
        "error",
        "",
    ]
    return Table(f"{GROUPS[group][:1].upper()}{GROUPS[group][1:]}", columns, body)


def _ratio(own: Row, value: float | None) -> Cell:
    if value is None:
        return Cell("–", "weak")
    return Cell(f"{value:.2f}×", "weak" if own.doubtful else "bad" if value < LEAST else "good" if value > 1.05 else "")


def _onnx(points: Points, rows: list[Row]) -> Table:
    pairs = [(r, points.rows[point_of(r)].get(ONNX)) for r in rows if r.provider in OURS]
    return over_onnx([(own, other) for own, other in pairs if other], name_of)


def _losses(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = [[point] for point in derived["losses"] + derived["untimed"]]
    return Table(f"Points below {LEAST:g}×, or without a time: {len(body)}", ["point"], body)


def picture(results: Results) -> Figure:
    """A strip for each group and dtype; of a row the speed-up over torch's choice, which its ratio is."""
    own = [r for r in results.of_suite(NAME) if r.provider in OURS and r.ok and r.ratio]
    dtypes = {"float32": "#1e88e5", "bfloat16": "#0f9a72"}
    panels = []
    for mode, title in MODES.items():
        strips = [
            Strip(
                f"{group}, {dtype}",
                dtypes.get(dtype, "#9467d6"),
                [r for r in own if (r.group, r.mode, r.dtype) == (group, mode, dtype)],
            )
            for group, dtype in product(GROUPS, dict.fromkeys(r.dtype for r in own))
            if any((r.group, r.dtype) == (group, dtype) for r in own)
        ]
        panels.append((title, strips))
    return Figure(
        "Speed-up over torch, every point of the grid of attention",
        "A point is one shape, mode and thread count; its size grows with the width. The bar is the geometric mean.",
        lambda canvas, theme: draw(canvas, theme, panels, width_unit=32),
        (13.5, 0.6 + 0.3 * max(len(strips) for _, strips in panels)),
    )
