"""Launches ``kernels/attention/backward.py`` and ``bias_gradient.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops.types import GRADIENTS, Spec, empty_gradients
from . import _launch
from .attention_args import accumulator, number, pairs, parts_of, power, precision, rows, scalars, sizes

_SHARED = 512  # programs that a sum is divided among, at most


class _Call(NamedTuple):
    """What all passes of one backward have in common."""

    q: Tensor
    k: Tensor
    spec: Spec
    batch: int
    lengths: tuple[int, int]  # of the longest sequence
    heads: int
    group: int
    wide: torch.dtype
    arguments: tuple[Any, ...]  # incoming, parts, dropout, seq
    constants: dict[str, Any]

    def config(self, kernel: str) -> Any:
        from fastseq.kernels.attention import configs

        width = max(self.constants["BE"], self.constants["BEV"])
        return configs.of(self.q.device, kernel, self.q.dtype, width, relative=self.spec.relative_q is not None)


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec, wanted: list[bool]
) -> tuple[Tensor, ...]:
    from fastseq.kernels.attention import backward as kernels
    from fastseq.kernels.attention.args import Incoming

    grads = empty_gradients(q, k, v, spec, wanted)
    if _nothing(q, k, spec):
        return tuple(grad.zero_() for grad in grads)
    delta = lse.new_empty(lse.shape)
    incoming = Incoming(scalars(lse), scalars(delta), dout=rows(dout), v=rows(v))
    call = _call(q, k, v.shape[-1], spec, incoming)
    with _launch.on(q.device):
        block = max(16, (1 << 14) // (call.constants["BEV"] * out.element_size()))
        blocks = -(-call.lengths[0] // block)
        kernels.delta_of_out[(blocks * call.heads * call.batch,)](
            rows(out), None if dlse is None else scalars(dlse), incoming, call.arguments[3], *call.lengths, call.heads, blocks,
            EV=call.constants["EV"], BEV=call.constants["BEV"], BM=block,
        )  # fmt: skip
        _passes(call, grads)
    return grads


def attention_weights_backward(
    dw: Tensor, q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool, wanted: list[bool]
) -> tuple[Tensor, ...]:
    from fastseq.kernels.attention import backward as kernels
    from fastseq.kernels.attention.args import Incoming

    wanted = [want and name != "v" for want, name in zip(wanted, GRADIENTS, strict=True)]
    grads = empty_gradients(q, k, q, spec, wanted)
    delta = lse.new_empty(lse.shape)
    if _nothing(q, k, spec):
        return *(grad.zero_() for grad in grads), delta.zero_()
    of_heads = pairs(dw[:, None].expand(*q.shape[:3], k.shape[2]) if average else dw)
    incoming = Incoming(scalars(lse), scalars(delta), dw=of_heads, scale=number(1 / q.shape[1] if average else 1.0, q.dtype))
    call = _call(q, k, 1, spec, incoming)
    with _launch.on(q.device):
        config = call.config("bwd_dq")
        blocks = -(-call.lengths[0] // config.BM)
        kernels.delta_of_weights[(blocks * call.heads * call.batch,)](
            rows(q),
            rows(k),
            *call.arguments,
            *call.lengths,
            call.heads,
            call.group,
            blocks,
            **call.constants,
            **config.arguments(),
        )
        _passes(call, grads)
    return *grads, delta


def _nothing(q: Tensor, k: Tensor, spec: Spec) -> bool:
    return 0 in (*q.shape[:-1], *k.shape[:-1], *sizes(q, k, spec))


def _call(q: Tensor, k: Tensor, features_v: int, spec: Spec, incoming: Any) -> _Call:
    batch, *lengths = sizes(q, k, spec)
    constants = {
        "E": q.shape[-1],
        "EV": features_v,
        "BE": power(q.shape[-1]),
        "BEV": power(features_v),
        "ACC": accumulator(q.dtype),
        "PRECISION": precision(q.dtype),
    }
    heads = q.shape[-3]
    return _Call(
        q,
        k,
        spec,
        batch,
        (lengths[0], lengths[1]),
        heads,
        heads // k.shape[-3],
        incoming.lse.pointer.dtype,
        (incoming, *parts_of(q, k, spec)),
        constants,
    )


def _passes(call: _Call, grads: tuple[Tensor, ...]) -> None:
    """Everything after delta. ``grads`` are written in place; those not wanted are empty."""
    from fastseq.kernels.attention import backward as kernels

    dq, dk, dv, dbias, drelative_bias, drelative_q, drelative_k = (grad if grad.dim() > 1 else None for grad in grads)
    if dq is not None or drelative_q is not None:
        config = call.config("bwd_dq")
        _own_rows(call, kernels.bwd_dq, config, (dq, drelative_q), call.heads, -(-call.lengths[0] // config.BM))
    if dk is not None or dv is not None:
        config = call.config("bwd_dkdv")
        _own_rows(call, kernels.bwd_dkdv, config, (dk, dv), call.heads // call.group, -(-call.lengths[1] // config.BN))
    if dbias is not None:
        _bwd_dbias(call, dbias)
    if drelative_bias is not None or drelative_k is not None:
        _bwd_drelbias(call, drelative_bias, drelative_k)


def _own_rows(call: _Call, kernel: Any, config: Any, results: tuple[Tensor | None, ...], heads: int, blocks: int) -> None:
    kernel[(blocks * heads * call.batch,)](
        rows(call.q), rows(call.k), *(None if result is None else rows(result) for result in results),
        *call.arguments, *call.lengths, call.heads, call.group, blocks, **call.constants, **config.arguments(),
    )  # fmt: skip


def _shares(programs: int, steps: int) -> int:
    """Among how many programs to divide the tiles that one would sum, so that all of them fill a device. Whatever the number of
    its multiprocessors: another order of the sums would be other bits."""
    return max(1, min(steps, _SHARED // programs))


def _bwd_dbias(call: _Call, dbias: Tensor) -> None:
    from fastseq.kernels.attention import bias_gradient as kernels

    config = call.config("bwd_dbias")
    programs, steps = 1, 1
    sums = []
    for own, extent, block in zip(
        dbias.shape, (call.batch, call.heads, *call.lengths), (1, 1, config.BM, config.BN), strict=True
    ):
        programs *= -(-own // block)
        sums.append(-(-extent // block) if own == 1 else 1)
        steps *= sums[-1]
    per_share = -(-steps // _shares(programs, steps))
    shares = -(-steps // per_share)
    room = dbias if shares == 1 else dbias.new_empty(shares, *dbias.shape, dtype=call.wide)
    kernels.bwd_dbias[(programs * shares,)](
        rows(call.q), rows(call.k), room, *call.arguments, *call.lengths, call.heads, call.group, *dbias.shape, *sums[1:],
        steps, per_share, OWN_ROWS=dbias.shape[2] > 1, OWN_COLUMNS=dbias.shape[3] > 1, **call.constants, **config.arguments(),
    )  # fmt: skip
    if shares > 1:
        dbias.copy_(room.sum(0))


def _distances(call: _Call, tables: list[tuple[int, int]]) -> tuple[int, int]:
    """The least and the greatest distance j - p that may occur and has an entry in one of the tables, (length, zero) each."""
    spec, (tq, tk) = call.spec, call.lengths
    before, behind = (tk, tq) if spec.bottom_right else (tq, tk)
    least, greatest = 1 - before - spec.offset, behind - 1 - spec.offset
    if spec.left >= 0:
        least = max(least, -spec.left)
    if spec.right >= 0:
        greatest = min(greatest, spec.right)
    return max(least, min(-zero for _, zero in tables)), min(greatest, max(length - 1 - zero for length, zero in tables))


def _aligned(call: _Call) -> bool:
    """Whether the place of the first query is a multiple of 4 in every sequence."""
    spec = call.spec
    varies = spec.cu_q is not None or spec.q_lengths is not None or spec.k_lengths is not None
    if not spec.bottom_right:
        return spec.offset % 4 == 0
    return not varies and (spec.offset + call.lengths[1] - call.lengths[0]) % 4 == 0


def _bwd_drelbias(call: _Call, dbias: Tensor | None, drows: Tensor | None) -> None:
    from fastseq.kernels.attention import bias_gradient as kernels

    config = call.config("bwd_drelbias")
    block = config.BM
    zeros = call.spec.relative_bias_zero, call.spec.relative_k_zero
    wanted = [(grad, zero) for grad, zero in zip((dbias, drows), zeros, strict=True) if grad is not None]
    least, greatest = _distances(call, [(grad.shape[1], zero) for grad, zero in wanted])
    first = least // block
    diagonals = (greatest + block - 1) // block - first + 1
    if least > greatest:
        for grad, _ in wanted:
            grad.zero_()
        return
    shares = _shares(diagonals * call.heads, call.batch * -(-call.lengths[0] // block))
    rooms = [
        None if grad is None else grad.new_empty(shares, call.heads, diagonals, 2 * block, *grad.shape[2:], dtype=call.wide)
        for grad in (dbias, drows)
    ]
    options = {name: value for name, value in config.arguments().items() if name != "BN"}
    kernels.bwd_drelbias[(diagonals * call.heads * shares,)](
        rows(call.q), rows(call.k), *rooms, *call.arguments, call.batch, *call.lengths, call.heads, call.group,
        shares, diagonals, first, QUADS=_aligned(call), **call.constants, **options,
    )  # fmt: skip
    begin = first * block - (block - 1)
    for result, zero, room in zip((dbias, drows), zeros, rooms, strict=True):
        if result is not None and room is not None:
            _add_diagonals(result, zero + begin, room.sum(0))


def _add_diagonals(grad: Tensor, begin: int, sums: Tensor) -> None:
    """``grad`` [Hq, L, ..] from the sums along the diagonals of tiles [Hq, n, 2 W, ..], of the entries from begin + n W on."""
    block = sums.shape[2] // 2
    line = sums.new_zeros(sums.shape[0], sums.shape[1] + 1, block, *sums.shape[3:])
    line[:, :-1] = sums[:, :, :block]
    line[:, 1:] += sums[:, :, block:]
    line = line.flatten(1, 2)
    first, last = max(begin, 0), min(begin + line.shape[1], grad.shape[1])
    grad.zero_()
    if first < last:
        grad[:, first:last] = line[:, first - begin : last - begin]
