"""How the suite recurrent shows what a GPU did."""

from __future__ import annotations

from itertools import product
from typing import Any

from ..measure.results import Row
from ..providers.base import RECURRENT
from ..providers.recurrent import forced_name
from ..report.model import (
    Card,
    Cell,
    Figure,
    Section,
    Table,
    bytes_text,
    heat_cell,
    ratio_cell,
    speed_tone,
    target_cell,
    time_cell,
    time_text,
)
from ..report.plots.strip import Strip, draw
from ..workloads.base import MODES
from ..workloads.recurrent import PRECISIONS
from .recurrent_gpu import (
    GROUPS,
    base_of,
    cell_of,
    compiled_name,
    detail,
    forced_of,
    graph_ratio,
    is_own,
    loop_name,
    name,
    own_of,
    points_of,
)
from .recurrent_gpu_targets import LEAST, TARGETS, derive

MARK = "ᴾ"  # beside a speed-up: cuDNN may choose its persistent kernel
SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "tf32": "TF32", "float32": "fp32"}
WIDTH_UNIT = 32  # of the figure: H that makes a point larger by one


def present(rows: list[Row]) -> list[Section]:
    derived = derive(rows)
    text = [
        "Speed-up is torch.nn's median time over fastseq's, by CUDA events with a cold L2, measured in turn in one process. In a "
        "graph: both captured as CUDA graphs, which leaves the host out. Input width = hidden width; packing is not timed.",
        "Both sides run under the same flags. fp32: IEEE products in cuDNN and cuBLAS; TF32: in both. By torch's defaults its "
        "recurrent layers would use TF32, and its products IEEE.",
        f"cuDNN's algorithm is read from the names of the kernels that ran. {MARK}: torch lets cuDNN take its persistent kernel "
        "(fp16, one layer, one direction, H ≤ 1024 and I in steps of 128, B ≤ 128 in steps of 8, LSTM or RNN).",
    ]
    tables = [
        _targets("Targets", derived["targets"]),
        _targets("Targets of fastseq on CUDA C++", derived["CUDA targets"]),
        _persistent(rows),
    ]
    tables += [_matrix(rows, group, mode) for group in GROUPS for mode in MODES if group != "programs"]
    tables += [_programs(rows), _losses(rows), _plans(rows), _every_point(rows)]
    return [
        Section(
            "Recurrent layers against torch.nn on a GPU", text, _cards(derived), [figure(rows)], [t for t in tables if t.rows]
        )
    ]


def figure(rows: list[Row]) -> Figure:
    panels = [(f"{title}: speed-up over torch.nn", _strips(rows, mode)) for mode, title in MODES.items()]
    return Figure(
        "Speed-up over torch.nn, every point",
        "A point is one precision, length, batch and width; its size grows with the width. The bar is the geometric mean, the "
        "triangle the target of a group's every point. Left of 1× fastseq loses.",
        lambda canvas, theme: draw(canvas, theme, panels, width_unit=WIDTH_UNIT),
        (11.5, 1.2 + 0.33 * len(panels[0][1])),
    )


def _strips(rows: list[Row], mode: str) -> list[Strip]:
    strips = []
    measured = {(r.group, r.function) for r in rows}
    for group, cell in product(GROUPS, RECURRENT):
        if (group, cell.lower()) in measured:
            own = [r for r in rows if is_own(r) and (r.group, r.mode) == (group, mode) and cell_of(r.function) == cell]
            meant = (t for t in TARGETS if (t.strip, t.mode) == (group, mode) and any(t.counts(r) for r in own))
            least = next((t.least for t in meant), None)
            strips.append(Strip(f"{cell}, {group}", RECURRENT[cell], [r for r in own if r.ok and r.ratio], least))
    return strips


