"""The limits of this machine, each measured by a program that nothing else binds; the rooflines follow from them."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ..measure.case import Case, Options, Participant
from ..measure.results import Results, Row
from ..measure.timing import Effort
from ..providers.limits import LIMIT_PROVIDERS
from ..report.model import BYTE_UNITS, Card, Cell, Figure, Section, Table, bytes_text, tick_text, time_text
from ..report.plots.style import end_labels, log_axes, plain
from ..roofline import peaks
from ..workloads import limits
from ..workloads.limits import EXCHANGES, LimitWorkload

NAME = "limits"
SUMMARY = "what the machine can do: reading, copying, matrix products per precision, multiply-adds, launches, a CUDA graph"

PRECISIONS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {name: {"dtype": name} for name in ("float32", "bfloat16", "float64")},
    "cuda": {
        "bfloat16": {"dtype": "bfloat16"},
        "float16": {"dtype": "float16"},
        "tf32": {"dtype": "float32", "tf32": True},
        "float32": {"dtype": "float32"},
        "float64": {"dtype": "float64"},
    },
}
COLORS = {"read": "#1e88e5", "copy": "#d1495b", "product": "#9467d6"}
RATES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
AGREE = 0.2  # a peak that is further than this from the same program measured here makes rooflines doubtful


def plan(options: Options) -> list[Case]:
    kind = options.device.partition(":")[0]
    cores = torch.get_num_threads()
    threads = options.threads or ((1, cores) if kind == "cpu" and cores > 1 and not options.quick else (cores,))
    effort = Effort(seconds=0.1, min_rounds=3, max_rounds=15) if options.quick else Effort(seconds=0.4, max_rounds=60)
    every = slice(None, None, 2 if options.quick else 1)
    precisions = PRECISIONS[kind]
    if options.dtype != "float32":
        precisions = {options.dtype: {"dtype": options.dtype}}
    found = []
    for n in threads:
        found += [limits.read(options.device, kib, n) for kib in peaks.READ_KIB[kind][every]]
        found += [limits.copy(options.device, kib, n) for kib in peaks.COPY_KIB[kind]]
        orders = peaks.GEMM_SIZES[kind][: 2 if options.quick else None]
        found += [limits.product(options.device, order, n, **p) for p, order in product(precisions.values(), orders)]
        if kind == "cpu":
            found += [limits.fma(options.device, n, dtype=name) for name in precisions if name in limits.FMA_DTYPES]
        found.append(limits.launch(options.device, n))
    if kind == "cuda":
        found += [limits.exchange(options.device, name, threads[-1]) for name in EXCHANGES]
    return [_case(w, effort) for w in found]


def _case(w: LimitWorkload, effort: Effort) -> Case:
    group = "exchange" if w.function in EXCHANGES else w.function
    name = next(p.name for p in LIMIT_PROVIDERS.values() if p.function == w.function)
    return Case(NAME, group, (Participant(name, w),), effort)


def rate(row: Row, how: str = "time") -> float | None:
    """Bytes, FLOP or launches in a second; in a graph for how="graph". None where it was not measured."""
    timing = getattr(row, how)
    return (row.detail or {})["amount"] / timing["median"] if row.ok and timing else None


def precision(row: Row) -> str:
    return (row.detail or {})["precision"]


def derive(results: Results) -> dict[str, Any]:
    rows = results.of_suite(NAME)
    return {
        "products": _best(rows, "product"),
        "multiply-adds": _best(rows, "fma"),
        "products of multiply-adds": _shares(rows),
        "launches": [_launch(row) for row in rows if row.function == "launch" and row.ok],
        "exchanges": {row.function: row.seconds / row.T for row in rows if row.group == "exchange" and row.ok},
        "disagreeing": [_name(row) for row in _peak_rows(rows) if row.roofline and abs(row.of_roofline - 1) > AGREE],
    }


def _best(rows: list[Row], function: str) -> dict[str, float]:
    """FLOP/s by precision."""
    best: dict[str, float] = {}
    for row in rows:
        value = rate(row)
        if row.function == function and value is not None:
            best[precision(row)] = max(best.get(precision(row), 0.0), value)
    return best


def _shares(rows: list[Row]) -> list[dict[str, Any]]:
    """How much of the multiply-adds the best matrix product reaches, on as many threads."""
    found = []
    for name, n in dict.fromkeys((precision(row), row.threads) for row in rows if row.function == "fma"):
        own = [row for row in rows if row.threads == n]
        product, fma = (_best(own, function).get(name) for function in ("product", "fma"))
        if product and fma:
            found.append({"precision": name, "threads": n, "share": product / fma})
    return found


def _peak_rows(rows: list[Row]) -> list[Row]:
    """Those with a time, of matrix products the fastest order only: a peak is that of the best."""
    fastest: dict[tuple[Any, ...], Row] = {}
    for row in sorted((row for row in rows if rate(row) and row.group != "exchange"), key=lambda row: rate(row) or 0.0):
        fastest[row.function, row.threads, precision(row), None if row.function == "product" else row.H] = row
    return [row for row in rows if row in fastest.values()]


def _launch(row: Row) -> dict[str, Any]:
    """Seconds of one."""
    return {"threads": row.threads} | {
        name: 1 / value for name, how in (("eager", "time"), ("graph", "graph"), ("host", "host")) if (value := rate(row, how))
    }


def _name(row: Row) -> str:
    sizes = {"launch": "", "product": f" {precision(row)} {row.H}", "fma": f" {precision(row)}"}
    return f"{row.function}{sizes.get(row.function, ' ' + bytes_text(row.H << 10))}, {_where(row)}"


def _where(row: Row) -> str:
    return row.device if row.device != "cpu" else "1 thread" if row.threads == 1 else f"{row.threads} threads"


def present(results: Results) -> list[Section]:
    rows, derived = results.of_suite(NAME), derive(results)
    text = [
        "Read: one buffer summed again and again, each thread its share, as recurrent weights are read at every step. Copy: "
        "bytes read and written. Product: a square torch.mm of normal random numbers, the arithmetic within reach of a torch "
        "program; regular numbers such as zeros run faster on some devices. Multiply-adds: independent chains of them in a CPU's "
        "registers, the arithmetic beyond reach of any program. Launch: a fill of one element.",
        "Each program's result is compared with its definition first. The rooflines of every row follow from the same programs, "
        "measured apart at the start of a run, the best of a few; here it is the median.",
    ]
    tables = [_bandwidths(rows), _products(rows), _launches(derived), _exchanges(rows), _disagreeing(derived, rows)]
    return [Section("What limits this machine", text, _cards(derived, rows), [_figure(rows)], [t for t in tables if t.rows])]


def picture(results: Results) -> Figure:
    return _figure(results.of_suite(NAME))


def _cards(derived: dict[str, Any], rows: list[Row]) -> list[Card]:
    cards = [
        Card(_rate_text(value, "FLOP/s"), f"{what}, {name}")
        for key, what in (("products", "torch.mm"), ("multiply-adds", "multiply-adds in registers"))
        for name, value in derived[key].items()
    ]
    largest = max((row for row in rows if row.function == "copy" and row.ok), key=lambda r: (r.H, r.threads), default=None)
    if largest:
        cards.append(Card(_rate_text(rate(largest), "B/s"), f"copy of {bytes_text(largest.H << 10)}, {_where(largest)}"))
    for launch in derived["launches"][-1:]:
        cards += [Card(time_text(launch[how]), f"launch, {how}") for how in ("eager", "graph") if how in launch]
    return cards


def _rate_text(value: float | None, unit: str) -> str:
    return "–" if value is None else tick_text(value, tuple((scale, prefix + unit) for scale, prefix in RATES))


def _rate_cell(row: Row | None, unit: str) -> Cell:
    if row is None:
        return Cell("", "weak")
    if not row.ok or not row.time:
        return Cell(row.status, "bad" if row.status == "wrong" else "weak", row.reason or "")
    amount = (row.detail or {})["amount"]
    spread = f"{_rate_text(amount / row.time['high'], unit)} to {_rate_text(amount / row.time['low'], unit)}"
    return Cell(_rate_text(rate(row), unit), "", f"{spread}, {row.time['rounds']} rounds")


def _bandwidths(rows: list[Row]) -> Table:
    """A line for each size, columns for reading and copying on every number of threads."""
    streams = [row for row in rows if row.function in ("read", "copy")]
    columns = list(dict.fromkeys((row.function, row.threads) for row in sorted(streams, key=lambda r: r.function, reverse=True)))
    at = {(row.H, row.function, row.threads): row for row in streams}
    titles = [f"{function}, {_where(next(r for r in streams if r.threads == n))}" for function, n in columns]
    body: list[list[Cell | str]] = [
        [bytes_text(size << 10), *(_rate_cell(at.get((size, *column)), "B/s") for column in columns)]
        for size in sorted({row.H for row in streams})
    ]
    return Table("Bytes in a second", ["buffer", *titles], body)


def _products(rows: list[Row]) -> Table:
    found = [row for row in rows if row.function == "product"]
    orders = sorted({row.H for row in found})
    at = {(precision(row), row.threads, row.H): row for row in found}
    beyond = {(precision(row), row.threads): row for row in rows if row.function == "fma"}
    shares = {(of["precision"], of["threads"]): of["share"] for of in _shares(rows)}
    body: list[list[Cell | str]] = []
    for key in dict.fromkeys((precision(row), row.threads) for row in found):
        line: list[Cell | str] = [key[0], str(key[1]), *(_rate_cell(at.get((*key, order)), "FLOP/s") for order in orders)]
        if beyond:
            line += [_rate_cell(beyond.get(key), "FLOP/s"), f"{shares[key]:.0%}" if key in shares else "–"]
        body.append(line)
    more = ["multiply-adds", "torch.mm reaches"] if beyond else []
    note = "torch.mm reaches: the share of the multiply-adds in registers, on as many threads, that its best order gets to."
    columns = ["precision", "threads", *(f"order {order}" for order in orders), *more]
    return Table("Matrix products", columns, body, note if beyond else "")


def _launches(derived: dict[str, Any]) -> Table:
    body: list[list[Cell | str]] = [
        [str(found["threads"]), *(time_text(found.get(how, float("nan"))) for how in ("eager", "graph", "host"))]
        for found in derived["launches"]
    ]
    note = f"One of {limits.LAUNCHES} in a row. In a graph: replayed as a CUDA graph. Host: until the call returns."
    return Table("Launches", ["threads", "eager", "in a graph", "host"], body, note)


def _exchanges(rows: list[Row]) -> Table:
    """Rows without a time say why."""
    body: list[list[Cell | str]] = [
        [row.function, time_text(row.seconds / row.T) if row.ok else Cell(row.status, "weak"), row.reason or ""]
        for row in rows
        if row.group == "exchange"
    ]
    note = (
        f"Of one step, in a kernel of {limits.EXCHANGE_STEPS}: a barrier of all multiprocessors or of a cluster; a state of "
        f"{limits.HAND_OFF_CTAS} x {16 * limits.HAND_OFF_VECTORS} bytes that every CTA gets from all. They bound a sequence in "
        "one launch."
    )
    return Table("Exchange between multiprocessors within a kernel", ["", "of a step", ""], body, note)


def _disagreeing(derived: dict[str, Any], rows: list[Row]) -> Table:
    at = {_name(row): row for row in rows}
    body: list[list[Cell | str]] = [[name, f"{at[name].of_roofline:.0%}"] for name in derived["disagreeing"]]
    note = f"More than {AGREE:.0%} from the peak that the rooflines of this run follow from: the machine was not quiet."
    return Table("Peaks that were not found again", ["", "of the peak"], body, note, folded=True)


def _figure(rows: list[Row]) -> Figure:
    return Figure(
        "The limits of this machine",
        "Left: bytes in a second against the size of the buffer; a copy's bytes are those read and written. Right: matrix "
        "products of random numbers, the best order of each precision, and multiply-adds in registers.",
        lambda canvas, theme: _draw(canvas, theme, rows),
        (11.5, 4.2),
        alt="; ".join(
            f"{_name(row)}: {_rate_text(rate(row), limits.AMOUNTS[row.function] + '/s')}"
            for row in rows
            if row.ok and row.group != "exchange"
        ),
    )


def _draw(canvas: Any, theme: Any, rows: list[Row]) -> None:
    streams, bars = canvas.subplots(1, 2)
    found = [row for row in rows if row.function in ("read", "copy") and rate(row)]
    sizes = sorted({row.H for row in found})
    if found:
        ticks = [float(size << 10) for size in sizes]
        log_axes(streams, theme, title="bytes in a second", x=ticks, y_format=lambda v: _rate_text(v, "B/s"), x_label="buffer")
        shown = ticks[:: -(-len(ticks) // 6)]
        streams.set_xticks(shown, [tick_text(v, BYTE_UNITS) for v in shown])
    ends = []
    for function, n in dict.fromkeys((row.function, row.threads) for row in found):
        own = sorted((row.H << 10, rate(row) or 0.0) for row in found if (row.function, row.threads) == (function, n))
        dashed = "--" if function == "copy" else "-"
        streams.plot(
            *zip(*own, strict=True), dashed, color=COLORS[function], marker="o", markersize=3.5, alpha=0.95 if n > 1 else 0.6
        )
        where = next(_where(row) for row in found if row.threads == n)
        ends.append((own[-1][1], f"{function}, {where}", COLORS[function]))
    end_labels(streams, ends)
    plain(bars, theme, "matrix products, and multiply-adds in registers")
    best = _best(rows, "product") | {f"{name}, registers": value for name, value in _best(rows, "fma").items()}
    bars.barh(range(len(best)), list(best.values())[::-1], color=COLORS["product"], height=0.55)
    bars.set_yticks(range(len(best)), list(best)[::-1])
    for y, value in enumerate(reversed(best.values())):
        bars.annotate(
            _rate_text(value, "FLOP/s"), (value, y), xytext=(4, 0), textcoords="offset points", va="center", color=theme.ink
        )
    bars.set_xticks([])
    bars.margins(x=0.25)
