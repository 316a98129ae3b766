"""All that is generated in README.md and docs/: tables between markers, and pictures.

    python -m tools.pages            write them
    python -m tools.pages --check    tell which are not what the committed results say, and fail if any

From the files under benchmarks/results, and, for the pictures of masks, from calls of `fastseq.functional.attention`. A test
compares, so what a document says of a figure is what a file says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from fastseq import info
from fastseq.benchmarks import assembly
from fastseq.benchmarks.claims.table import verdicts
from fastseq.benchmarks.measure import combine
from fastseq.benchmarks.measure.environment import where
from fastseq.benchmarks.measure.results import Results
from fastseq.benchmarks.report import readme
from fastseq.benchmarks.report.model import Figure, bytes_text, time_text
from fastseq.benchmarks.report.plots import bars, heatmap, style
from fastseq.benchmarks.suites import SUITES, before_and_after, recurrent
from fastseq.benchmarks.suites import systems as systems_suite
from fastseq.benchmarks.workloads.systems import STEP, TOKEN
from fastseq.functional import attention

ROOT = Path(__file__).resolve().parent.parent
RESULTS, GALLERY = ROOT / "benchmarks/results", ROOT / "docs/gallery"
LAYERS = RESULTS / "intel-xeon-one-thread"  # recurrent layers, sequential against parallel; whole models in a file of their own
AMD = RESULTS / "amd-epyc-2-cores"  # what was measured there, in a file for each suite
MODELS = LAYERS / "models/results.json", AMD / "models.json"  # of whole models, the first in the picture
EVERY = RESULTS / "intel-xeon-2-cores"  # every suite, in fewer points
PACKED = LAYERS / "packed-lstm.json"  # of examples/packed_lstm.py
RANKS = AMD / "distributed.json"  # of the suite distributed
SYSTEMS = AMD / "systems.json"  # of the suite systems but for its text
ISSUE = {  # pytorch#149194: packed in percent of padded, forward and backward
    10: (527, 277), 20: (740, 461), 50: (1163, 382), 100: (1507, 396),
    200: (2300, 591), 500: (5968, 1716), 1000: (9583, 2794),
}  # fmt: skip
KEYS = 16  # of the pictures of masks


@cache
def results(folder: Path) -> Results:
    """All that a folder holds, in a file or in several."""
    return combine.load(sorted(folder.rglob("results.json")))


@cache
def models() -> list[Results]:
    """Of each machine."""
    return [combine.load([file]) for file in MODELS]


@cache
def layers() -> Results:
    """Of the file that README.md names."""
    return combine.load([LAYERS / "results.json"])


@cache
def system_costs() -> Results:
    return combine.load([SYSTEMS])


def devices() -> dict[str, Results]:
    """Every committed machine, by what tells it apart."""
    found = {}
    for folder in sorted(path for path in RESULTS.iterdir() if list(path.rglob("results.json"))):
        of = results(folder)
        threads = sorted({row.threads for row in of.rows})
        quick = ", quick run" if of.options.get("quick") else ""
        count = f"{threads[0]} thread" if threads == [1] else f"{threads[0]} to {threads[-1]} threads"
        found[f"{where(of.environment)} ({count}{quick})"] = of
    return found


# Pictures


def speed_ups() -> Figure:
    """Of layers, and of whole models, measured on one machine in one way."""
    groups = recurrent.bars(layers()) + before_and_after.bars(models()[0], "float32")
    title = f"Speed-up over torch.nn, float32, one thread: geometric mean and range\n{where(results(LAYERS).environment)}"
    return Figure(
        "Speed-up over torch.nn",
        title,
        lambda canvas, theme: bars.draw(canvas, theme, groups, title),
        (8.6, bars.height(groups)),
        alt="; ".join(f"{heading}: {', '.join(bar.words() for bar in of_kind)}" for heading, of_kind in groups),
    )


def maps() -> dict[str, Figure]:
    rows = layers().of_suite("recurrent")
    found = heatmap.maps(rows, ()), heatmap.figures(rows, ())
    return {f"map-{group}-{mode}": figure for (group, mode), figure in zip(*found, strict=True)}


def crossover() -> Figure:
    """Recurrence step by step, fused recurrence and attention against the length of the sequence."""
    return SUITES["sequential-vs-parallel"].picture(layers())


def systems() -> Figure:
    """What whole models cost."""
    return SUITES["systems"].picture(system_costs())


def by_name() -> dict[str, Figure]:
    return maps() | {"systems": systems()}


def memory() -> Figure:
    (section, *_) = SUITES["sequential-vs-parallel"].present(layers())
    return next(figure for figure in section.figures if "memory" in figure.title.lower())


def seen(q: Tensor | None = None, k: Tensor | None = None, scale: float = 0.0, **options: Any) -> Tensor:
    """Weights [queries, keys] of the last sequence and head of a call, whose values are one-hot."""
    heads = 1 if options.get("alibi_slopes") is None else len(options["alibi_slopes"])
    q = torch.zeros(1, heads, KEYS, 8) if q is None else q
    k = torch.zeros(1, heads, KEYS, 8) if k is None else k
    values = torch.eye(KEYS).expand(*k.shape[:2], KEYS, KEYS) if k.dim() == 4 else torch.eye(KEYS).unsqueeze(1)
    out = attention(q, k, values, **options)
    return out[-1, -1] if out.dim() == 4 else out[:, 0]


def _masks() -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 1]]).bool()
    ends = torch.tensor([0, 7, 11, KEYS], dtype=torch.int32)
    rows = torch.zeros(KEYS, 1, 8)
    distances = torch.linspace(-1, 1, 2 * KEYS - 1).mul(6).cos().mul(2).unsqueeze(0)
    slope, lengths = torch.tensor([0.25]), torch.tensor([11])
    layout = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)
    return {
        "causal": partial(seen, causal=True),
        "bottom-right": partial(seen, q=torch.zeros(1, 1, 10, 8), causal=True, alignment="bottom_right"),
        "window": partial(seen, causal=True, window_size=(4, 0)),
        "window-both": partial(seen, window_size=(4, 2)),
        "lengths": partial(seen, seqlens_q=lengths, seqlens_k=lengths, causal=True),
        "packed": partial(seen, q=rows, k=rows, cu_seqlens_q=ends, cu_seqlens_k=ends, causal=True),
        "mask": partial(seen, attn_mask=torch.rand(KEYS, KEYS, generator=generator) < 0.5),
        "blocks": partial(seen, attn_mask=layout),
        "relative-bias": partial(seen, relative_bias=distances),
        "alibi": partial(seen, causal=True, alibi_slopes=slope),
        "alibi-window": partial(seen, causal=True, window_size=(6, 0), alibi_slopes=slope),
        "sinks": partial(seen, causal=True, sinks=torch.tensor([1.5])),
    }


def picture_of(name: str, weights: Callable[[], Tensor]) -> Figure:
    def draw(canvas: Any, theme: Any) -> None:
        shade = weights().float()
        count = (shade > 0).sum(1, keepdim=True)
        # of its row's largest; a sink's share is missing from all of a row, so there against equal shares
        shade = shade * count if name == "sinks" else shade / shade.amax(1, keepdim=True).clamp(min=1e-9)
        axes = canvas.subplots()
        style.plain(axes, theme, "")
        axes.fill([0, KEYS, KEYS, 0], [0, 0, len(shade), len(shade)], color=theme.faint, linewidth=0)
        for i, row in enumerate(shade.tolist()):
            for j, value in enumerate(row):
                if value > 0:
                    x, y = [j + 0.05, j + 0.95, j + 0.95, j + 0.05], [i + 0.05, i + 0.05, i + 0.95, i + 0.95]
                    axes.fill(x, y, color="#3a8ac4", alpha=round(min(1.0, 0.15 + 0.85 * value), 2), linewidth=0)
        axes.set_xlim(0, KEYS)
        axes.set_ylim(len(shade), 0)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("keys", color=theme.ink, fontsize=8)
        axes.set_ylabel("queries", color=theme.ink, fontsize=8)

    return Figure(name, name, draw, (2.6, 2.6))


PICTURES: dict[str, Callable[[], Figure]] = {"speed-ups": speed_ups, "crossover": crossover, "memory": memory}


def pictures() -> dict[Path, Figure]:
    """Every generated picture by its place."""
    found = {GALLERY / f"{name}.svg": make() for name, make in PICTURES.items()}
    found |= {GALLERY / f"{name}.svg": figure for name, figure in by_name().items()}
    found |= {GALLERY / "masks" / f"{name}.svg": picture_of(name, weights) for name, weights in _masks().items()}
    return found


# Tables


def packed() -> str:
    """Packed in percent of padded: as the issue has it, and here."""
    file = json.loads(PACKED.read_text(encoding="utf-8"))
    sizes = file["sizes"]
    lines = [
        "| L | forward: the issue | torch.nn here | **fastseq** | backward: the issue | torch.nn here | **fastseq** |",
        "|---|---|---|---|---|---|---|",
    ]
    for length, times in file["seconds forward and backward"].items():
        cells = []
        for i in range(2):
            theirs, ours = (100 * times[f"{name} packed"][i] / times["torch padded"][i] for name in ("torch", "fastseq"))
            cells += [f"{ISSUE[int(length)][i]:,} %", f"{theirs:,.0f} %", f"**{ours:.0f} %**"]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    said = f"{where(file['environment'])}, torch {file['environment']['versions']['torch']}"
    about = (
        f"Packed in percent of torch.nn's padded time. Here: {said}, float32, {sizes['threads']} thread, batch {sizes['batch']}, "
        f"{sizes['width']} features, `python examples/packed_lstm.py`; the issue's columns are its author's."
    )
    return "\n".join([*lines, "", about])


NAMES = {
    "recurrent": "recurrence",
    "attention": "attention",
    "attention_decode": "attention with a KV cache",
    "scan": "scan",
}
WORDS = {"measured": "**measured**", "tested": "tested", "executed on the host only": "host", "not available": "–"}


def support() -> str:
    """Of every op, device and dtype how far its kernels were tried; calls that are alike in one row."""
    rows = json.loads(info.as_json())["matrix"]["rows"]
    dtypes = list(rows[0]["by_dtype"])
    folded: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        cells = tuple(f"{WORDS[cell['state']]}" for cell in row["by_dtype"].values())
        key = (NAMES[row["op"]], row["call"], row["device"].partition(" (")[0], *cells)
        folded.setdefault(key, []).append(f"{row['what']}")
    lines = [f"| op | of which | call | device | {' | '.join(dtypes)} |", "|---" * (4 + len(dtypes)) + "|"]
    merged: dict[tuple[str, ...], list[str]] = {}
    for (op, call, device, *cells), what in folded.items():
        merged.setdefault((op, ", ".join(what), device, *cells), []).append(call)
    for (op, which, device, *cells), calls in merged.items():
        lines.append(f"| {op} | {which} | {', '.join(calls)} | {device} | {' | '.join(cells)} |")
    return "\n".join(lines)


def distributed() -> str:
    """Of every program over several processes: time, bytes and memory of a rank."""
    of = combine.load([RANKS])
    rows, derived = of.of_suite("distributed"), SUITES["distributed"].derive(of)
    shares = {(found["program"], found["ranks"]): found["of its share"] for found in derived["memory"]}
    at: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in rows:
        if row.ok and row.metric and row.detail:
            key = row.function.partition(" ")[0], row.detail["ranks"], row.provider
            at.setdefault(key, {})[row.detail["what"]] = row.metric["median"]
    lines = ["| | ranks | program | time | sent by a rank | memory of its share |", "|---|---|---|---|---|---|"]
    for (kind, ranks, program), found in at.items():
        sent = bytes_text(found["bytes"]) if "bytes" in found else "–"
        share = f"{shares[program, ranks]:.2f}" if (program, ranks) in shares else "–"
        time = time_text(found["seconds"]) if "seconds" in found else "–"
        lines.append(f"| {kind} | {ranks} | {program} | {time} | {sent} | {share} |")
    first = {row.function: row for row in rows}
    sizes = "; ".join(f"{name.partition(' ')[0]}: T = {r.T}, B = {r.B}, width {r.H}" for name, r in first.items())
    load = of.environment.get("load average")
    about = (
        f"Forward and backward, fp32, a thread a process, gloo, on {where(of.environment)} (load average {load}); {sizes}. "
        "Memory: what a step of the whole adds to a rank's peak, over the same of one process divided by the ranks; 1 is linear, "
        "less is where one process holds what a rank makes part by part. On a machine with other work times say little."
    )
    return "\n".join([*lines, "", about])


def claims() -> str:
    return "\n".join(readme.verdict_tables({name: verdicts(of) for name, of in devices().items()})).rstrip()


def layer_figures() -> str:
    return assembly.figures(layers())


def model_words() -> str:
    """Where the models were measured, and what came of it, a point for each machine."""
    return "\n".join(f"* {_words_of_models(of)}" for of in models())


def _words_of_models(of: Results) -> str:
    threads = sorted({row.threads for row in of.of_suite("models")})
    said = f"{where(of.environment)}, torch {of.environment['versions']['torch']}, threads={', '.join(map(str, threads))}"
    return f"{said}: {before_and_after.words(of)}"


def model_table() -> str:
    return "\n\n".join("\n".join([_words_of_models(of), "", *before_and_after.table(of)]) for of in models())


def costs() -> str:
    """Of every system its times in the suite `systems`, and over those of torch's parts."""
    rows = [row for row in system_costs().of_suite("systems") if row.ok and row.time]
    own = [row for row in rows if row.provider.startswith("fastseq ")]
    places = [(stage, T) for stage in (STEP, TOKEN) for T in sorted({row.T for row in own if row.group == stage})]
    kept = f"kept, T={max(T for stage, T in places if stage == TOKEN)}"
    lines = [f"| system | {' | '.join(f'{stage}, T={T}' for stage, T in places)} | {kept} |", "|---" * (len(places) + 2) + "|"]
    for name in dict.fromkeys(row.function for row in own):
        of = {(row.group, row.T): row for row in own if row.function == name}
        cells = [name]
        for place in places:
            row = of.get(place)
            over = f" ({row.ratio['median']:.2f}×)" if row and row.ratio else ""
            cells.append(f"{time_text(row.seconds)}{over}" if row else "–")
        last = of.get((TOKEN, places[-1][1]))
        lines.append(f"| {' | '.join(cells)} | {bytes_text(last.kept) if last else '–'} |")
    gates = []
    for found in systems_suite.verdicts(system_costs().of_suite("systems")):
        below = "reached" if found["reached"] else "not reached"
        worst, must = found["worst"], found["must"]
        gates.append(f"{found['gate']} (at least {must} at each of {found['points']} points): {below}, "
                     f"lowest {worst['value']:.2f} ({worst['point']}), geometric mean {found['mean']:.2f}")  # fmt: skip
    first = own[0]
    about = (
        f"{where(system_costs().environment)}, {first.threads} thread, batch {first.B}, {first.dtype}; in parentheses how many "
        "times as fast as the same source on torch's parts. The picture: [gallery](gallery.md)."
    )
    return "\n".join([*lines, "", about, "", *[f"{gate}." for gate in gates]])


