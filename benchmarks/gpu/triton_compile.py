"""Compiles Triton kernels exactly as a launch would, for GPUs that need not be there, and reads what the compiler made of them.

Needs kernels that were imported without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

THREADS = 32  # of a warp
REGISTERS = 1 << 16  # of a multiprocessor
REGISTER_UNIT = 8  # registers are given to a thread in eights
RESERVED = 1 << 10  # bytes of shared memory that the driver takes for each block


class Limits(NamedTuple):
    """Of an architecture: bytes of shared memory of a block and of a multiprocessor, warps of a multiprocessor."""

    block: int
    shared: int
    warps: int


ARCHITECTURES = {
    80: Limits(163 << 10, 164 << 10, 64),
    90: Limits(227 << 10, 228 << 10, 64),
    100: Limits(227 << 10, 228 << 10, 64),
    120: Limits(99 << 10, 100 << 10, 48),
}
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # matrix products, the best first


class Launch(NamedTuple):
    """What a launcher gave a kernel."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grid: Any

    def make(self) -> None:
        """The launch itself."""
        self.kernel[self.grid](*self.args, **self.kwargs)


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. ``spilled``: bytes of local memory of a thread. ``products``: the matrix instruction, or ""."""

    registers: int
    spilled: int
    shared: int
    warps: int
    stages: int
    products: str
    resident: int  # blocks that a multiprocessor holds at once

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block a launch of a Triton kernel is noted instead of made, so tensors may be on any device, meta too."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append(Launch(self, args, kwargs, grid))
    try:
        yield launches
    finally:
        JITFunction.run = run


@contextmanager
def attention_configs(capability: int, instead: dict[str, Any] | None = None) -> Iterator[None]:
    """Attention launchers choose configs as on a device of this architecture, or take those of ``instead``, by kernel."""
    from fastseq.kernels.attention import configs

    def of(device: Any, kernel: str, dtype: Any, width: int, relative: bool = False) -> Any:
        if instead and kernel in instead:
            return instead[kernel]
        return configs.choose(configs.family((capability // 10, capability % 10)), kernel, dtype.itemsize, width, relative)

    before, configs.of = configs.of, of
    try:
        yield
    finally:
        configs.of = before


@contextmanager
def recurrent_configs(capability: int) -> Iterator[None]:
    """Recurrent launchers choose configs as on a device of this architecture, whatever form the environment forces."""
    from fastseq.kernels.recurrent import configs

    before = configs.shared_memory, configs.forced_form
    configs.shared_memory, configs.forced_form = lambda device: ARCHITECTURES[capability].block, lambda: None
    try:
        yield
    finally:
        configs.shared_memory, configs.forced_form = before


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel, specialized to the launch's arguments by Triton's own rules (alignment, ones, constants)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    target = GPUTarget("cuda", capability, THREADS)
    backend = make_backend(target)
    kwargs = {"debug": False, **launch.kwargs}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *launch.args, **kwargs
    )
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options.__dict__)


def resources(launch: Launch, capability: int) -> Resources:
    """Compiles, and reads registers and local memory from the cubin, the instruction from the PTX."""
    return resources_of(compiled(launch, capability), capability)


def resources_of(kernel: Any, capability: int) -> Resources:
    usage = _usage(kernel.asm["cubin"])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    products = next((name for name in INSTRUCTIONS if name in kernel.asm["ptx"]), "")
    spilled = max(usage["STACK"], usage["LOCAL"])
    resident = resident_blocks(usage["REG"], shared, warps, capability)
    return Resources(usage["REG"], spilled, shared, warps, kernel.metadata.num_stages, products, resident)


def resident_blocks(registers: int, shared: int, warps: int, capability: int) -> int:
    """Blocks of a kernel that fit on one multiprocessor; 0: it cannot be launched."""
    limits = ARCHITECTURES[capability]
    if shared > limits.block or registers > 255:
        return 0
    rounded = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(REGISTERS // (rounded * warps * THREADS), limits.shared // (shared + RESERVED), limits.warps // warps)


def _usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