def _targets(title: str, targets: list[dict[str, Any]]) -> Table:
    body: list[list[Cell | str]] = []
    for t in targets:
        measured = t["found"] is not None
        verdict = target_cell(t)
        untimed = f", {t['untimed']} without a time" if t["untimed"] else ""
        shown = "{:.0%} of roofline" if t["of roofline"] else "{:.2f}×"
        figures = [shown.format(t["found"]), t["lowest"], shown.format(t["mean"])] if measured else ["–", "", "–"]
        least = shown.format(t["least"]) if t["of roofline"] else f"{t['least']:g}×"
        body.append([t["target"], MODES[t["mode"]], f"{t['points']}{untimed}", least, *figures, verdict])
    columns = ["", "mode", "points", "at least", "lowest", "where", "geometric mean", ""]
    return Table(title, columns, body, "Reached: by every point, all of them timed.")


def _cards(derived: dict[str, Any]) -> list[Card]:
    cards = []
    for m in (m for m in derived["means"] if m["reliable"]):
        kind = "inference" if m["mode"] == "inference" else "training step"
        cards.append(Card(f"{m['mean']:.2f}×", f"{GROUPS[m['group']]}, {kind}, {m['points']} points", speed_tone(m["mean"])))
    return cards


def _matrix(rows: list[Row], group: str, mode: str) -> Table:
    """A line for each cell, precision, length and batch, a column for each width."""
    own = {
        (list(RECURRENT).index(cell_of(r.function)), _rank(r), r.T, r.B, r.H): r
        for r in rows
        if is_own(r) and (r.group, r.mode) == (group, mode)
    }
    widths = sorted({H for *_, H in own})
    body: list[list[Cell | str]] = []
    for line in sorted({key[:-1] for key in own}):
        found = [own.get((*line, H)) for H in widths]
        first = next(r for r in found if r)
        sizes: list[Cell | str] = [cell_of(first.function), _precision(first), str(first.T), str(first.B)]
        body.append([*sizes, *(_heat(r) for r in found)])
    columns = ["cell", "precision", "T", "B", *(f"H={H}" for H in widths)]
    return Table(f"Speed-up, {GROUPS[group]}, {MODES[mode]}", columns, body, heat=True)


def _rank(row: Row) -> int:
    precision = detail(row, "precision")
    return PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)


def _precision(row: Row) -> str:
    return SHORT_NAMES.get(detail(row, "precision"), detail(row, "precision"))


def _heat(row: Row | None) -> Cell:
    return heat_cell(row, least=LEAST, mark=MARK if row and detail(row, "persistent") else "")


def _persistent(rows: list[Row]) -> Table:
    eligible = [p for p in points_of(rows) if (own := own_of(p)) and detail(own, "persistent")]
    body = [[_algorithms(base_of(p)), *_line(p)] for p in eligible]
    return Table(
        "Where torch lets cuDNN choose its persistent kernel",
        ["cuDNN ran", *LINE],
        body,
        "Its fastest path at these widths, and so listed apart from the others.",
    )


def _programs(rows: list[Row]) -> Table:
    body: list[list[Cell | str]] = []
    for p in points_of([r for r in rows if r.group == "programs"]):
        own = own_of(p) or next(iter(p.values()))
        cell = cell_of(own.function)
        compiled = p.get(compiled_name(cell))
        found = [p.get(loop_name(cell)), base_of(p), compiled, own]
        graphs = next((c for c in compiled.chose if c.startswith("compiled")), "–") if compiled else "–"
        times: list[Cell | str] = [cell for r in found for cell in (time_cell(r), _graph(r))]
        body.append([cell, MODES[own.mode], str(own.T), str(own.B), str(own.H), *times, ratio_cell(own), graphs])
    columns = [text for what in ("loop over cells", "torch.nn", "torch.compile", "fastseq") for text in (what, "in a graph")]
    return Table(
        "Beside other ways to run the layer",
        ["cell", "mode", "T", "B", "H", *columns, "fastseq vs torch.nn", "torch.compile made"],
        body,
        "No compiled graphs: torch.compile leaves torch's recurrent layer as it is, and its time is that of the layer.",
    )


