"""The CPU kernels without torch, under sanitizers and on aarch64: tests/csrc/cpu_recurrent.cpp at odd sizes, against plain loops.

`make test` compiles a few kernels of one level; `make sanitize`, which runs the slow tests here, all kernels of every level that
this machine has.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastseq.backends import library

from .conftest import build

ROOT = build.ROOT
LEVELS = ("default", "avx2", "avx512", "amx")
CELLS = (
    "RnnTanh", "RnnRelu", "Lstm", "Gru", "CoupledLstm", "PeepholeLstm", "LayerNormLstm", "LayerNormGru", "Slstm",
)  # fmt: skip
TYPES = ("float", "double", "bfloat16", "float16")
SHORT = ("X(float, LayerNormLstm)", "X(float16, Gru)")
EVERY = tuple(f"X({type_}, {cell})" for type_ in TYPES for cell in CELLS)
# By itself the program sees an array left on either side, as a segmentation fault.
SANITIZERS = build.SANITIZERS | {"plain": ("-fsanitize=alignment", "-fno-sanitize-recover=all")}
AARCH64 = "aarch64-linux-gnu-g++"
EMULATOR = next((name for name in ("qemu-aarch64-static", "qemu-aarch64") if shutil.which(name)), None)


def flags_of(level: str) -> list[str]:
    """The flags that CMakeLists.txt gives a level's file, and the macros that the file defines."""
    text = (ROOT / "CMakeLists.txt").read_text()

    def expanded(name: str) -> str:
        (value,) = re.findall(rf"set\({name} ([^)]*)\)", text)
        return re.sub(r"\$\{(\w+)\}", lambda other: expanded(other[1]), value)

    source = (ROOT / "csrc/cpu" / f"recurrent_{level}.cpp").read_text()
    macros = [f"-D{name}={value}" for name, value in re.findall(r"^#define (\w+) ?(.*)$", source, re.MULTILINE)]
    # the optimizer's level is the sanitizer's affair
    return macros + [flag for flag in expanded(f"flags_{level}").split() if not flag.startswith("-O")]


def program(level: str, cases: tuple[str, ...], *flags: str, tree: Path = ROOT, compiler: str | None = None) -> Path:
    try:
        with_ = compiler or build.compiler()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    command = [with_, "-std=c++20", "-g1", "-O1", "-Wall", "-Wextra", "-Werror", *flags, *flags_of(level), f"-DCASES={' '.join(cases)}"]
    command += [f"-I{tree / 'csrc'}", "-pthread"]
    sources = [tree / "tests/csrc/cpu_recurrent.cpp", tree / "csrc/cpu/barrier.cpp"]
    inputs = (build.version(with_), *(build.run(*command, "-E", source) for source in sources))
    return build.made(f"cpu-{level}", "", inputs, *command, *sources)


