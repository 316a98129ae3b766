"""`python -m fastseq.benchmarks.gpu.self_check --out FILE`: is every family of kernels right on this device?

The problems are those of `fastseq.choice.self_check`, of a list of calls that has every cell and feature, dtype, form and width,
the worthiest first. Processes beside one another take calls from it, so that one compiles while another computes; one that
crashes or takes too long is replaced, and its call is named. FILE gets a JSON row of each family as soon as it is known, with the
first wrong number of one that is wrong; what is found is also kept in the store, where whoever uses the kernels next finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastseq.backends import BACKENDS, AttentionQuery, Query, RecurrentQuery, ScanQuery, reference
from fastseq.cells import CELLS
from fastseq.choice import self_check
from fastseq.choice.problems import families
from fastseq.ops.types import SCAN_CELLS

PROGRAM = "fastseq.benchmarks.gpu.self_check"
COMMAND = (sys.executable, "-m", PROGRAM, "--worker")  # and the device: a worker
SECONDS_EACH = 60.0
MOST_WORKERS = 8
_16 = (torch.bfloat16, torch.float16)
DTYPES = (*_16, torch.float32)
FEATURES = (
    (), ("bias",), ("mask",), ("relative_bias",), ("slopes",), ("sinks",), ("softcap",), ("dropout",), ("relative_q",),
    ("k_lengths",), ("q_lengths", "k_lengths"), ("blocks",), ("bottom_right",), ("dropout", "dropout of a part"),
    ("bias", "dropout", "k_lengths", "mask", "relative_bias", "sinks", "slopes", "softcap"),
)  # fmt: skip
WINDOWS = ((-1, 0), (-1, -1), (128, 0))
Call = tuple[str, Query]  # of a backend


def calls(device: torch.device) -> dict[str, Call]:
    """Those that a device's backends take, by the names of their families, of which each has one of its own at least."""
    every = [*_recurrent(device), *_attention(device), *_scan(device)]
    every.sort(key=lambda each: each[0])  # the worthiest of every kind first
    found: dict[str, Call] = {}
    for _, query in every:
        for name in ("cuda", "triton") if device.type == "cuda" else ("cpu", "triton"):
            backend = BACKENDS[name]
            able = device.type in backend.devices and query.op in backend.ops
            if able and backend.available() is None and not backend.why_not(query):
                named = "; ".join(self_check.family_of(backend, query, family) for family in families(query))
                found.setdefault(named, (name, query))
    return found


def _recurrent(device: torch.device) -> Iterator[tuple[int, Query]]:
    sizes: tuple[tuple[int, int, int], ...] = (
        (64, 8, 512),
        (64, 64, 1024),
        (64, 4, 64),
        (64, 16, 256),
        (1, 1, 512),
        (1, 16, 256),
        (64, 7, 133),
    )
    if device.type == "cpu":
        sizes = ((9, 3, 20), (1, 3, 20))
    for cell in CELLS:
        plain = cell in ("lstm", "gru")
        for at, (T, B, H) in enumerate(sizes):
            for dtype in DTYPES:
                rank = at + 2 * (not plain) + 2 * DTYPES.index(dtype)
                query = RecurrentQuery("recurrent", device, dtype, cell, T, 2, H, False, "padded", False, B, False)
                yield rank, query
                if at == 0:
                    yield rank + 4, query._replace(zoned=True)
                    if CELLS[cell].wide_states == 1:
                        yield rank + 4, query._replace(projected=True)


def _attention(device: torch.device) -> Iterator[tuple[int, Query]]:
    widths: tuple[tuple[int, int], ...] = ((64, 64), (128, 128), (96, 96), (256, 256))
    long = 1024
    if device.type == "cpu":
        widths, long = ((24, 24),), 64
    for i, uses in enumerate(FEATURES):
        for window, dtype, features in ((w, d, f) for w in WINDOWS for d in DTYPES for f in widths):
            plain = not uses
            if not plain and (window == WINDOWS[2] or features not in widths[:2] or dtype == torch.float16):
                continue
            rank = min(i, 4) + WINDOWS.index(window) + widths.index(features) + 2 * DTYPES.index(dtype)
            heads = (8, 2) if features == widths[-1] or window == WINDOWS[2] else (8, 8)
            size = 64 if "blocks" in uses else 0
            query = AttentionQuery(
                "attention", "forward", device, dtype, 2, heads, (long, long), features, "padded", window, 0, size, uses, ()
            )
            yield rank, query
            if plain:
                yield rank + 1, query._replace(layout="packed")
                yield rank + 2, query._replace(call="weights")
                for queries, layout, page in ((1, "contiguous", 0), (4, "paged", 16)):
                    decode = query._replace(op="attention_decode", call="decode", lengths=(queries, long), window=(-1, 0))
                    yield rank + 1, decode._replace(layout=layout, block_size=page, uses=("sinks",) if page else ())


