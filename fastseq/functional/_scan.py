"""First-order linear recurrences over a sequence: check, lay out, call the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import checked_tensor, own_keywords
from ..ops import scan as ops
from ..ops._dispatch import shared_sequence
from ..ops.types import ScanSpec, state_dtype
from ._attention_call import checked_lengths, integers, readable
from ._autocast import without_autocast
from ._recording import refuse_onnx

__all__ = ["scan"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


@own_keywords
def scan(
    b: Tensor,
    a: Tensor | None = None,
    *,
    log_a: Tensor | None = None,
    initial: Tensor | None = None,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The first-order linear recurrence h_t = a_t h_{t-1} + b_t of every channel: ``(h, final state)``.

    States are kept in fp32 (fp64 for fp64) whatever b's dtype is, and the same call gives the same bits every time.

    Args:
        b: ``[T, B, C]``, ``[B, T, C]`` with ``batch_first``, ``[T, C]`` unbatched, or ``[N, C]`` with ``cu_seqlens``; fp16, bf16,
            fp32, fp64, complex64 or complex128. Of states of two numbers each, which 2 x 2 blocks multiply,
            ``[T, B, C, 2]`` or, with ``cu_seqlens``, ``[N, C, 2]``.
        a: coefficients, broadcast to b; of blocks ``[.., C, 2, 2]``, all but the last two broadcast. fp32 beside a b of
            fp32, bf16 or fp16, fp64 beside fp64, complex or real beside complex. 16 bits are refused: a decay whose time
            constant is 100 steps, rounded to bf16, puts h off by a tenth.
        log_a: in place of a, its logarithm: exponentiated in fp32 (fp64); -inf stands for a coefficient of 0. It may have b's
            dtype, since rounding it costs no more than rounding b.
        initial: h before the first step of every row, ``[B, C]``, packed ``[S, C]``; in b's dtype or that of states. None: zeros.
        resets: bool ``[T, B]`` (``[B, T]`` with ``batch_first``, ``[N]`` with ``cu_seqlens``, ``[T]`` unbatched): where it is set
            a new segment begins, in which the steps before count for nothing, even if they hold NaN. The initial state does not
            pass a reset at the first step. A reverse scan starts anew at the last step before a reset: either way a row is as
            its segments one by one.
        lengths: int32 or int64 ``[B]``, each in 0..T. Beyond a row's length h is zero; the final state is that after the row's
            last step, where a reverse scan starts.
        cu_seqlens: int32 or int64 ``[S + 1]``, rising from 0 to N: sequences end to end, each with its own initial and final
            state.
        reverse: h_t = a_t h_{t+1} + b_t, from the last step to the first.
        batch_first: b, a, resets and h have the batch before the time.

    Returns:
        ``h`` as b, and ``final``: ``[B, C]``, packed ``[S, C]``, unbatched ``[C]``, in the dtype of states, so that a
        sequence may go on from it without a loss.

    Raises:
        RuntimeError: if ranks, sizes, dtypes or devices do not fit, or ``lengths`` or ``cu_seqlens`` hold what they may not.
        ValueError: if not exactly one of a and log_a is given, or options exclude one another.
        TypeError: if an argument is not of the type that is accepted.
        NotImplementedError: for dtypes of b other than those above, and during ONNX export.
    """
    refuse_onnx("a scan", "a loop over the steps has one")
    _check_types(b, a, log_a, initial, lengths, cu_seqlens)
    if (a is None) == (log_a is None):
        raise ValueError(f"give either a or log_a, got {'neither' if a is None else 'both'}")
    if cu_seqlens is not None and (batch_first or lengths is not None):
        other = "batch_first: packed sequences have no batch" if batch_first else "lengths: it says where sequences end itself"
        raise ValueError(f"cu_seqlens excludes {other}")
    packed, dims = cu_seqlens is not None, b.dim()
    accepted = (2, 3) if packed else (2, 3, 4)
    if dims not in accepted:
        raise RuntimeError(
            "b must be [N, C] with cu_seqlens ([N, C, 2] with blocks)" + f", got {list(b.shape)}"
            if packed
            else f"b must be [T, B, C], [B, T, C] with batch_first or [T, C] ([T, B, C, 2] with blocks), got {list(b.shape)}"
        )
    blocks = dims == (3 if packed else 4)
    given = a if a is not None else log_a
    assert given is not None
    coefficients = _coefficients(b, given, "a" if a is not None else "log_a", blocks)
    alone = packed or dims == 2  # no dimension of the batch
    if alone:
        b, coefficients = b.unsqueeze(1), coefficients.unsqueeze(1)
    elif batch_first:
        b, coefficients = b.transpose(0, 1), coefficients.transpose(0, 1)
    if resets is not None:
        resets = checked_resets(resets, b, alone, batch_first)
    if lengths is not None:
        lengths = own_lengths(lengths, b)
    if cu_seqlens is not None:
        cu_seqlens = _cumulated(cu_seqlens, b.shape[0])
    states = (b.shape[1] if cu_seqlens is None else cu_seqlens.shape[0] - 1, *b.shape[2:])
    unbatched = dims == 2 and not packed
    if initial is not None:
        expected = states[1:] if unbatched else states
        if initial.shape != expected:
            raise RuntimeError(f"initial must be {list(expected)}, one state for each sequence, got {list(initial.shape)}")
        initial = (initial.unsqueeze(0) if unbatched else initial).to(state_dtype(b.dtype))
    if b.is_complex():
        b, coefficients = b.resolve_conj(), coefficients.resolve_conj()
        initial = initial if initial is None else initial.resolve_conj()
    spec = ScanSpec(resets, lengths, cu_seqlens, "given" if log_a is None else "log", bool(reverse))
    with without_autocast(b.device.type):
        h, final = scanned(_side_by_side(b), coefficients, None, None, initial, spec)
    if alone:
        h = h.squeeze(1)
    elif batch_first:
        h = h.transpose(0, 1)
    return h, final.squeeze(0) if unbatched else final