def failure(path: Path, *arguments: str) -> str:
    """What a program says of what is wrong; empty: nothing is."""
    environment = os.environ | {"ASAN_OPTIONS": "use_sigaltstack=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([*arguments[:1], path, *arguments[1:]], capture_output=True, text=True, env=environment, check=False)
    return f"{done.stdout}{done.stderr}, exit status {done.returncode}" if done.returncode else ""


def highest() -> int:
    assert library.reason() is None
    return LEVELS.index(torch.ops.fastseq_native.cpu_level())


def need(level: str) -> None:
    if LEVELS.index(level) > highest():
        pytest.skip(f"this processor has no {level}")


def test_odd_sizes():
    """The short form: some kernels, sizes up to 33."""
    level = LEVELS[min(highest(), LEVELS.index("avx2"))]
    assert not failure(program(level, SHORT, *SANITIZERS["plain"]), "33")


@pytest.mark.slow
@pytest.mark.parametrize("cases", [EVERY[i::3] for i in range(3)], ids=str)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_kernel(level, sanitizer, cases):
    need(level)
    if level == "amx":
        cases = tuple(case for case in cases if "bfloat16" in case)
    assert not failure(program(level, cases, *SANITIZERS[sanitizer]))


@pytest.mark.slow
def test_aarch64():
    """The baseline's vectors on another architecture, emulated; without an emulator they are only compiled."""
    if not shutil.which(AARCH64):
        pytest.skip(f"needs {AARCH64} (Debian: g++-aarch64-linux-gnu)")
    path = program("default", SHORT, "-static", compiler=AARCH64)
    if EMULATOR is None:
        pytest.skip("compiled; needs qemu-aarch64 to run (Debian: qemu-user-static)")
    assert not failure(path, EMULATOR, "33")


@dataclass(frozen=True)
class Fault:
    """Some words of a file, found there once, are replaced by others; a pattern is then in what the program says."""

    name: str
    file: str
    old: str
    new: str
    seen: str
    sanitizer: str = "plain"
    level: str = "avx2"
    case: str = "X(float, LayerNormLstm)"


ENGINE, NORMS, VECTORS = "recurrent_kernel.inl", "recurrent_normalized.inl", "vector.inl"
WRONG, RACE, MEET = "wrong result", "ThreadSanitizer: data race", "w.barrier->wait(w.weight)"
FAULTS = [
    Fault("variance of what is beyond the units", NORMS, "(units - u) * sizeof(A)", "sizeof(V)", WRONG),
    Fault("mean over whole vectors", NORMS, "count = kParts * units, mean", "count = kParts * blocks_of(units, W) * W, mean", WRONG),
    Fault("no meeting before R h is normalized", NORMS, f"  if (w.barrier) {MEET};\n  for (int64_t slot = 0; slot < active; ++slot) "
          "finish_gates", "  for (int64_t slot = 0; slot < active; ++slot) finish_gates", RACE, "thread"),
    Fault("no meeting before c is normalized", NORMS, f"    if (w.barrier) {MEET};\n    for (int64_t slot = 0; slot < active; ++slot) "
          "finish_cell", "    for (int64_t slot = 0; slot < active; ++slot) finish_cell", RACE, "thread"),
    Fault("no meeting with the gradient of N(c)", NORMS, f"through_output(slot);\n    if (w.barrier) {MEET};", "through_output(slot);",
          RACE, "thread"),
    Fault("no meeting with the gradient of N(R h)", NORMS, f"through_gates(slot);\n  if (w.barrier) {MEET};", "through_gates(slot);",
          RACE, "thread"),
    Fault("subnormal numbers flushed", VECTORS, "magnitude < kNormal ? (U)subnormal : normal", "magnitude < kNormal ? U{} : normal",
          "conversions of binary16", level="default"),
    Fault("ties away from zero", VECTORS, "magnitude + 0xfff + ((magnitude >> 13) & 1)", "magnitude + 0x1000", "conversions of binary16",
          level="default"),
    Fault("read beyond the end", VECTORS, "if (n < kWidth) return Halves<S>::widened(load_head<H>(&p->bits, n));", "",
          "exit status -11", case="X(float16, Gru)"),
    Fault("read before the beginning", ENGINE, "bias + g * H + u0 + b * W,", "bias + g * H + u0 + b * W - 1,",
          "exit status -11", case="X(float, Lstm)"),
    Fault("sums beyond their array", ENGINE, "Product::kMostRows * kTileVectors * W];\n};\n\ntemplate <class Product, class S, template "
          "<class> class Cell, bool kZoned>\nclass BackwardKernel", "kTileVectors * W];\n};\n\ntemplate <class Product, class S, template "
          "<class> class Cell, bool kZoned>\nclass BackwardKernel", "AddressSanitizer: stack-buffer-overflow", "address"),
    Fault("rows of states misaligned", ENGINE, "ldc(padded<A>(shape.hidden))", "ldc(padded<A>(shape.hidden) + 1)",
          "misaligned address"),
    Fault("backwards one tile too far", ENGINE, "tiles[1] - 1 - i", "tiles[1] - i", f"{WRONG}|exit status -11"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_seen(fault, tmp_path):
    need(fault.level)
    for folder in ("csrc/cpu", "csrc/recurrent/cells", "csrc/common", "tests/csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "emulator"))
    file = tmp_path / "csrc/cpu" / fault.file
    text = file.read_text()
    assert text.count(fault.old) == 1
    file.write_text(text.replace(fault.old, fault.new))
    assert re.search(fault.seen, failure(program(fault.level, (fault.case,), *SANITIZERS[fault.sanitizer], tree=tmp_path)))
