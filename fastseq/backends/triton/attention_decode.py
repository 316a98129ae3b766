"""Launches ``kernels/attention/decode.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.types import DecodeSpec, empty_rows, state_dtype
from ...reference.attention_decode import capacity
from ..query import AttentionQuery
from . import _launch
from .attention import variant as _widths
from .attention import why_not
from .attention_args import accumulator, number, power, precision, rows, scalars

__all__ = ["attention_decode_forward", "choose_parts", "choose_tile", "variant", "why_not"]

_MOST_PARTS = 128
_CHUNK = 16  # parts that the merge holds in registers at once


class Tile(NamedTuple):
    rows: int  # query heads of a key head times queries
    keys: int
    warps: int


_INTERPRETED = Tile(16, 16, 4)  # so small that short sequences have several


def choose_tile(rows: int, width: int, itemsize: int) -> Tile:
    """The work of a program at a time, so that nothing spills.

    About 16 KiB of keys and as much of values: with three tiles on their way, two programs fit on a multiprocessor. More rows
    than one tile holds read the cache again. In fp32 there are no tensor core products, operands lie in registers: fewer rows,
    more threads.

    Args:
        rows: query heads of a key head times queries.
        width: the larger of the padded head dims.
        itemsize: bytes of an element.
    """
    rows = min(64 if itemsize == 2 else 32, power(rows))
    keys = min(64 if rows == 64 else 128, max(16, (1 << 14) // (width * itemsize)))
    return Tile(rows, keys, 8 if itemsize > 2 or rows == 64 else 4)


def choose_parts(programs: int, tiles: int, processors: int) -> int:
    """Into how many parts to cut the keys of a sequence.

    A decoding step is bound by memory, so every multiprocessor should be reading. Parts are made until the programs fill the
    multiprocessors once or twice: a last wave that is partly empty idles some of them, more waves only add partial results to
    write and merge. Among those, the fewest parts that keep 85 % of the busy share of the best: what a finer cut gains beyond
    that is less than its merge costs. A part has at least two tiles of keys, so that one arrives while the other is in use.

    Args:
        programs: programs without a cut: sequences times key heads times row blocks.
        tiles: tiles of keys in the longest sequence.
        processors: multiprocessors of the device.
    """
    most = min(_MOST_PARTS, tiles // 2, 2 * processors // programs)
    busy = {parts: _busy(programs * parts, processors) for parts in range(1, most + 1)}
    return next((parts for parts, share in busy.items() if share >= 0.85 * max(busy.values())), 1)


def _busy(programs: int, processors: int) -> float:
    """Share of the multiprocessors that work, on average over the waves."""
    return programs / (-(-programs // processors) * processors)


def variant(query: AttentionQuery, family: str) -> str:
    """The widths that a call's kernels are compiled for, and how many rows share the keys."""
    rows = query.heads[0] // max(1, query.heads[1]) * query.lengths[0]
    return f"{_widths(query, family)}, {min(64, power(rows))} rows"


def attention_decode_forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    from fastseq.kernels.attention import decode as kernels
    from fastseq.kernels.attention.args import Parts, Scalars

    lengths, block_table, slopes, sinks, scale, softcap, left, right, num_splits = spec
    batch, heads, queries, features = q.shape
    features_v, heads_k, wide = v_cache.shape[3], k_cache.shape[1], state_dtype(q.dtype)
    out, lse = empty_rows(q, features_v), q.new_empty(batch, heads, queries, dtype=wide)
    if lse.numel() == 0:
        return out, lse
    keys = capacity(k_cache, block_table)
    group = heads // heads_k
    block_e, block_ev = power(features), power(features_v)
    tile = _INTERPRETED if _launch.INTERPRETED else choose_tile(group * queries, max(block_e, block_ev), q.element_size())
    programs = batch * heads_k * -(-group * queries // tile.rows)
    parts = num_splits or choose_parts(programs, -(-keys // tile.keys), _processors(q.device))
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = q.new_empty(parts * batch, heads, queries, features_v, dtype=wide)
        part_lse = q.new_empty(parts * batch, heads, queries, dtype=wide)
    shape = Parts(
        scale=number(scale, q.dtype),
        softcap=number(softcap, q.dtype) if softcap else None,
        left=left if 0 <= left < keys else None,
        right=right if 0 <= right < keys else None,
        slopes=None if slopes is None else Scalars(slopes, slopes.stride(0) if len(slopes) > 1 else 0, slopes.stride(1)),
        sinks=sinks,
    )
    pages = None if block_table is None else kernels.Pages(block_table, block_table.stride(0))
    with _launch.on(q.device):
        kernels.decode[(parts * programs,)](
            rows(q), rows(k_cache), rows(v_cache), rows(part_out), scalars(part_lse), pages, lengths, shape,
            batch, queries, keys, heads_k, parts, GROUP=group, PAGE=1 if pages is None else k_cache.shape[2],
            E=features, EV=features_v, BM=tile.rows, BN=tile.keys, BE=block_e, BEV=block_ev,
            ACC=accumulator(q.dtype), PRECISION=precision(q.dtype), num_warps=tile.warps, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
        if parts > 1:
            kernels.combine[(queries * heads * batch,)](
                part_out, part_lse, rows(out), lse, queries, heads, EV=features_v, PARTS=parts, BP=_power(parts),
                CHUNK=min(_CHUNK, _power(parts)), BEV=block_ev, num_warps=2, enable_fp_fusion=True,
            )  # fmt: skip
    return out, lse


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _processors(device: torch.device) -> int:
    """Multiprocessors; 1 in the interpreter, which runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
