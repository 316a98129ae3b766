"""Builds CUDA kernels for the host's CPU: programs of tests/csrc, and the recurrent kernels as a Python module, fastseq_host.

`python tests/csrc/host_build.py` builds the module and prints its path. What is built lies in build/host, under names that tell
what it was made from, so that nothing is made twice. $CXX chooses the compiler.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "host"

# What runs kernels on the host must not be instrumented: it would be seen doing what the kernels' threads do.
RUNTIME = tuple(
    f"tests/csrc/emulator/{name}.cpp"
    for name in ("context", "choice", "report", "scheduler", "primitives", "fragments", "launch")
)
KERNELS = (
    "csrc/limits/exchange.cu",
    *(f"csrc/recurrent/{name}" for name in ("plan.cpp", *(f"kernels_{p}.cu" for p in ("half", "bfloat16", "tf32", "float")))),
)
# Kernels read 16-bit numbers as words of 32 bits, and shared memory as what they need.
COMMON = ("-std=c++20", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror")
SANITIZERS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}


class Unavailable(Exception):
    """There is no compiler."""


@cache
def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


@cache
def compiler(sanitizer: str = "plain") -> str:
    """$CXX, g++ or clang++; for ThreadSanitizer a recent clang++ where there is one, whose fibers are many times faster."""
    clang = shutil.which("clang++")
    if sanitizer == "thread" and clang and int(re.search(r"version (\d+)", version(clang))[1]) >= 16:
        return clang
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise Unavailable("needs a C++ compiler")


def run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def made(name: str, suffix: str, inputs: Iterable[str], *command: str | Path) -> Path:
    """What a command makes of its inputs, found if it has been made before, by whichever process."""
    key = hashlib.sha256("\0".join((*inputs, *map(str, command))).encode()).hexdigest()[:16]
    path = BUILD / f"{name}-{key}{suffix}"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
            if not path.exists():
                unfinished = path.with_suffix(f".unfinished{suffix}")
                run(*command, "-o", unfinished)
                unfinished.replace(path)
    return path


def compiled(source: Path, tree: Path, flags: tuple[str, ...], sanitizer: str = "plain") -> Path:
    with_ = compiler(sanitizer)
    command = (with_, *COMMON, *flags, f"-I{tree / 'csrc'}", f"-I{tree / 'tests/csrc'}", "-x", "c++")
    return made(source.stem, ".o", (version(with_), run(*command, "-E", source)), *command, "-c", source)


@cache
def objects(sources: tuple[str, ...], tree: Path, flags: tuple[str, ...], sanitizer: str = "plain") -> tuple[Path, ...]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(lambda source: compiled(tree / source, tree, flags, sanitizer), sources))


def host_program(
    name: str,
    sanitizer: str = "plain",
    *others: str,
    includes: Iterable[Path] = (),
    defines: tuple[str, ...] = (),
    runtime_defines: tuple[str, ...] = (),
    tree: Path = ROOT,
    runtime: Path = ROOT,
) -> Path:
    """tests/csrc/<name>.cu of a tree, together with other sources of it."""
    flags = ("-O1", *SANITIZERS[sanitizer], *defines, *(f"-isystem{path}" for path in includes))
    parts = (
        *objects(RUNTIME, runtime, ("-O3", *runtime_defines)),
        *objects((f"tests/csrc/{name}.cu", *others), tree, flags, sanitizer),
    )
    return made(f"{name}-{sanitizer}", "", (), compiler(sanitizer), *flags, *parts)


def gpu_program(name: str, capability: tuple[int, int], *flags: str) -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Unavailable("needs nvcc")
    architecture = "".join(map(str, capability)) + ("a" if capability[0] == 9 else "")
    command = (nvcc, "-std=c++20", "-O2", *flags, f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}")
    source = ROOT / "tests/csrc" / f"{name}.cu"
    return made(f"{name}-gpu", "", (version(nvcc), run(*command, "-E", source)), *command, source)


def module_path() -> Path:
    import pybind11

    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    parts = (
        *objects(RUNTIME, ROOT, ("-O3",)),
        *objects(("tests/csrc/emulator/bindings.cpp",), ROOT, ("-O0", *includes)),
        *objects(KERNELS, ROOT, ("-O1",)),
    )
    return made("fastseq_host", ".so", (), compiler(), "-shared", *parts)


@cache
def module() -> ModuleType:
    """fastseq_host, built if need be."""
    path = str(module_path())
    loader = importlib.machinery.ExtensionFileLoader("fastseq_host", path)
    spec = importlib.util.spec_from_file_location("fastseq_host", path, loader=loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


def main() -> None:
    """Builds the module and names it fastseq_host.so, where the backend "cuda-host" looks for it."""
    path = module_path()
    unfinished, name = BUILD / f"fastseq_host.{os.getpid()}", BUILD / "fastseq_host.so"
    unfinished.symlink_to(path.name)
    unfinished.replace(name)
    print(name)


if __name__ == "__main__":
    main()