def gallery() -> str:
    """The page of the pictures: a heading, the picture, what it shows in words."""
    titles = {"speed-ups": "Speed-ups over torch.nn", "memory": "Memory"}
    lines = ["Machine and commit: " + where(layers().environment) + ", one thread, float32."]

    def show(title: str, place: str, figure: Figure) -> None:
        alt = (figure.alt or figure.caption).replace("\n", " ").replace("[", "(").replace("]", ")")
        caption = "" if figure.caption.startswith("Speed-up over torch.nn") else figure.caption
        lines.extend(["", f"## {title}", "", f"![{alt}]({place})", "", caption or f"{alt}."])

    show(titles["speed-ups"], "gallery/speed-ups.svg", speed_ups())
    show("Recurrence step by step, fused recurrence, attention", "gallery/crossover.svg", crossover())
    show(titles["memory"], "gallery/memory.svg", memory())
    for name, figure in by_name().items():
        show(figure.title, f"gallery/{name}.svg", figure)
    return "\n".join(lines)


BLOCKS: list[tuple[str, str, Callable[[], str]]] = [
    ("README.md", "packed", packed),
    ("README.md", "models", model_words),
    ("README.md", "support", support),
    ("docs/backends.md", "support", support),
    ("docs/benchmarks/index.md", "packed", packed),
    ("docs/benchmarks/index.md", "layers", layer_figures),
    ("docs/benchmarks/models.md", "models", model_table),
    ("docs/benchmarks/claims.md", "claims", claims),
    ("docs/models.md", "costs", costs),
    ("docs/gallery.md", "gallery", gallery),
    ("docs/distributed.md", "distributed", distributed),
]