def _scan(device: torch.device) -> Iterator[tuple[int, Query]]:
    sizes = ((40, 3, 37),) if device.type == "cpu" else ((4096, 8, 512), (64, 300, 128))
    kinds = [("real", dtype) for dtype in DTYPES] + [("blocks", dtype) for dtype in DTYPES] + [("complex", torch.complex64)]
    made = [((cell,), "padded") for cell in SCAN_CELLS if cell != "given"]
    layouts = [(("initial",), "padded"), (("initial", "resets"), "lengths"), (("reverse",), "packed"), *made]
    for i, (kind, dtype) in enumerate(kinds):
        for j, ((uses, layout), (T, B, C)) in enumerate(product(layouts, sizes)):
            if kind == "real" or not {*SCAN_CELLS} & {*uses}:
                yield 2 + i + j, ScanQuery("scan", "forward", device, dtype, kind, T, B, C, layout, uses)


def tried(call: Call) -> list[dict[str, Any]]:
    """A row for each family of a call."""
    name, query = call
    backend, began = BACKENDS[name], time.monotonic()
    verdicts = self_check.check(backend, query, reference)
    seconds = round(time.monotonic() - began, 2)
    return [
        {"family": self_check.family_of(backend, query, family), "right": v.right, "words": v.words, "seconds": seconds}
        for family, v in verdicts.items()
    ]


class _Worker:
    """A process that tries the calls whose names it is told, in one device's context."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.process: subprocess.Popen[bytes] | None = None

    def rows(self, name: str, seconds: float) -> list[dict[str, Any]] | str:
        """Of a call; or how the process ended."""
        if self.process is None:
            self.process = subprocess.Popen(
                [*COMMAND, self.device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
                env={"FASTSEQ_SELF_CHECK": "force"} | os.environ,  # anew, whatever the store knows
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(f"{name}\n".encode())
        except BrokenPipeError:
            return self.end()
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self.end()
                return f"took more than {seconds:.0f} s and was ended"
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return self.end()
            line += part
        return json.loads(line)

    def end(self) -> str:
        process, self.process = self.process, None
        if process is None:
            return ""
        if process.poll() is None:
            try:
                process.wait(1.0)  # it may be ending by itself
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def _serve(device: str) -> int:
    """Of a worker: answers names of calls with their rows, a line each."""
    known, out = calls(torch.device(device)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a kernel or compiler prints is no row
    for line in sys.stdin:
        out.write(json.dumps(tried(known[line.rstrip()])) + "\n")
        out.flush()
    return 0


def run(device: str, file: Any, seconds: float, each: float, workers: int, only: str = "") -> tuple[int, int, int]:
    """Families that are right and wrong, and calls that were not tried, as the time was up."""
    deadline = time.monotonic() + seconds
    names, lock, counts = iter([name for name in calls(torch.device(device)) if only in name]), threading.Lock(), [0, 0, 0]

    def keep(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            counts[not row["right"]] += 1
            file.write(json.dumps(row) + "\n")
            print(f"{row['family']}: {'right' if row['right'] else 'WRONG, ' + row['words']}", flush=True)
        file.flush()

    def work() -> None:
        worker = _Worker(device)
        while True:
            with lock:
                name, left = next(names, None), deadline - time.monotonic()
                if name is not None and left <= 0:
                    counts[2] += 1
                    continue
            if name is None:
                break
            rows = worker.rows(name, min(each, left))
            if isinstance(rows, str):
                cut = left < each and "was ended" in rows
                rows = [] if cut else [{"family": name, "right": False, "words": rows}]
                counts[2] += cut
            with lock:
                keep(rows)
        worker.end()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts[0], counts[1], counts[2]


def main(argv: Sequence[str] | None = None) -> int:
    """0: every family that was tried is right; 1: one is wrong; 2: bad arguments."""
    plain = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=plain)
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON rows, one a line")
    p.add_argument("--device", default="cuda", help="default: %(default)s; cpu tries the CPU's kernels")
    p.add_argument("--seconds", type=float, default=600.0, metavar="N", help="for all (default: %(default)g)")
    p.add_argument("--each", type=float, default=SECONDS_EACH, metavar="N", help="for one call at most (default: %(default)g)")
    beside = min(MOST_WORKERS, os.cpu_count() or 1)
    p.add_argument("--workers", type=int, default=beside, metavar="N", help="processes (default: %(default)s)")
    p.add_argument("--only", default="", metavar="TEXT", help="calls with this in the name of a family")
    p.add_argument("--worker", metavar="DEVICE", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.worker:
        return _serve(args.worker)
    try:
        if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: torch finds no CUDA device")
        if args.out is None or min(args.seconds, args.each, args.workers) <= 0:
            raise ValueError("--out is wanted, and --seconds, --each and --workers above 0")
        file = args.out.open("w", encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        p.error(str(error))
    with file:
        right, wrong, left = run(args.device, file, args.seconds, args.each, args.workers, args.only)
    print(f"{right} families are right, {wrong} wrong" + (f"; no time was left for {left} calls" if left else ""))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