def own_lengths(lengths: Tensor, like: Tensor) -> Tensor:
    """int32 [B], for the steps of ``like`` [T, B, ..], which may be a part of the sequence."""
    shared, (steps, batch) = shared_sequence(), like.shape[:2]
    lengths = checked_lengths("lengths", lengths, batch, steps if shared is None else None)
    return lengths if shared is None else shared.lengths(lengths, steps)


def scanned(
    b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, initial: Tensor | None, spec: ScanSpec
) -> tuple[Tensor, Tensor]:
    """h and the final states, of steps that may be a part of the sequence."""
    shared = shared_sequence()
    return (ops.scan if shared is None else shared.scan)(b, a, gate, vector, initial, spec)


def checked_resets(resets: Tensor, like: Tensor, alone: bool, batch_first: bool) -> Tensor:
    """bool ``[T, B]`` as ``like``, time-major, begins. ``alone``: what was given has no dimension of the batch."""
    checked_tensor("resets", resets)
    if resets.dtype != torch.bool:
        raise RuntimeError(f"resets must be bool, got {resets.dtype}")
    if resets.device != like.device:
        raise RuntimeError(f"resets must be on {like.device}, where the sequence is, got {resets.device}")
    steps, batch = like.shape[:2]
    wanted = (steps,) if alone else (batch, steps) if batch_first else (steps, batch)
    if resets.shape != wanted:
        names = "" if alone else "[B, T] = " if batch_first else "[T, B] = "
        raise RuntimeError(f"resets must be {names}{list(wanted)}, got {list(resets.shape)}")
    return resets.unsqueeze(1) if alone else resets.mT if batch_first else resets


def _check_types(b: Tensor, *others: Tensor | None) -> None:
    names = ("a", "log_a", "initial", "lengths", "cu_seqlens")
    checked_tensor("b", b)
    if b.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise NotImplementedError(f"b must be one of {accepted}, got {b.dtype}")
    for name, tensor in zip(names, others, strict=True):
        if tensor is None:
            continue
        checked_tensor(name, tensor)
        if tensor.device != b.device:
            raise RuntimeError(f"{name} must be on b's device {b.device}, got {tensor.device}")
    initial = others[2]
    if initial is not None and initial.dtype not in (b.dtype, state_dtype(b.dtype)):
        wide = state_dtype(b.dtype)
        also = "" if wide == b.dtype else f" or that of states, {wide}"
        raise RuntimeError(f"initial must have b's dtype {b.dtype}{also}, got {initial.dtype}")


def _coefficients(b: Tensor, a: Tensor, name: str, blocks: bool) -> Tensor:
    """a with a size, of 1 where it is broadcast, for each dimension of b (and for the columns of a block)."""
    wide, real = state_dtype(b.dtype), torch.empty((), dtype=state_dtype(b.dtype), device="meta").real.dtype
    log = name == "log_a"
    if log and blocks:
        raise ValueError("log_a has no meaning for 2 x 2 blocks: give a")
    accepted = {wide, real, b.dtype} if log else {wide, real}
    if a.dtype not in accepted:
        names = " or ".join(sorted(str(dtype) for dtype in accepted))
        why = ""
        if not log and a.dtype in (torch.float16, torch.bfloat16):
            why = (
                ": rounded to 16 bits a decay near 1 forgets at another pace; keep a in fp32, or give log_a, which may be rounded"
            )
        raise RuntimeError(f"{name} must be {names} beside a b of {b.dtype}, got {a.dtype}{why}")
    if b.is_complex():
        a = a.to(wide)
    shape = (*b.shape, 2) if blocks else b.shape
    if blocks and a.shape[-2:] != (2, 2):
        raise RuntimeError(f"a must end in [2, 2] beside a b of blocks {list(b.shape)}, got {list(a.shape)}")
    if a.dim() > len(shape) or any(size not in (1, of) for size, of in zip(reversed(a.shape), reversed(shape), strict=False)):
        raise RuntimeError(f"{name} must be broadcast to {list(shape)}, got {list(a.shape)}")
    return a.reshape((1,) * (len(shape) - a.dim()) + a.shape)


def _cumulated(cu: Tensor, total: int) -> Tensor:
    """int32 [S + 1]."""
    result = integers("cu_seqlens", cu, "[S + 1]")
    if cu.shape[0] == 0:
        raise RuntimeError("cu_seqlens must be [S + 1], got [0]")
    if readable(cu) and (cu[0] != 0 or cu[-1] != total or (cu.diff() < 0).any()):
        raise RuntimeError(f"cu_seqlens must rise from 0 to the number of steps, {total}, got {cu.tolist()}")
    return result


def _side_by_side(b: Tensor) -> Tensor:
    """b with the channels of a step contiguous, so that the layout of h is b's."""
    dense = b.stride(-1) == 1 and (b.dim() < 4 or b.stride(-2) == b.shape[-1])
    return b if dense else b.contiguous()
