"""What nvcc made of every CUDA kernel of the library, for each architecture: registers, spills, static shared memory.

`python tests/csrc/resources.py --write` reads them from the library that is there and writes resources.json beside this file. No
GPU is needed, only cuobjdump, of the CUDA toolkit or of Triton's package, and c++filt or cu++filt.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastseq.backends import library
from fastseq.backends.cuda.recurrent import CELLS

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".json")
REGISTERS = 255  # that a thread can have
RESERVED = 1 << 10  # bytes of shared memory that the system takes of each block; the compiler counts them from sm_90 on
REDUCE_SCATTER = "backward_reduce_scatter"  # batch tiles of one tile of columns only
DIRECTIONS = ("forward", "backward", REDUCE_SCATTER)
TILES = {"Half": "fp16", "Bfloat16": "bf16", "TileTf32": "tf32", "TileFloat": "fp32"}
PRODUCTS = {"fp16": "HMMA.16816.F32", "bf16": "HMMA.16816.F32.BF16", "tf32": "HMMA.1688.F32.TF32", "fp32": "FFMA"}
ADDRESSES = "addresses and counters of a step, read before and after its products: weights have the registers"
REASONS = (  # words of a key, bytes that a thread may spill, and why
    ("fp16 wide", 40, ADDRESSES),
    ("bf16 wide", 40, ADDRESSES),
    ("tf32 wide", 40, ADDRESSES),
    ("fp32", 144, ADDRESSES),
)


class Unavailable(Exception):
    """There is no tool, or no CUDA kernel in the library."""


class Kernel(NamedTuple):
    key: str  # words without a colon, the architecture last
    symbol: str
    architecture: str
    row: Row


def tool(*names: str) -> str:
    """Of the toolkit, wherever nvcc is, or of Triton's package."""
    nvcc, triton = shutil.which("nvcc"), find_spec("triton")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path("/usr/local/cuda/bin")]
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    for name in names:
        found = shutil.which(name) or next((str(folder / name) for folder in folders if (folder / name).is_file()), None)
        if found:
            return found
    raise Unavailable(f"needs {' or '.join(names)}")


def built() -> Path:
    """The library, if it has CUDA kernels."""
    file = library.path()
    if file is None or library.reason():
        raise Unavailable(str(library.reason()))
    if not any(name.startswith("sm_") for name in library.architectures()):
        raise Unavailable(f"{file.name} was built without CUDA")
    return file


def toolkit() -> int:
    """The version that compiled the library: 13000 is 13.0."""
    return torch.ops.fastseq_native.cuda_versions()[0]


def said(*command: str | Path, given: str | None = None) -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def kernels(file: Path) -> list[Kernel]:
    """Every kernel of every architecture."""
    text = said(tool("cuobjdump"), "--dump-resource-usage", file)
    found = []
    for image in text.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"^arch = (\w+)", image, re.MULTILINE)[1]
        for symbol, usage in re.findall(r"Function (\w+):\s*\n(.*)", image):
            numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
            row = {
                "registers": numbers["REG"],
                "spilled": max(numbers["STACK"], numbers["LOCAL"]),
                "shared": numbers["SHARED"],
            }
            found.append((symbol, architecture, row))
    names = said(tool("c++filt", "cu++filt"), given="\n".join(symbol for symbol, *_ in found)).splitlines()
    return [
        Kernel(f"{words_of(name)} {where}", symbol, where, row) for name, (symbol, where, row) in zip(names, found, strict=True)
    ]


def words_of(name: str) -> str:
    """forward lstm bf16 wide; of other kernels than the recurrence's the name alone"""
    match = re.search(
        r"(forward|backward|backward_reduce_scatter)_kernel<(?:\w+::)*(\w+), (.*?)(?:, (?:\(int\))?(\d+))?>\(", name
    )
    if not match:
        return re.sub(r"\(.*", "", name.replace("(anonymous namespace)::", "")).split("::")[-1].split()[-1]
    direction, cell, tile, columns = match.groups()
    words = [direction, re.sub(r"(?<!^)(?=[A-Z])", "_", cell).lower(), TILES[re.findall(r"\w+", tile)[-1]]]
    return " ".join(words + ["wide"] * (int(columns or 1) > 1))


