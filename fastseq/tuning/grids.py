"""The standard calls of ``python -m fastseq tune``, in order of worth: sizes that many others are near to come first."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product, zip_longest

from fastseq.backends.precision import fp32_precision
from fastseq.choice.decision import CHAIN, MODES, Call

RNNS = ("lstm", "gru", "rnn_tanh")
LAYOUTS = ("padded", "packed")
SUITES = ("recurrent", "attention", "cells")


def calls(suite: str, kind: str) -> list[Call]:
    """Of a suite, for a type of device, "cpu" or "cuda"."""
    grid = {"recurrent": _recurrent, "attention": _attention, "cells": _cells}[suite]
    return list(dict.fromkeys(grid(kind)))


def mixed(suites: tuple[str, ...], kind: str) -> list[Call]:
    """Of several suites, taken in turn."""
    each = [calls(suite, kind) for suite in suites]
    return [call for row in zip_longest(*each) for call in row if call is not None]


def _dtypes(kind: str) -> tuple[tuple[str, str], ...]:
    """With the precision of their products."""
    if kind == "cpu":
        return ("float32", ""), ("bfloat16", "")
    return ("bfloat16", ""), ("float16", ""), ("float32", fp32_precision())


def _recurrent(kind: str) -> Iterator[Call]:
    cpu = kind == "cpu"
    coarse = product((128,), (1, 32) if cpu else (8, 64), (64, 256) if cpu else (256, 1024))
    fine = product((128, 16, 1), (1, 8, 32), (64, 128, 256, 512))
    if not cpu:
        fine = product((512, 64), (1, 8, 32, 128), (128, 256, 512, 1024, 2048))
    for sizes, (lanes, dtypes) in chain(
        product(coarse, ((1, _dtypes(kind)[:1]),)), product(fine, ((1, _dtypes(kind)), (2, _dtypes(kind)[:1])))
    ):
        T, B, H = sizes
        for (dtype, precision), cell, layout, mode in product(dtypes, RNNS, LAYOUTS, MODES):
            yield Call("recurrent", mode, cell, dtype, precision, layout, lanes, (B, T, H))


def _cells(kind: str) -> Iterator[Call]:
    for B, H in ((1, 128), (16, 512), (64, 128), (1, 512), (16, 128), *product((4, 1, 16, 64), (256, 1024, 128, 512, 64))):
        steps = ((MODES[False], 1), (MODES[True], CHAIN), (MODES[True], 1))
        for (dtype, precision), (mode, T), cell in product(_dtypes(kind), steps, RNNS):
            yield Call("recurrent_cell", mode, cell, dtype, precision, "padded", 1, (B, T, H))


def _attention(kind: str) -> Iterator[Call]:
    cpu = kind == "cpu"
    rows, few = (8, 64), (1, 4)

    def square(T: int, E: int, BH: int) -> Iterator[Call]:
        for dtype, features, mode in product(_dtypes(kind), ("plain", "causal", "mask", "bias"), MODES):
            if T * T * BH <= (1 << 23 if cpu else 1 << 31):
                yield Call("attention", mode, features, *dtype, "padded", 1, (BH, T, T, E))

    def decoding(Tk: int, E: int, BH: int, Tq: int) -> Iterator[Call]:
        for dtype, lanes in product(_dtypes(kind), (1, 4, 8)):
            yield Call("attention", MODES[0], "plain", *dtype, "padded", lanes, (BH, Tq, Tk, E))

    for T in (128, 16, 512) if cpu else (1024, 4096):
        yield from square(T, 64, 8)
        yield from decoding(4 * T, 64, 8, 1)
    for T, E, BH in product((128, 512, 16, 32, 64, 256, 1024, 2048) if cpu else (512, 1024, 2048, 4096, 8192), (64, 128), rows):
        yield from square(T, E, BH)
        for Tq in few:
            yield from decoding(4 * T, E, BH, Tq)
