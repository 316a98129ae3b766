"""What a tile of an attention kernel costs: products, exponentials and bytes, and the time that follows on a device.

A block of the grid walks over tiles of BM queries and BN keys. Per tile of E features (of queries and keys) and V (of values):

    kernel    products of 2 BM BN n FLOP, n summed     bytes streamed             held by the block
    forward   E + V         (q k, w v)                 keys and values            queries, result
    bwd_dq    2 E + V       (q k, dout v, dz k)        keys and values            queries, dout, dq
    bwd_dkdv  2 E + 2 V     (q k, dout v, w dout, dz q)  queries and dout         keys, values, dk, dv

A multiprocessor needs, for a tile, as many cycles as its slowest unit (matrix units, exponential units, second-level cache) if
others of its blocks fill the gaps, and up to their sum if it holds one block only: slowest + (sum - slowest) / resident blocks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

EXPONENTIALS = 16  # per cycle and multiprocessor, on all of these architectures
CACHE_BYTES = 64  # per cycle and multiprocessor from the second-level cache
FLOAT_FLOPS = 256  # per cycle and multiprocessor outside the matrix units: 128 lanes, multiply and add


@dataclass(frozen=True)
class Device:
    """A typical product of an architecture, by its data sheet; `products`: FLOP per cycle and multiprocessor, 16-bit operands."""

    name: str
    multiprocessors: int
    hertz: float
    products: int
    memory: float  # bytes/s


DEVICES = {
    80: Device("A100 80 GB SXM", 108, 1.41e9, 2048, 2.0e12),
    90: Device("H200 SXM", 132, 1.83e9, 4096, 4.8e12),
    100: Device("B200", 148, 1.85e9, 8192, 8.0e12),
    120: Device("RTX 5090", 170, 2.41e9, 512, 1.79e12),
}
SYNC_ON_HOPPER = 0.62  # of the rate of wgmma that mma.sync reaches on sm_90


@dataclass(frozen=True)
class Cost:
    """Of one tile, and of the whole launch."""

    tile_flops: float
    tile_bytes: float
    intensity: float  # FLOP per byte streamed
    cycles: dict[str, float]  # of a tile, by unit
    tiles: int
    blocks: int
    seconds: float
    bound: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


PRODUCTS = {"forward": (1, 1), "bwd_dq": (2, 1), "bwd_dkdv": (2, 2)}  # of E, of V
STREAMS = {"forward": "keys", "bwd_dq": "keys", "bwd_dkdv": "queries"}


def cost(
    kernel: str,
    tile: tuple[int, int],
    features: tuple[int, int],
    itemsize: int,
    sizes: tuple[int, int, int, int],
    causal: bool,
    capability: int,
    resident: int,
    instruction: str,
) -> Cost:
    """Of a launch on DEVICES[capability].

    Args:
        kernel: one of PRODUCTS.
        tile: BM, BN.
        features: E, V.
        itemsize: bytes of an element.
        sizes: B, H, T, S.
        resident: blocks that a multiprocessor holds, from the compiler's registers and shared memory.
        instruction: the matrix instruction that the compiler chose; "": none.
    """
    device, (BM, BN), (E, V), (B, H, T, S) = DEVICES[capability], tile, features, sizes
    of_e, of_v = PRODUCTS[kernel]
    flops = 2 * BM * BN * (of_e * E + of_v * V)
    streamed = (BN if STREAMS[kernel] == "keys" else BM) * (E + V) * itemsize
    rate = device.products * 2 / max(itemsize, 2)
    if not instruction:
        rate = FLOAT_FLOPS
    elif capability == 90 and instruction == "mma.sync":
        rate *= SYNC_ON_HOPPER
    cycles = {"products": flops / rate, "exponentials": BM * BN / EXPONENTIALS, "cache": streamed / CACHE_BYTES}
    slowest = max(cycles, key=lambda unit: cycles[unit])
    per_tile = cycles[slowest] + (sum(cycles.values()) - cycles[slowest]) / max(resident, 1)
    own, other, step, stride = (T, S, BM, BN) if STREAMS[kernel] == "keys" else (S, T, BN, BM)
    blocks = B * H * math.ceil(own / step)
    walked = math.ceil(other / stride)
    tiles = blocks * walked
    if causal:
        tiles = math.ceil(tiles / 2 + blocks * step / stride / 2)
    places = device.multiprocessors * max(resident, 1)
    waves = blocks / places if causal else math.ceil(blocks / places)  # causal blocks differ, the longest first: no last wave
    shared = max(waves * device.multiprocessors * max(resident, 1) / blocks, 1.0)
    seconds = tiles * shared * per_tile / device.multiprocessors / device.hertz
    return Cost(flops, streamed, flops / streamed, cycles, tiles, blocks, seconds, slowest)
