"""The compiler's gate: what Triton makes of every launch of a family of kernels, kept in a table, without a GPU.

A family is a script that holds a ``Gate`` and calls its ``main``: ``--write`` compiles every point and writes the table,
``--json`` prints figures. A point is a call of the family's launcher, a picklable object with ``capability`` and ``key``: words
without a colon, of which the last is the architecture (``sm_90``). A row has the figures of one kernel of a point; its key is the
point's, a colon, the kernel's name. The family's tests inherit ``GateTests``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from fastseq.benchmarks.gpu.triton_compile import ARCHITECTURES, INSTRUCTIONS, Launch, resources

Row = dict[str, Any]
# Registers and shared memory may grow as long as a multiprocessor holds as many blocks as before: less than that costs nothing.
# What spills already, with its reason, may spill a quarter more before somebody has to look at it.
MARGIN = 1.25


def point_of(key: str) -> str:
    """The point's key of a row's."""
    return key.partition(":")[0]


def kernel_of(key: str) -> str:
    """The kernel's name of a row's key."""
    return key.rpartition(" ")[2]


def architecture_of(key: str) -> int:
    return int(point_of(key).rpartition("sm_")[2])


@dataclass(frozen=True)
class Gate:
    """A family of kernels. Functions stand at the top of the script, since they go to other processes by name.

    Attributes:
        script: the family's script.
        table: the file of the figures, beside it.
        points: every point, in the order of the table.
        launches: what the launcher gives the kernels at a point, each kernel once (``triton_compile.recorded``).
        tiles: keyword arguments of a launch that stand in its row.
        reason_of: why the kernel of a row's key may spill so many bytes of each thread; None: it may not.
        faults_of: what is wrong with a row that only this family knows.
    """

    script: Path
    table: Path
    points: Callable[[], list[Any]]
    launches: Callable[[Any], list[Launch]]
    tiles: tuple[str, ...]
    reason_of: Callable[[str, int], str | None]
    faults_of: Callable[[Row], list[str]]

    def read(self) -> dict[str, Any]:
        return json.loads(self.table.read_text())

    def figures(self, point: Any) -> list[Row]:
        """A row for each kernel that the point launches."""
        rows = []
        for launch in self.launches(point):
            tiles = {name: launch.kwargs[name] for name in self.tiles if name in launch.kwargs}
            try:
                found = resources(launch, point.capability).as_dict()
            except Exception as error:  # noqa: BLE001  whatever the compiler says is the result
                found = {"failed": f"{type(error).__name__}: {_innermost(error)}"}
            rows.append({"key": f"{point.key}: {launch.kernel.__name__}", **tiles, **found})
        return rows

    def each(self, points: list[Any], processes: int) -> Iterator[Row]:
        """Rows in the order of the points."""
        os.environ.pop("TRITON_INTERPRET", None)  # of the processes that compile
        if processes == 1:
            for point in points:
                yield from self.figures(point)
            return
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            for rows in pool.map(self.figures, points):
                yield from rows

    def compiled(self, keys: Iterable[str], processes: int = 2) -> list[Row]:
        """Rows of the points with these keys, from other processes: this one may run Triton's interpreter."""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, str(self.script), "--json", "--processes", str(processes), "--keys", ";".join(keys)]
        done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.script.name} ended with {done.returncode}: {done.stderr[-2000:]}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def faults(self, row: Row, before: Row | None) -> list[str]:
        """What is wrong with a kernel's figures, by themselves and against the table's (None: those of another compiler)."""
        if "failed" in row:
            return [f"does not compile: {row['failed']}"]
        found = []
        limit = ARCHITECTURES[architecture_of(row["key"])].block
        if row["registers"] > 255:
            found.append(f"{row['registers']} registers, 255 are there")
        if row["shared"] > limit:
            found.append(f"{row['shared']} bytes of shared memory, a block may have {limit}")
        if row["spilled"] and self.reason_of(row["key"], row["spilled"]) is None:
            found.append(f"spills {row['spilled']} bytes of each thread into local memory")
        found += self.faults_of(row)
        if before is None or "failed" in before:
            return found
        if row["products"] != before["products"]:
            found.append(f"matrix instruction {row['products'] or 'none'}, was {before['products'] or 'none'}")
        if row["resident"] < before["resident"]:
            found.append(f"{row['resident']} blocks on a multiprocessor, were {before['resident']}")
        if row["spilled"] > MARGIN * before["spilled"]:
            found.append(f"spills {row['spilled']} bytes of each thread, were {before['spilled']}")
        return found

    def judged(self, rows: list[Row]) -> dict[str, list[str]]:
        """Every fault by key. Another compiler than the table's is held to the limits, not to the table."""
        import triton

        table = self.read()
        same, before = table["triton"] == triton.__version__, table["kernels"]
        found = {row["key"]: self.faults(row, before.get(row["key"]) if same else None) for row in rows}
        for row in rows:
            if row["key"] not in before:
                found[row["key"]].append("is not in the table: write it again")
        return {key: faults for key, faults in found.items() if faults}

    def write(self, rows: list[Row], *, merge: bool) -> None:
        """The table, a line for each kernel."""
        import triton

        kernels = self.read()["kernels"] if merge and self.table.exists() else {}
        for row in rows:
            kernels[row["key"]] = {name: value for name, value in row.items() if name != "key"}
            spilled = row.get("spilled", 0)
            if spilled and (reason := self.reason_of(row["key"], spilled)):
                kernels[row["key"]]["reason"] = reason
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(kernels[key])}" for key in kernels)
        self.table.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{lines}\n }}\n}}\n')

    def main(self, description: str | None, argv: list[str] | None = None) -> int:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--write", action="store_true", help="compile everything and write the table")
        parser.add_argument("--json", action="store_true", help="print rows")
        parser.add_argument("--only", default="", help="points whose key contains every one of these words")
        parser.add_argument("--keys", help="points with exactly these keys, separated by semicolons")
        parser.add_argument("--processes", type=int, default=2)
        args = parser.parse_args(argv)
        points = [p for p in self.points() if set(args.only.split()) <= set(p.key.split())]
        if args.keys:
            points = [p for p in points if p.key in args.keys.split(";")]
        rows = []
        for row in self.each(points, args.processes):
            rows.append(row)
            if args.json:
                print(json.dumps(row), flush=True)
        if args.write:
            self.write(rows, merge=bool(args.only or args.keys))
        return 0


