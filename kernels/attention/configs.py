"""Tiles and warps of every attention kernel, in one place, with the reasons.

The numbers come from what the compiler makes of them (registers, spills, shared memory), not from measurements on every device;
`tests/kernels/attention_launches.py` prints it, and its table keeps it. Of all tables:

* A thread has 255 registers, and a tile's sums live in them: with 8 warps, 128 x 128 sums of fp32 take 64. A spill in the inner
  loop costs more than a smaller tile.
* wgmma and tcgen05 (hopper, blackwell) take 64 rows of four warps each: fewer rows would fall back to the older mma.
* Keys and values of the next num_stages - 1 tiles wait in shared memory: a block has 227 KiB on hopper and blackwell, 163 on
  ampere, 99 on the others, which share ampere's table: it fits in 99.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch


class Config(NamedTuple):
    """How a kernel is launched. BM queries and BN keys make a tile."""

    BM: int
    BN: int
    num_warps: int = 4
    num_stages: int = 1

    def arguments(self) -> dict[str, Any]:
        return {**self._asdict(), "enable_fp_fusion": True}


# The interpreter: so small that short sequences have several tiles, and no squares, which would hide rows taken for columns.
_INTERPRETED = {
    "forward": Config(32, 16),
    "forward_relative_bias": Config(16, 32),
    "bwd_dq": Config(32, 16),
    "bwd_dkdv": Config(16, 32),
}
_INTERPRETED_ELSE = Config(16, 16)

# fp16 and bf16, by kernel and family: for heads of up to 64, 128 and 256 features.
_HALF = {
    # 4 warps leave room for two blocks on a multiprocessor, one of which multiplies while the other exponentiates. Where the sums
    # need 8 warps, 128 rows read keys and values half as often as 64, as the second-level cache could not deliver more.
    ("forward", "hopper"): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("forward", "blackwell"): (Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
    ("forward", "ampere"): (Config(128, 64, 4, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    # looked up entry by entry: a 64-bit address for each score of a thread, for which fewer keys make room
    ("forward_relative_bias", "hopper"): (Config(128, 32, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
    ("forward_relative_bias", "ampere"): (Config(128, 32, 8, 3), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    # one tile for each program: nothing to prefetch, and no sum over tiles
    ("weights", "hopper"): (Config(64, 64, 4), Config(64, 64, 4), Config(64, 64, 8)),
    ("weights", "ampere"): (Config(64, 64, 4), Config(64, 64, 4), Config(64, 64, 8)),
    ("bwd_dq", "hopper"): (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
    ("bwd_dq", "blackwell"): (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
    ("bwd_dq", "ampere"): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8)),
    # Two sums, dk and dv, beside two score tiles: 64 queries x 128 keys with 8 warps are what 255 registers hold. What spills
    # lies outside of the inner loops (addresses for the next query head), but for a few words; with dropout it lies in them. On
    # hopper, 32 queries spill nothing, but a wgmma of 64 x 32 reads its operands from shared memory for 24 cycles to multiply for
    # 16 (64 x 64: 32 and 32), and half of the products are of that shape.
    ("bwd_dkdv", "hopper"): (Config(64, 128, 8, 2), Config(64, 128, 8, 2), Config(32, 64, 8, 2)),
    ("bwd_dkdv", "blackwell"): (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 64, 8, 2)),
    ("bwd_dkdv", "ampere"): (Config(64, 128, 8, 2), Config(64, 64, 8, 2), Config(16, 64, 8, 2)),
    # One score tile more, in registers, over a whole launch; loops are bound by loads of whole tiles, which other blocks on the
    # multiprocessor hide, not stages.
    ("bwd_dbias", "hopper"): (Config(128, 64, 8), Config(64, 64, 8), Config(64, 64, 8)),
    ("bwd_dbias", "ampere"): (Config(64, 64, 8), Config(32, 64, 4), Config(32, 64, 8)),
    ("bwd_drelbias", "hopper"): (Config(64, 64, 4), Config(64, 64, 8), Config(64, 64, 8)),
    ("bwd_drelbias", "ampere"): (Config(64, 64, 4), Config(32, 32, 4), Config(32, 32, 8)),
}
# With Transformer-XL's product of BM queries with a band of 2 max(BM, BN) distances: a second score tile, at least twice as wide.
# With 256 features on hopper and blackwell it spills all the same, as the price of their matrix instructions.
_HALF_RELATIVE = {
    ("forward", "hopper"): (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 1)),
    ("forward", "blackwell"): (Config(64, 64, 8, 1), Config(64, 32, 8, 1), Config(64, 16, 8, 1)),
    ("forward", "ampere"): (Config(32, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 8)),
    ("weights", "hopper"): (Config(64, 64, 8), Config(64, 32, 8), Config(64, 16, 8)),
    ("weights", "ampere"): (Config(32, 32, 4), Config(32, 32, 8), Config(16, 32, 4)),
    # 64 rows spill in the loops on hopper, and need twice the instructions for a score on blackwell
    ("bwd_dq", "hopper"): (Config(32, 32, 4, 2), Config(32, 32, 8), Config(32, 32, 8)),
    ("bwd_dq", "ampere"): (Config(32, 32, 4, 2), Config(32, 32, 8), Config(16, 16, 4)),
    # 64 keys, as wgmma and tcgen05 want, only where nothing spills
    ("bwd_dkdv", "hopper"): (Config(32, 64, 8), Config(32, 32, 8), Config(32, 32, 8)),
    ("bwd_dkdv", "blackwell"): (Config(32, 64, 8), Config(32, 64, 8), Config(32, 32, 8)),
    ("bwd_dkdv", "ampere"): (Config(32, 32, 4), Config(32, 32, 8), Config(16, 32, 8)),
    ("bwd_dbias", "hopper"): (Config(64, 64, 8), Config(64, 64, 8), Config(16, 16, 4)),
    ("bwd_dbias", "ampere"): (Config(32, 32, 4), Config(32, 32, 8), Config(16, 16, 4)),
    ("bwd_drelbias", "hopper"): (Config(32, 32, 8), Config(16, 16, 4), Config(16, 16, 4)),
    ("bwd_drelbias", "ampere"): (Config(16, 16, 4), Config(32, 32, 8), Config(16, 16, 4)),
}
# fp32, and tf32 with the same tiles. Without tensor cores operands stay in registers: small tiles, many warps, and 16 of them for
# 256 features, as 8 spill.
_SINGLE = {
    "forward": (Config(64, 32, 8, 2), Config(32, 64, 8), Config(32, 32, 16)),
    "weights": (Config(32, 32, 4), Config(32, 32, 4), Config(32, 32, 4)),
    "bwd_dq": (Config(64, 32, 8), Config(16, 32, 8), Config(16, 32, 8)),
    "bwd_dkdv": (Config(32, 64, 8), Config(16, 32, 8), Config(16, 16, 16)),
    "bwd_dbias": (Config(32, 32, 4), Config(32, 32, 8), Config(32, 32, 8)),
    "bwd_drelbias": (Config(32, 32, 4), Config(32, 32, 8), Config(32, 32, 8)),
}
_SINGLE_RELATIVE = {
    "forward": (Config(32, 32, 8), Config(32, 16, 8), Config(16, 16, 8)),
    "weights": (Config(32, 32, 4), Config(32, 32, 4), Config(16, 16, 4)),
    "bwd_dq": (Config(32, 32, 8), Config(16, 16, 8), Config(16, 16, 8)),
    "bwd_dkdv": (Config(16, 16, 4), Config(16, 16, 8), Config(16, 16, 8)),
    "bwd_dbias": (Config(32, 32, 8), Config(16, 16, 8), Config(16, 16, 8)),
    "bwd_drelbias": (Config(32, 32, 8), Config(16, 16, 8), Config(16, 16, 8)),
}


def family(capability: tuple[int, int]) -> str:
    """Devices alike in matrix instructions and shared memory; of those to come, the least demanding."""
    return {9: "hopper", 10: "blackwell"}.get(capability[0], "ampere")


def choose(family: str, kernel: str, itemsize: int, width: int, relative: bool) -> Config:
    """The config for heads of that many (padded) features; ``relative``: with Transformer-XL's product."""
    if relative or itemsize > 2:
        kernel = kernel.removesuffix("_relative_bias")
    column = 0 if width <= 64 else 1 if width <= 128 else 2
    if itemsize > 2:
        return (_SINGLE_RELATIVE if relative else _SINGLE)[kernel][column]
    table = _HALF_RELATIVE if relative else _HALF
    near = "hopper" if family == "blackwell" else family
    return table.get((kernel, family), table[kernel, near])[column]


@cache
def _family(device: torch.device) -> str:
    return family(torch.cuda.get_device_capability(device))


def of(device: torch.device, kernel: str, dtype: torch.dtype, width: int, relative: bool = False) -> Config:
    """The config of a kernel on a device."""
    if device.type != "cuda":
        return _INTERPRETED.get(kernel, _INTERPRETED_ELSE)
    return choose(_family(device), kernel, dtype.itemsize, width, relative)
