"""Builds and runs cpu_recurrent.cpp, cpu_step.cpp, cpu_layer_norm.cpp, cpu_scan.cpp, cpu_matrix.cpp and cpu_attention.cpp of
tests/csrc: CPU kernels without torch, at odd sizes, against loops.

`python tests/csrc/cpu_build.py` (`make sanitize`) does so for all kernels of every level of instructions that this machine has,
under each sanitizer; AMX's tiles are software (emulator/tiles.h) where there is no more than AVX512-BF16. What is built lies in
build/host, so that nothing is made twice. $CXX chooses the compiler.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import host_build as build  # noqa: E402

LEVELS = ("default", "avx2", "avx512", "avx512_bf16", "amx")
CELLS = re.findall(r"^  X\((\w+), ", (build.ROOT / "csrc/cpu/recurrent_kernel.h").read_text(), re.MULTILINE)
TYPES = ("float", "double", "bfloat16", "float16")
MULTIPLIED = {"avx512_bf16": ("bfloat16",), "amx": ("float", "bfloat16")}  # types of levels that only multiply
STEP = ("step",)  # cases: all of single steps
LAYER_NORM = ("layer_norm",)  # cases: all between the products of a transformer's layer
SCAN = ("scan",)  # cases: all of linear recurrences
MATRIX = ("matrix",)  # cases: all products of whole matrices, of levels that multiply
# By itself the program ends with a segmentation fault where an array is left, on either side.
SANITIZERS = build.SANITIZERS | {"plain": ("-fsanitize=alignment", "-fno-sanitize-recover=all")}


def flags_of(level: str) -> list[str]:
    """The flags that CMakeLists.txt gives a level's files."""
    text = (build.ROOT / "CMakeLists.txt").read_text()

    def expanded(name: str) -> str:
        (value,) = re.findall(rf"set\({name} ([^)]*)\)", text)
        return re.sub(r"\$\{(\w+)\}", lambda other: expanded(other[1]), value)

    return [flag for flag in expanded(f"flags_{level}").split() if not flag.startswith("-O")]


def macros_of(level: str) -> list[str]:
    """The macros that a level's file of the recurrence defines."""
    source = (build.ROOT / "csrc/cpu" / f"recurrent_{level}.cpp").read_text()
    return [f"-D{name}={value}" for name, value in re.findall(r"^#define (\w+) ?(.*)$", source, re.MULTILINE)]


def program(level: str, cases: tuple[str, ...], *flags: str, tree: Path = build.ROOT, compiler: str | None = None) -> Path:
    """The program with some kernels of one kind: of the recurrence, X(storage type, cell), of attention, X(storage type), of
    single steps, `STEP`, of layer norm, `LAYER_NORM`, of scans, `SCAN`, or of matrices, `MATRIX`."""
    with_ = compiler or build.compiler()
    command = [
        with_,
        "-std=c++20",
        "-g1",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-maybe-uninitialized",  # GCC 12 finds its own intrinsics so
    ]
    command += [*flags, *flags_of(level), f"-I{tree / 'csrc'}", "-pthread"]
    if emulated(level):
        command += ["-include", str(build.ROOT / "tests/csrc/emulator/tiles.h")]
    tiles = ["-DTILES"] if level == "amx" else []
    if "," in cases[0]:
        command += [*macros_of(level), f"-DCASES={' '.join(cases)}"]
        sources = [tree / "tests/csrc/cpu_recurrent.cpp", tree / "csrc/cpu/barrier.cpp"]
    elif cases in (STEP, LAYER_NORM, SCAN):
        command.append(f"-DLEVEL={level}")
        kernels = "recurrent_step" if cases == STEP else cases[0]
        sources = [tree / f"csrc/cpu/{kernels}_{level}.cpp", tree / f"tests/csrc/cpu_{cases[0]}.cpp"]
    elif cases == MATRIX:
        command += [f"-DLEVEL={level}", *tiles]
        sources = [tree / f"csrc/cpu/matrix_product_{level}.cpp", tree / "tests/csrc/cpu_matrix.cpp"]
    else:
        command += [f"-DLEVEL={level}", f"-DTYPES={' '.join(cases)}", *tiles]
        files = (f"csrc/cpu/attention_{level}.cpp", f"csrc/cpu/attention_few_{level}.cpp", "tests/csrc/cpu_attention.cpp")
        sources = [tree / file for file in files]
    inputs = (build.version(with_), *(build.run(*command, "-E", source) for source in sources))
    return build.made(f"cpu-{level}", "", inputs, *command, *sources)


def failure(path: Path, *arguments: str, under: tuple[str, ...] = ()) -> str:
    """What a program says of what is wrong; empty: nothing is. ``arguments``: the most units and sequences, or keys."""
    # the system denies AMX to threads with a small stack for signals
    environment = os.environ | {"ASAN_OPTIONS": "use_sigaltstack=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([*under, path, *arguments], capture_output=True, text=True, env=environment, check=False)
    return f"{done.stdout}{done.stderr}exit status {done.returncode}" if done.returncode else ""


def instructions() -> set[str]:
    """The flags of this machine's processor."""
    if os.uname().machine != "x86_64" or not Path("/proc/cpuinfo").is_file():
        return set()
    return set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())


def levels() -> tuple[str, ...]:
    """What this machine has, from the lowest on."""
    wanted = {
        "default": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"avx512_bf16"},
    }
    flags = instructions()
    return tuple(itertools.takewhile(lambda level: wanted[level] <= flags, LEVELS))


def emulated(level: str) -> bool:
    """Whether tiles are software here."""
    return level == "amx" and not {"amx_tile", "amx_bf16"} <= instructions()


def types_of(level: str) -> tuple[str, ...]:
    return MULTIPLIED.get(level, TYPES)


def attention_cases(level: str) -> tuple[str, ...]:
    return tuple(f"X({type_})" for type_ in types_of(level))


def trials(some_levels: list[str], sanitizers: list[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(level, sanitizer, cases); what threads share depends on neither level nor type, so that one of each serves."""
    for level, sanitizer in itertools.product(some_levels, sanitizers):
        if sanitizer != "thread":  # kernels of attention, steps, norms, scans and matrices share nothing
            yield level, sanitizer, attention_cases(level)
            for cases in (MATRIX,) if level in MULTIPLIED else (STEP, LAYER_NORM, SCAN):  # MULTIPLIED's are AVX-512's
                yield level, sanitizer, cases
    for level, sanitizer, type_, cell in itertools.product(some_levels, sanitizers, TYPES, CELLS):
        if type_ not in types_of(level):
            continue
        if sanitizer == "thread" and (level, type_) != (some_levels[0], types_of(level)[0]):
            continue
        yield level, sanitizer, (f"X({type_}, {cell})",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=levels(), default=list(levels()))
    parser.add_argument("--sanitizers", nargs="+", choices=SANITIZERS, default=list(SANITIZERS))
    chosen = parser.parse_args()

    def tried(trial: tuple[str, str, tuple[str, ...]]) -> str:
        level, sanitizer, cases = trial
        return failure(program(level, cases, *SANITIZERS[sanitizer]))

    every = list(trials(chosen.levels, chosen.sanitizers))
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for trial, wrong in zip(every, pool.map(tried, every), strict=True):
            failed += bool(wrong)
            level, sanitizer, cases = trial
            print(level, sanitizer, *cases, wrong or "passed", flush=True)
    print(f"{failed} of {len(every)} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
