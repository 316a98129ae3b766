"""Attention: the calls that are tested, their inputs, and the same by plain PyTorch with every score in memory.

In fp64 this is the truth of every test: of the package it knows the names of arguments, nothing that computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastseq.ops.types import Spec


@dataclass(frozen=True)
class AttentionCase:
    """One call; letters as in ``reference/attention.py``. ``mask``, ``bias``, ``blocks``: which of b, h, q, k are not 1."""

    name: str
    batch: int = 2
    heads: tuple[int, int] = (2, 2)
    lengths: tuple[int, int] = (5, 7)
    features: tuple[int, int] = (8, 8)
    q_lengths: tuple[int, ...] = ()
    k_lengths: tuple[int, ...] = ()
    packed: tuple[tuple[int, int], ...] = ()  # queries and keys of each sequence
    mask: str | None = None
    dead: bool = False  # the mask hides every key from some queries
    bias: str | None = None
    hiding_bias: bool = False  # the bias has -inf entries
    relative_bias: int = 0  # entries
    relative_k: int = 0
    slopes: int = 0  # rows of the slopes: 1 or the batch
    softcap: float = 0.0
    sinks: bool = False
    dropout: float = 0.0
    place: tuple[int, ...] = ()  # of a part of a larger attention: what follows the seed
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    offset: int = 0
    blocks: str | None = None
    block_size: int = 0
    scale: float | None = None
    time_first: bool = False  # q, k, v are [B, T, H, E] in memory
    average: bool = False  # of the weights

    def __str__(self) -> str:
        return self.name


def _window(case: AttentionCase, **changes: Any) -> AttentionCase:
    return replace(case, right=0, **changes)


PLAIN = AttentionCase("plain")

ATTENTION_CASES = [
    PLAIN,
    AttentionCase("one-query", lengths=(1, 7)),
    AttentionCase("one-key", lengths=(5, 1), sinks=True),  # without, gradients that are zero are compared with rounding
    AttentionCase("one-of-each", batch=1, heads=(1, 1), lengths=(1, 1)),
    AttentionCase("several-tiles", batch=1, heads=(2, 1), lengths=(37, 71), features=(16, 16), time_first=True),
    AttentionCase("wide-heads", batch=1, heads=(1, 1), lengths=(9, 17), features=(64, 64)),
    AttentionCase("odd-features", features=(40, 24), time_first=True),
    AttentionCase("narrow-keys", features=(8, 20)),
    AttentionCase("grouped", heads=(4, 2)),
    AttentionCase("multi-query", heads=(3, 1), time_first=True),
    AttentionCase("scale", scale=-0.3),
    AttentionCase("causal", lengths=(7, 7), right=0),
    AttentionCase("causal-more-keys", lengths=(3, 7), right=0),
    AttentionCase("causal-more-queries", lengths=(7, 3), right=0),
    AttentionCase("causal-bottom-right", lengths=(3, 7), right=0, bottom_right=True),
    AttentionCase("causal-bottom-right-dead", lengths=(7, 3), right=0, bottom_right=True),
    AttentionCase("causal-tiles", batch=1, lengths=(71, 71), features=(16, 16), right=0, heads=(1, 1)),
    AttentionCase("window", batch=1, lengths=(70, 75), left=9, right=4, heads=(1, 1)),
    AttentionCase("window-bottom-right", batch=1, lengths=(35, 70), left=20, right=0, bottom_right=True, heads=(2, 1)),
    AttentionCase("window-left", left=1, lengths=(6, 7)),
    # from the last query, or the first, a window hides one key
    AttentionCase("window-left-hides-one-key", left=5, lengths=(7, 7)),
    AttentionCase("window-right-hides-one-key", right=5, lengths=(7, 7)),
    AttentionCase("window-hides-one-key-of-more", left=7, right=7, lengths=(5, 9), bottom_right=True, sinks=True),
    AttentionCase("offset", lengths=(5, 9), left=3, right=0, offset=3),
    AttentionCase("negative-offset", lengths=(6, 5), right=0, offset=-2),
    AttentionCase("mask-qk", mask="qk"),
    AttentionCase("mask-bk", mask="bk"),
    AttentionCase("mask-hq", mask="hq"),
    AttentionCase("mask-all-dead", mask="bhqk", dead=True, lengths=(6, 9)),
    AttentionCase("mask-causal", mask="bk", right=0, lengths=(7, 7), dead=True),
    AttentionCase("bias-all", bias="bhqk"),
    AttentionCase("bias-h", bias="h"),
    AttentionCase("bias-qk", bias="qk", heads=(4, 2)),
    AttentionCase("bias-bk", bias="bk"),
    AttentionCase("bias-bhq", bias="bhq"),
    AttentionCase("bias-hqk-causal", bias="hqk", lengths=(35, 35), right=0, batch=3),
    AttentionCase("bias-with-infinities", bias="hqk", hiding_bias=True),
    AttentionCase("relative-bias", relative_bias=11, lengths=(5, 7)),
    AttentionCase("relative-bias-short-causal", relative_bias=4, lengths=(7, 7), right=0),
    AttentionCase("relative-bias-tiles", relative_bias=105, lengths=(35, 70), batch=2, heads=(2, 1)),
    AttentionCase("transformer-xl", relative_k=9, lengths=(4, 9), right=0, bottom_right=True),
    AttentionCase("transformer-xl-both-sides", relative_k=13, lengths=(5, 7), heads=(4, 2)),
    AttentionCase("transformer-xl-tiles", relative_k=60, lengths=(35, 40), batch=1, heads=(2, 2), left=30, right=0),
    AttentionCase("slopes", slopes=1, heads=(4, 2)),
    AttentionCase("slopes-per-sequence-causal", slopes=2, right=0, bottom_right=True),
    AttentionCase("softcap", softcap=0.7),
    AttentionCase("sinks", sinks=True, heads=(4, 2)),
    AttentionCase("sinks-dead", sinks=True, lengths=(7, 3), right=0, bottom_right=True),
    AttentionCase("dropout", dropout=0.4, lengths=(5, 11)),
    AttentionCase("dropout-everything", dropout=1.0),
    AttentionCase("dropout-tiles-grouped", dropout=0.25, lengths=(35, 41), heads=(2, 1), left=13),
    AttentionCase("dropout-of-a-part", dropout=0.3, lengths=(18, 35), heads=(2, 1), place=(21, 7, 5, 9)),
    AttentionCase("dropout-of-a-part-in-quads", dropout=0.3, lengths=(5, 19), place=(3, 2**31 + 16, 2, 2), right=4),
    AttentionCase("key-lengths", batch=3, k_lengths=(7, 3, 0)),
    AttentionCase("both-lengths-causal", batch=3, q_lengths=(5, 2, 0), k_lengths=(4, 7, 3), right=0, bottom_right=True),
    AttentionCase("query-lengths", q_lengths=(2, 5), relative_bias=11),
    AttentionCase("blocks", blocks="hqk", block_size=16, lengths=(20, 33)),
    AttentionCase("blocks-of-each-sequence", blocks="bqk", block_size=16, heads=(1, 1), lengths=(20, 40), right=0, offset=20),
    AttentionCase("packed", packed=((5, 7), (0, 0), (3, 3))),
    AttentionCase("packed-without-keys", packed=((4, 0), (0, 4), (6, 5)), sinks=True),
    AttentionCase("packed-causal-grouped", packed=((5, 5), (1, 4), (33, 40)), heads=(2, 1), right=0, bottom_right=True),
    AttentionCase(
        "packed-with-positions",
        packed=((5, 7), (6, 3)),
        relative_bias=11,
        relative_k=9,
        slopes=2,
        softcap=1.5,
        dropout=0.3,
        left=3,
    ),
    AttentionCase("no-sequences", batch=0),
    AttentionCase("no-queries", lengths=(0, 7)),
    AttentionCase("no-keys", lengths=(5, 0)),
    AttentionCase("no-keys-sinks", lengths=(5, 0), sinks=True),
    AttentionCase(
        "everything",
        heads=(4, 2),
        lengths=(6, 9),
        features=(8, 12),
        mask="bk",
        dead=True,
        bias="hqk",
        relative_bias=12,
        relative_k=20,
        slopes=2,
        softcap=2.0,
        sinks=True,
        dropout=0.3,
        left=6,
        right=2,
        bottom_right=True,
        offset=-1,
        blocks="qk",
        block_size=16,
        q_lengths=(6, 4),
        k_lengths=(7, 9),
        time_first=True,
    ),
]

_BY_NAME = {case.name: case for case in ATTENTION_CASES}


def named(*names: str) -> list[AttentionCase]:
    return [_BY_NAME[name] for name in names]


SMALL_ATTENTION_CASES = named(
    "grouped",
    "causal-bottom-right-dead",
    "window-left",
    "mask-all-dead",
    "bias-h",
    "bias-bk",
    "relative-bias",
    "transformer-xl-both-sides",
    "sinks-dead",
    "both-lengths-causal",
    "packed-without-keys",
    "packed-with-positions",
    "no-keys-sinks",
    "everything",
)

# Dynamo takes equal sizes for one, so these differ; resized, the longest packed sequence stays
COMPILED_ATTENTION_CASES = [
    AttentionCase("plain", batch=3, heads=(4, 2), lengths=(5, 7), right=0, bottom_right=True),
    AttentionCase("everything", batch=3, heads=(4, 2), lengths=(5, 7), mask="bk", bias="hqk", relative_bias=11, relative_k=13,
                  sinks=True, softcap=2.0, slopes=1, dropout=0.3, k_lengths=(7, 4, 6)),
    AttentionCase("packed", heads=(6, 3), packed=((5, 7), (2, 3), (4, 6)), sinks=True),
]  # fmt: skip

WEIGHTS_CASES = [
    replace(case, name=f"{case.name}-{'average' if average else 'heads'}", average=average)
    for average in (False, True)
    for case in named(
        "plain",
        "grouped",
        "causal-bottom-right-dead",
        "window",
        "mask-all-dead",
        "bias-h",
        "relative-bias-short-causal",
        "transformer-xl-both-sides",
        "sinks-dead",
        "dropout-tiles-grouped",
        "dropout-of-a-part",
        "both-lengths-causal",
        "no-queries",
        "no-keys",
        "everything",
    )
]
SMALL_WEIGHTS_CASES = [case for case in WEIGHTS_CASES if case.name.startswith(("mask-all-dead", "sinks-dead", "everything"))]


def make(case: AttentionCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Inputs of a case, the same values for every dtype up to rounding; the tensors that have gradients require them."""
    torch.manual_seed(seed)
    (hq, hkv), (e, ev), (tq, tk), b = case.heads, case.features, case.lengths, case.batch
    if case.packed:
        nq, nk = (sum(pair[i] for pair in case.packed) for i in (0, 1))
        b = len(case.packed)

    def rows(heads: int, time: int, packed: int, features: int) -> Tensor:
        if case.packed:
            return torch.randn(packed, heads, features, dtype=torch.float64).transpose(0, 1)
        if case.time_first:
            return torch.randn(b, time, heads, features, dtype=torch.float64).transpose(1, 2)
        return torch.randn(b, heads, time, features, dtype=torch.float64)

    def pairs(which: str, time: tuple[int, int] = (tq, tk)) -> tuple[int, ...]:
        return tuple(n if letter in which else 1 for letter, n in zip("bhqk", (b, hq, *time), strict=True))

    inputs: dict[str, Any] = {"case": case}
    nq, nk = (nq, nk) if case.packed else (0, 0)
    inputs["q"], inputs["k"], inputs["v"] = rows(hq, tq, nq, e), rows(hkv, tk, nk, e), rows(hkv, tk, nk, ev)
    if case.bias is not None:
        inputs["bias"] = torch.randn(pairs(case.bias), dtype=torch.float64)
        if case.hiding_bias:
            inputs["bias"].masked_fill_(torch.rand(pairs(case.bias)) < 0.3, -torch.inf)
    if case.relative_bias:
        inputs["relative_bias"] = torch.randn(hq, case.relative_bias, dtype=torch.float64)
    if case.relative_k:
        inputs["relative_q"] = rows(hq, tq, nq, e)
        inputs["relative_k"] = torch.randn(hq, case.relative_k, e, dtype=torch.float64)
    if case.sinks:
        inputs["sinks"] = torch.randn(hq, dtype=torch.float64)
    inputs = {
        name: value.to(device, dtype).requires_grad_() if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    if case.slopes:
        slopes = torch.rand(case.slopes, hq).double() + 2**-30  # no fp32 numbers, so that fp64 shows whether they stay exact
        inputs["slopes"] = slopes.to(device, torch.promote_types(dtype, torch.float32))
    if case.mask is not None:
        inputs["mask"] = torch.rand(pairs(case.mask)) < 0.7
        if case.dead:
            inputs["mask"][0, :, :1] = False
        elif inputs["mask"].numel():
            inputs["mask"][..., 0] = True
        inputs["mask"] = inputs["mask"].to(device)
    if case.blocks is not None:
        inputs["blocks"] = (torch.rand(pairs(case.blocks, (-(-tq // case.block_size), -(-tk // case.block_size)))) < 0.6).to(
            device
        )
    for name, lengths in (("q_lengths", case.q_lengths), ("k_lengths", case.k_lengths)):
        if lengths:
            inputs[name] = torch.tensor(lengths, dtype=torch.int32, device=device)
    for i, name in enumerate(("cu_q", "cu_k")):
        inputs[f"max_{name[-1]}"] = max((pair[i] for pair in case.packed), default=0)
        if case.packed:
            ends = torch.tensor([0, *(pair[i] for pair in case.packed)]).cumsum(0)
            inputs[name] = ends.to(device, torch.int32)
    if case.dropout:
        inputs["seed"] = torch.tensor([0x1234567890ABCDEF - seed, *case.place], device=device)
    return inputs


def spec_of(inputs: dict[str, Any]) -> Spec:
    case = inputs["case"]
    return Spec(
        **{name: inputs[name] for name in Spec._fields if isinstance(inputs.get(name), Tensor)},
        scale=1 / math.sqrt(case.features[0]) if case.scale is None else case.scale,
        softcap=case.softcap,
        dropout=case.dropout,
        left=case.left,
        right=case.right,
        bottom_right=case.bottom_right,
        offset=case.offset,
        relative_bias_zero=case.relative_bias // 2,
        relative_k_zero=max(case.relative_k // 2, case.relative_k - case.lengths[1] + 3),
        block_size=case.block_size,
        max_q=inputs["max_q"],
        max_k=inputs["max_k"],
    )


def resized(case: AttentionCase) -> AttentionCase:
    """Other sizes, the same features; the longest packed sequence stays."""
    return replace(
        case,
        batch=case.batch + 2,
        lengths=(case.lengths[0] + 3, case.lengths[1] + 4),
        k_lengths=case.k_lengths and (*case.k_lengths, 1, 2),
        packed=case.packed and (*case.packed, (3, 2), (1, 1)),
    )


def dense(inputs: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and the weights after dropout (padded only), with all scores in memory, in the dtype of the inputs.

    ``changes`` are of the spec, where it is another than the case's.
    """
    spec, (q, k, v) = spec_of(inputs)._replace(**changes), (inputs[name] for name in "qkv")
    if spec.cu_q is None or spec.cu_k is None:
        return _dense(q, k, v, spec, 0)
    outs, lses = [], []
    (starts_q, starts_k) = (cu.tolist() for cu in (spec.cu_q, spec.cu_k))
    for b in range(len(starts_q) - 1):
        rows, keys = (slice(starts[b], starts[b + 1]) for starts in (starts_q, starts_k))
        own = spec._replace(
            relative_q=None if spec.relative_q is None else spec.relative_q[None, :, rows],
            slopes=None if spec.slopes is None else spec.slopes[b % len(spec.slopes)][None],
        )
        out, lse, _ = _dense(q[None, :, rows], k[None, :, keys], v[None, :, keys], own, b)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs, 1), torch.cat(lses, 1), None


def _dense(q: Tensor, k: Tensor, v: Tensor, spec: Spec, first: int) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    (b, h, tq, _), tk, dtype = q.shape, k.shape[2], q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    place = torch.arange(tq, device=q.device)[:, None].expand(b, 1, tq, 1) + spec.offset
    rows = torch.full((b,), tq) if spec.q_lengths is None else spec.q_lengths
    keys = torch.full((b,), tk) if spec.k_lengths is None else spec.k_lengths
    if spec.bottom_right:
        place = place + (keys - rows).to(q.device)[:, None, None, None]
    j = torch.arange(tk, device=q.device)
    distance = j - place  # [b, 1, tq, tk]

    s = torch.einsum("bhie,bhje->bhij", q, k)
    if spec.relative_q is not None and spec.relative_k is not None:
        table = torch.einsum("bhie,hme->bhim", spec.relative_q, spec.relative_k)
        s = s + _look_up(table, distance + spec.relative_k_zero)
    s = s * spec.scale
    if spec.softcap:
        s = torch.tanh(s / spec.softcap) * spec.softcap
    if spec.bias is not None:
        s = s + spec.bias
    if spec.slopes is not None:
        s = s - (spec.slopes.to(wide)[:, :, None, None] * distance.abs()).to(dtype)
    if spec.relative_bias is not None:
        s = s + _look_up(spec.relative_bias[None, :, None].expand(b, h, tq, -1), distance + spec.relative_bias_zero)

    seen = torch.ones(b, h, tq, tk, dtype=torch.bool, device=q.device)
    seen &= torch.arange(tq)[:, None].to(q.device) < rows.to(q.device)[:, None, None, None]
    seen &= j < keys.to(q.device)[:, None, None, None]
    if spec.mask is not None:
        seen &= spec.mask
    if spec.left >= 0:
        seen &= distance >= -spec.left
    if spec.right >= 0:
        seen &= distance <= spec.right
    if spec.blocks is not None:
        large = spec.blocks.repeat_interleave(spec.block_size, 2).repeat_interleave(spec.block_size, 3)
        seen &= large[:, :, :tq, :tk]
    if spec.bias is not None:
        seen = seen & (spec.bias != -torch.inf)
    s = s.masked_fill(~seen, -torch.inf)
    alive = seen.any(-1, keepdim=True)

    columns = s if spec.sinks is None else torch.cat((s, spec.sinks[None, :, None, None].expand(b, h, tq, 1)), -1)
    alive = alive if spec.sinks is None else torch.ones_like(alive)
    safe = torch.where(alive, columns, 0)
    w = torch.where(alive, torch.softmax(safe, -1), 0)[..., :tk]
    lse = torch.where(alive[..., 0], torch.logsumexp(safe.to(wide), -1), -torch.inf)
    if spec.dropout and spec.seed is not None:
        seed, row, key, first_head, between = (*spec.seed.tolist(), 0, 0, 0, h)[:5]
        which = first_head + torch.arange(first, first + b).view(b, 1, 1, 1) * between + torch.arange(h).view(h, 1, 1)
        random = _random(seed, key + j.cpu(), row + torch.arange(tq)[:, None], which).to(q.device)
        w = torch.where(random >= int(spec.dropout * 2**32), w / (1 - spec.dropout), 0) if spec.dropout < 1 else w * 0
    return torch.einsum("bhij,bhje->bhie", w, v), lse, w


def _random(seed: int, j: Tensor, i: Tensor, which: Tensor) -> Tensor:
    """32 random bits of each weight, in int64: word j % 4 of Philox 4x32-10 (Salmon et al. 2011) of (j // 4, i, which, 0)."""
    words = np.array(np.broadcast_arrays(*(t.numpy() for t in (j // 4, i, which, torch.zeros_like(j)))), dtype=np.uint64)
    low, half = np.uint64(2**32 - 1), np.uint64(32)
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)  # 64 bits each
        a, b = (np.uint64(k) for k in key)
        words = np.stack((second >> half ^ words[1] ^ a, second & low, first >> half ^ words[3] ^ b, first & low))
        key = [(k + weyl) % 2**32 for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return torch.from_numpy(np.choose((j % 4).numpy(), words).astype(np.int64))


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[b, h, i, index[b, 1, i, j]], 0 outside."""
    b, h, rows, length = table.shape
    inside = (index >= 0) & (index < length)
    at = [torch.arange(n, device=table.device).view(-1, *(1,) * left) for n, left in ((b, 3), (h, 2), (rows, 1))]
    return torch.where(inside, table[at[0], at[1], at[2], index.clamp(0, length - 1)], 0)
