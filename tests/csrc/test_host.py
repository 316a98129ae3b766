"""Kernels of this folder on the host's CPU, in orders that seeds choose, and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

from fastseq.backends import library
from support import cuda_host

from .conftest import build, gpu_program, host_program

# These have every pair of an order of threads and an order of copies.
SEEDS = 12


def passes(program: Path, *arguments: int) -> None:
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["plain", "address"])
@pytest.mark.parametrize("name", ["test_prims", "exchange", "misuse", "recurrent"])
def test_on_the_host(name, sanitizer):
    passes(host_program(name, sanitizer), 0, SEEDS)


def test_without_races():
    passes(host_program("exchange", "thread"), 0, SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_prims", "exchange", "recurrent"])
def test_without_races_more(name):
    passes(host_program(name, "thread"), SEEDS, SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_prims", "exchange", "misuse", "recurrent"])
def test_more_seeds(name):
    passes(host_program(name), SEEDS, 500)


def test_the_backend_cuda_host_has_its_kernels():
    """`make test` builds them first; where it could not, its tests are skipped, and this one says why."""
    pytest.importorskip("pybind11")
    try:
        path = build.module_path()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    if library.reason() is None and (build.BUILD / "fastseq_host.so").exists():
        assert (build.BUILD / "fastseq_host.so").resolve() == path, "built from other sources: `make host-kernels`"
        assert cuda_host.available() is None


TILES = [("Tile16<gpu::Bfloat16>", 4), ("TileTf32", 1), ("TileTf32", 4), ("TileFloat", 1), ("TileFloat", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize(("tile", "width"), TILES)
def test_other_tiles(tile, width, sanitizer):
    defines = (f"-DFASTSEQ_TEST_TILE={tile}", f"-DFASTSEQ_TEST_WIDTH={width}")
    passes(host_program("recurrent", sanitizer, defines=defines), 0, SEEDS)


def test_fragments_are_those_of_cute():
    """CuTe's headers say which element of a matrix a lane holds where; they compile without a CUDA toolkit."""
    includes = []
    for package, folder in (
        ("cutlass_library", "source/include"),
        ("nvidia.cuda_cccl", "include"),
        ("triton", "backends/nvidia/include"),
    ):
        spec = importlib.util.find_spec(package) if importlib.util.find_spec(package.partition(".")[0]) else None
        if spec is None or not (path := Path(spec.origin).parent / folder).is_dir():
            pytest.skip(f"needs the headers of {package}: pip install --no-deps -r requirements/cute.txt")
        includes.append(path)
    passes(host_program("fragments", includes=includes))


def test_other_machines_switch_by_ucontext():
    passes(host_program("exchange", runtime_defines=("-DFASTSEQ_HOST_UCONTEXT",)), 0, SEEDS)


ON_GPUS = ("test_prims", "exchange", "recurrent")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("name", ON_GPUS)
def test_compiles_for_a_gpu(name, capability):
    gpu_program(name, capability, "-Werror=all-warnings")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPUS)
def test_on_a_gpu(name):
    passes(gpu_program(name, torch.cuda.get_device_capability()), 0, 20)
