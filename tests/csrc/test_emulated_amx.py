"""AMX's level on a processor without AMX: its tests in processes of their own, with a library whose tiles are software
(tests/csrc/emulator/tiles.h). What the instructions do beside them is the processor's own: it must have AVX512-BF16."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .planted import cpu

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "attention": ("ops/test_attention_cpu.py", "ops/test_attention_decode_cpu.py", "modules/test_transformer.py"),
    "recurrence": ("ops/test_recurrent.py", "ops/test_recurrent_cpu.py", "ops/test_recurrent_products.py", "ops/test_resets.py"),
    "products": ("functional/test_matmul_precision.py", "functional/test_native_training.py", "ops/test_linear_cpu.py"),
    "the rest": ("ops/test_scan_cpu.py", "test_pack.py"),
}

pytestmark = [
    pytest.mark.skipif(not cpu.emulated("amx") or "amx" not in cpu.levels(), reason="for processors with AVX512-BF16 and no AMX"),
    pytest.mark.xdist_group("emulated AMX"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    """Made from the objects of `make library`; only what multiplies by tiles is compiled again."""
    folders = [ROOT / "build" / f"native-{kind}" for kind in ("cuda", "cpu")]
    cache = next((folder / "CMakeCache.txt" for folder in folders if (folder / "build.ninja").is_file()), None)
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