def texts() -> dict[Path, str]:
    """Every page that has a generated block, as it ought to be."""
    found: dict[Path, str] = {}
    for name, block, make in BLOCKS:
        file = ROOT / name
        begin, end = f"<!-- {block}: begin, written by tools/pages.py -->", f"<!-- {block}: end -->"
        kept = found.get(file)
        if kept is None:
            found[file] = readme.replaced(file, make(), begin, end)
        else:
            before, _, rest = kept.partition(begin)
            found[file] = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return found


def drawn(figure: Figure) -> str:
    return f"{style.svg(figure, style.AUTO, name='picture')}<!-- matplotlib {matplotlib.__version__} -->\n"


def wanted() -> dict[Path, str]:
    """Everything that is generated, as it ought to be."""
    return texts() | {file: drawn(figure) for file, figure in pictures().items()}


def stale(file: Path, text: str) -> bool:
    """Whether a file differs; a picture that another matplotlib drew is not compared."""
    if not file.is_file():
        return True
    there = file.read_text(encoding="utf-8")
    if file.suffix == ".svg" and not there.endswith(f"<!-- matplotlib {matplotlib.__version__} -->\n"):
        return False
    return there != text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is not current")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    current = wanted()
    changed = [file for file, text in current.items() if stale(file, text)]
    for file in changed:
        print(f"{'not current' if options.check else 'written'}: {file.relative_to(ROOT)}")
        if not options.check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(current[file], encoding="utf-8")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