def architectures() -> list[str]:
    """That CMakeLists.txt names: machine code for all of them is in a library for which nobody chose others."""
    lines = re.findall(r'(?:set\(wanted|APPEND wanted) (".*")', (ROOT / "CMakeLists.txt").read_text())
    return [f"sm_{major}{rest}" for major, rest in re.findall(r"(\d+)\.(\d+a?)", " ".join(lines))]


def expected(where: Iterable[str]) -> set[str]:
    """Keys of the recurrent kernels of some architectures."""
    sizes = product(DIRECTIONS, CELLS, PRODUCTS, ("", " wide"), where)
    return {
        f"{way} {cell} {precision}{wide} {arch}"
        for way, cell, precision, wide, arch in sizes
        if way != REDUCE_SCATTER or not wide
    }


def unlike(keys: Iterable[str], where: list[str]) -> set[str]:
    """What these keys lack of, or have beyond, every kernel on every architecture."""
    found = set(keys)
    others = {key.rpartition(" ")[0] for key in found if key.split()[0] not in DIRECTIONS}
    return found ^ (expected(where) | {f"{name} {arch}" for name, arch in product(others, where)})


def reason_of(key: str, spilled: int) -> str | None:
    """Why a kernel may spill so many bytes of each thread; None: it may not."""
    words = set(key.split())
    return next((why for needed, most, why in REASONS if set(needed.split()) <= words and spilled <= most), None)


def faults(key: str, row: Row, before: Row | None) -> list[str]:
    """What is wrong with a kernel's figures, by themselves and against the table's (None: those of another compiler)."""
    found = []
    if row["registers"] > REGISTERS:
        found.append(f"{row['registers']} registers, {REGISTERS} are there")
    if row["shared"] > RESERVED:
        found.append(f"{row['shared']} bytes of static shared memory, which csrc/recurrent/plan.cpp gives away")
    if row["spilled"] and reason_of(key, row["spilled"]) is None:
        found.append(f"spills {row['spilled']} bytes of each thread into local memory")
    if before is not None and row["spilled"] > before["spilled"]:
        found.append(f"spills {row['spilled']} bytes of each thread, were {before['spilled']}")
    return found


def judged(rows: dict[str, Row], toolkit: int, where: Iterable[str]) -> dict[str, list[str]]:
    """Every fault by key. Another compiler than the table's is held to the limits, not to the table."""
    table = read()
    same, before = table["toolkit"] == toolkit, table["kernels"]
    found = {key: faults(key, row, before.get(key) if same else None) for key, row in rows.items()}
    for key in rows.keys() - before.keys():
        found[key].append("is not in the table: write it again")
    for key in (before.keys() - rows.keys()) & {key for key in before if key.split()[-1] in where}:
        found[key] = ["is not in the library, but in the table: write it again"]
    return {key: faults for key, faults in found.items() if faults}


def instructions(file: Path, wanted: Iterable[Kernel]) -> dict[str, list[str]]:
    """What multiplies and what moves spilled words in each of these kernels, in the order of their machine code."""
    found: dict[str, list[str]] = {}
    chosen = list(wanted)
    for architecture in dict.fromkeys(kernel.architecture for kernel in chosen):
        keys = {kernel.symbol: kernel.key for kernel in chosen if kernel.architecture == architecture}
        text = said(tool("cuobjdump"), "-sass", "-arch", architecture, "-fun", ",".join(keys), file)
        for part in text.split("Function : ")[1:]:
            symbol, code = part.split(None, 1)
            found[keys[symbol]] = re.findall(r"\b([A-Z]+MMA[\w.]*|FFMA|LDL|STL)", code)
    return found


def read() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def write(rows: dict[str, Row], toolkit: int) -> None:
    """The table, a line for each kernel."""
    lines = []
    for key, row in rows.items():
        reason = reason_of(key, row["spilled"]) if row["spilled"] else None
        lines.append(f"  {json.dumps(key)}: {json.dumps(row | ({'reason': reason} if reason else {}))}")
    TABLE.write_text(f'{{\n "toolkit": {toolkit},\n "kernels": {{\n' + ",\n".join(lines) + "\n }\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table; else print the figures")
    write_it = parser.parse_args().write
    rows = {kernel.key: kernel.row for kernel in kernels(built())}
    if write_it:
        write(rows, toolkit())
        return
    for key, row in rows.items():
        print(key, json.dumps(row))


if __name__ == "__main__":
    main()