def _losses(rows: list[Row]) -> Table:
    lost = [r for r in rows if is_own(r) and not (r.ok and r.ratio and r.ratio["median"] >= 1)]
    lost.sort(key=lambda r: r.ratio["median"] if r.ratio else 0.0)
    body: list[list[Cell | str]] = [[name(r), ratio_cell(r), r.reason or ", ".join(_ran(r))] for r in lost]
    return Table(f"Points that fastseq loses: {len(lost)}", ["point", "speed-up", ""], body)


LINE = [
    "point",
    "torch.nn",
    "in a graph",
    "fastseq",
    "in a graph",
    "speed-up",
    "in a graph",
    "on Triton",
    "on CUDA C++",
    "µs per step",
    "of roofline",
    "kernels",
    "peak",
]


def _line(participants: dict[str, Row]) -> list[Cell | str]:
    base, own = base_of(participants), own_of(participants)
    assert own is not None
    value = graph_ratio(participants)
    in_graph = Cell("–", "weak") if value is None else Cell(f"{value:.2f}×", speed_tone(value))
    return [
        name(own),
        time_cell(base),
        _graph(base),
        time_cell(own),
        _graph(own),
        ratio_cell(own),
        in_graph,
        *(ratio_cell(forced_of(participants, backend)) for backend in ("triton", "cuda")),
        f"{own.seconds / detail(own, 'steps') * 1e6:.2f}" if own.ok else "–",
        Cell(f"{own.of_roofline:.0%}", "", f"bound by {own.roofline['bound']}: {own.roofline['note']}")
        if own.ok and own.roofline
        else "–",
        "–" if own.launches is None else str(own.launches),
        bytes_text(own.memory if own.ok else None),
    ]


def _graph(row: Row | None) -> Cell:
    return Cell(time_text(row.graph["median"])) if row and row.graph else Cell("–", "weak")


def _algorithms(row: Row | None) -> str:
    return ", ".join(c.removeprefix("cuDNN: ") for c in row.chose if c.startswith("cuDNN: ")) if row else ""


def _ran(row: Row) -> list[str]:
    """fastseq's backends, and whether a sequence is one launch or one for each step."""
    backends = [c.removeprefix("backend: ") for c in row.chose if c.startswith("backend: ")]
    if row.launches is None:
        return backends
    return [*backends, "whole sequence" if row.launches < detail(row, "steps") else "step by step"]


def _plans(rows: list[Row]) -> Table:
    body: list[list[Cell | str]] = []
    for p in points_of(rows):
        row = p.get(forced_name(cell_of(next(iter(p.values())).function), "cuda"))
        if row is not None:
            plans = [c.removeprefix("plan, ") for c in row.chose if c.startswith("plan, ")]
            of_roofline = f"{row.of_roofline:.0%}" if row.ok and row.roofline else "–"
            body.append([name(row), time_cell(row), ratio_cell(row), of_roofline, row.reason or "; ".join(plans)])
    return Table(
        f"fastseq on CUDA C++: {len(body)}",
        ["point", "fastseq", "speed-up", "of roofline", "plan, or why there is no row"],
        body,
        "A plan is how the work of a call was cut for this device; its time of a step is a model's, not measured.",
        folded=True,
    )


def _every_point(rows: list[Row]) -> Table:
    found = [p for p in points_of(rows) if own_of(p)]
    body: list[list[Cell | str]] = []
    for p in found:
        own = own_of(p)
        assert own is not None
        error = f"{own.check['error']:.1e}" if own.check and own.check["error"] is not None else "–"
        eligible = MARK if detail(own, "persistent") else ""
        body.append([*_line(p), f"{_algorithms(base_of(p))}{eligible}", ", ".join(_ran(own)), error])
    return Table(
        f"Every point: {len(found)}",
        [*LINE, "cuDNN ran", "fastseq ran", "error"],
        body,
        "Kernels: launched by one call of fastseq. Roofline: the arithmetic at torch.mm's peak, or R read at every step from the "
        "cache that holds it; a kernel that keeps R in registers or shared memory can be above 100 %.",
        folded=True,
    )
