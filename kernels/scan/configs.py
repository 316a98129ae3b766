"""How a scan is cut into programs, and why."""

from __future__ import annotations

from typing import NamedTuple

UNROLLED = 8  # steps that are loaded at once: more would fill the registers
WIDE, NARROW = 128, 32  # channels of a program: whole lines of memory either way
SHORTEST = 128  # steps of a chunk, which costs a launch and reads a and b once more
INTERPRETED = 10, 2  # steps of a chunk and steps at once in the interpreter, so that short sequences have several and an odd end


class Config(NamedTuple):
    channels: int  # of a program
    chunks: int
    span: int  # steps of a chunk
    unrolled: int  # steps at once
    warps: int


def choose(steps: int, rows: int, channels: int, processors: int) -> Config:
    """Programs of many channels as long as those fill the device twice, then of few, then of chunks of time.

    Args:
        processors: multiprocessors of the device; 0: Triton's interpreter.
    """
    tile = min(WIDE, max(NARROW, 1 << (channels - 1).bit_length()))
    if processors == 0:
        return Config(tile, -(-steps // INTERPRETED[0]), *INTERPRETED, 4)
    if rows * -(-channels // tile) < 2 * processors:
        tile = NARROW
    programs = rows * -(-channels // tile)
    chunks = max(1, min(2 * processors // max(1, programs), steps // SHORTEST))
    span = -(-steps // chunks)
    return Config(tile, -(-steps // max(1, span)), span, UNROLLED, max(1, tile // 64))