def loaded(script: Path) -> ModuleType:
    """A family's script, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GateTests:
    """What holds for every family.

    A subclass defines ``GATE``, ``NORMAL``, ``ROW`` and ``SPILLING``, and calls ``check`` for all other points in a slow test.
    """

    GATE: ClassVar[Gate]
    NORMAL: ClassVar[tuple[str, ...]] = ()  # keys of points that every run compiles
    ROW: ClassVar[Row] = {}  # of a kernel that spills nothing, without a fault
    SPILLING: ClassVar[Row] = {}  # of one that spills for a reason that would excuse twice as much

    def test_kernels_compile_as_the_table_says(self) -> None:
        self.check(self.NORMAL)

    def check(self, keys: Iterable[str]) -> None:
        """The points with these keys compile, each kernel once, as the table says."""
        expected = set(keys)
        rows = self.GATE.compiled(expected)
        found = [row["key"] for row in rows]
        assert {point_of(key) for key in found} == expected, found
        assert len(set(found)) == len(found), found
        faults = self.GATE.judged(rows)
        assert not faults, faults

    def test_the_table_has_every_point_and_no_fault(self) -> None:
        table = self.GATE.read()["kernels"]
        unlike = {point_of(key) for key in table} ^ {point.key for point in self.GATE.points()}
        assert not unlike, unlike
        faults = {key: found for key, row in table.items() if (found := self.GATE.faults({"key": key, **row}, None))}
        assert not faults, faults
        unexplained = [key for key, row in table.items() if row.get("spilled") and not row.get("reason")]
        assert not unexplained, unexplained

    def test_a_fault_is_seen(self) -> None:
        row = self.ROW
        block = ARCHITECTURES[architecture_of(row["key"])].block
        other = next(name for name in INSTRUCTIONS if name != row["products"])
        fewer = row["resident"] - 1
        planted: list[tuple[Row, str]] = [
            ({"failed": "out of resources"}, "does not compile: out of resources"),
            ({"registers": 256}, "256 registers, 255 are there"),
            ({"shared": block + 1}, f"{block + 1} bytes of shared memory, a block may have {block}"),
            ({"products": other}, f"matrix instruction {other}, was {row['products']}"),
            ({"resident": fewer}, f"{fewer} blocks on a multiprocessor, were {row['resident']}"),
            ({"spilled": 8}, "spills 8 bytes of each thread, were 0"),
        ]
        for change, fault in planted:
            found = self.GATE.faults(row | change, row)
            assert fault in found, (change, found)

    def test_what_costs_nothing_is_no_fault(self) -> None:
        most = {"registers": 255, "shared": ARCHITECTURES[architecture_of(self.ROW["key"])].block}
        for change in ({}, most):
            found = self.GATE.faults(self.ROW | change, self.ROW)
            assert not found, (change, found)

    def test_what_may_spill_may_spill_a_quarter_more(self) -> None:
        before = self.SPILLING
        most = before["spilled"] * 5 // 4
        for spilled in (before["spilled"], most):
            found = self.GATE.faults(before | {"spilled": spilled}, before)
            assert not found, (spilled, found)
        found = self.GATE.faults(before | {"spilled": most + 4}, before)
        assert found == [f"spills {most + 4} bytes of each thread, were {before['spilled']}"], found

    def test_a_kernel_that_the_table_lacks_is_seen(self) -> None:
        key = f"{self.ROW['key']}_of_nothing"
        found = self.GATE.judged([self.ROW | {"key": key}])
        assert found == {key: ["is not in the table: write it again"]}, found


def _innermost(error: BaseException) -> str:
    """The last message: a compilation error quotes the source of every function on the way."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip(" ^"))[-300:]
