"""AMX's level on a processor without AMX: its tests in processes of their own, with a library whose tiles are software
(tests/csrc/emulator/tiles.h). What the instructions do beside them is the processor's own: it must have AVX512-BF16."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .planted import build, cpu

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "attention": (
        "ops/test_attention_cpu.py",
        "ops/test_attention_decode_cpu.py",
        "modules/test_transformer.py",
        "modules/test_transformer_training.py",
    ),
    "recurrence": ("ops/test_recurrent.py", "ops/test_recurrent_cpu.py", "ops/test_recurrent_products.py", "ops/test_resets.py"),
    "products": ("functional/test_matmul_precision.py", "functional/test_native_training.py", "ops/test_linear_cpu.py"),
    "the rest": ("ops/test_scan_cpu.py", "test_pack.py"),
}


def program() -> Path:
    source, header = ROOT / "tests/csrc/tiles.cpp", ROOT / "tests/csrc/emulator/tiles.h"
    try:
        compiler = build.compiler()
        command = (compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-include", header)
        return build.made("tiles", "", (build.version(compiler), source.read_text(), header.read_text()), *command, source)
    except build.Unavailable as reason:
        pytest.skip(str(reason))


def test_tiles_multiply():
    done = subprocess.run([program(), "products"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "misuse",
    [
        "a tile without a configuration",
        "a tile that the configuration leaves out",
        "a configuration within another",
        "a palette other than 1, or a row to start from",
        "a tile of more than 16 rows of 64 bytes",
        "a product with one tile twice",
        "a product of tiles that do not fit",
    ],
)
def test_misuse_ends_the_program(misuse):
    done = subprocess.run([program(), misuse], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGABRT, f"emulated AMX: {misuse}\n")


@pytest.fixture(scope="module")
def library() -> Path:
    """Made from the objects of `make library`; only what multiplies by tiles is compiled again."""
    folders = [ROOT / "build" / f"native-{kind}" for kind in ("cuda", "cpu")]
    cache = next((folder / "CMakeCache.txt" for folder in folders if (folder / "libfastseq.so").is_file()), None)
    if cache is None:
        pytest.skip("needs what `make library` leaves in build")
    settings = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.MULTILINE))
    if settings["FASTSEQ_BUILD_LEVELS"] != "all":
        pytest.skip("needs a library of all levels, `make library`")
    done = subprocess.run(
        [settings["CMAKE_MAKE_PROGRAM"], "-C", cache.parent, "fastseq_emulated"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return cache.parent / "libfastseq_emulated.so"


@pytest.mark.skipif(not cpu.emulated("amx") or "amx" not in cpu.levels(), reason="for processors with AVX512-BF16 and no AMX")
@pytest.mark.timeout(1800)  # the first one compiles, and each is many tests
@pytest.mark.xdist_group("emulated AMX")
@pytest.mark.parametrize("of", FILES)
def test_level(library, of):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--level", "amx", "-m", "not slow"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*command, *(f"tests/{file}" for file in FILES[of])],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment | {"FASTSEQ_LIBRARY": str(library), "FASTSEQ_CPU_LEVEL": "amx"},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and re.search(r"\d+ passed", said) and "this processor has no" not in said, said
