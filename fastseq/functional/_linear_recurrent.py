"""Layers of linear recurrence: gates that read the input alone, so that nothing but a scan goes from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import checked_tensor, own_keywords
from ..ops import scan as ops
from ..ops.types import ScanSpec, state_dtype
from ._attention_call import checked_lengths
from ._autocast import without_autocast
from ._recording import refuse_onnx
from ._scan import checked_resets

__all__ = ["min_gru", "min_gru_cell"]


@own_keywords
def min_gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """minGRU over a sequence, ``(output, h_n)``: h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t + b_h), z_t = sigmoid(W_z x_t + b_z),
    where g(v) = v + 1/2 from 0 on and sigmoid(v) below (Feng et al. 2024, "Were RNNs all we needed?").

    T time, B batch, I input, H hidden, L layers, D directions.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or unbatched ``[T, I]``; floating point.
        hx: ``[L*D, B, H]``, unbatched ``[L*D, H]``; in the input's dtype or that of states. None: zeros.
        params: per layer, per direction: weight ``[2H, I or D*H]``, rows of W_z, then of W_h; with ``has_biases`` bias ``[2H]``.
        dropout: probability with which, in training, elements of every layer's output but the last's are zeroed.
        lengths: int32 or int64 ``[B]``, each in 0..T. Beyond a row's length the output is zero; final states are those after a
            row's last step, where its backward direction starts.
        resets: bool ``[T, B]``, ``[B, T]`` with ``batch_first``, unbatched ``[T]``: where a new segment begins. Every layer and
            direction is as if the segments of a row were run one by one, hx before the first (backwards: the last) of them.

    Returns:
        ``output`` ``[T, B, D*H]`` as the input, and ``h_n`` as hx, in the dtype of states: fp32 (fp64 for fp64).

    Raises:
        RuntimeError: if ranks, sizes, dtypes, devices, ``lengths`` or ``resets`` do not fit.
        NotImplementedError: during ONNX export.
    """
    refuse_onnx("minGRU", "a loop over its cell has one")
    checked_tensor("input", input)
    if input.dim() not in (2, 3):
        raise RuntimeError(f"min_gru: Expected input to be 2D or 3D, got {input.dim()}D instead")
    alone, directions = input.dim() == 2, 2 if bidirectional else 1
    each = 2 if has_biases else 1
    if len(params) != each * num_layers * directions:
        raise RuntimeError(f"min_gru expects {each * num_layers * directions} parameters, {each} of each lane, got {len(params)}")
    if input.shape[-1] != params[0].shape[1]:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {params[0].shape[1]}, got {input.shape[-1]}")
    x = input.unsqueeze(1) if alone else input.transpose(0, 1) if batch_first else input
    hidden = params[0].shape[0] // 2
    if resets is not None:
        resets = checked_resets(resets, x, alone, batch_first)
    if lengths is not None:
        checked_tensor("lengths", lengths)
        if alone:
            raise RuntimeError("lengths are of the rows of a batch, but the input is unbatched")
        lengths = checked_lengths("lengths", lengths, x.shape[1], x.shape[0])
    lanes = num_layers * directions
    hx = _checked_state(hx, input, (lanes, hidden) if alone else (lanes, x.shape[1], hidden))
    states = [None] * lanes if hx is None else (hx.unsqueeze(1) if alone else hx).unbind(0)
    finals: list[Tensor] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            lane = layer * directions + direction
            weight = params[each * lane]
            spec = ScanSpec(resets, lengths, None, "min_gru", direction == 1)
            h, final = _scanned(x, weight, params[each * lane + 1] if has_biases else None, states[lane], spec)
            outputs.append(h)
            finals.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, training)
    h_n = torch.stack(finals)
    output = x.squeeze(1) if alone else x.transpose(0, 1) if batch_first else x
    return output, h_n.squeeze(1) if alone else h_n


@own_keywords
def min_gru_cell(input: Tensor, hx: Tensor | None, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One step of ``min_gru``: h ``[B, H]`` from h, in the dtype of states, so that steps in turn are the sequence.

    Args:
        input: ``[B, I]``, or unbatched ``[I]``.
        hx: ``[B, H]``, unbatched ``[H]``; in the input's dtype or that of states. None: zeros.
        weight, bias: as of ``min_gru``.

    Raises:
        RuntimeError: if ranks, sizes or dtypes do not fit.
    """
    checked_tensor("input", input)
    if input.dim() not in (1, 2):
        raise RuntimeError(f"min_gru_cell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]}, expected {weight.shape[1]}")
    hx = _checked_state(hx, input, (*input.shape[:-1], weight.shape[0] // 2))
    alone = input.dim() == 1
    rows, state = (input[None, None], None if hx is None else hx[None]) if alone else (input[None], hx)
    _, final = _scanned(rows, weight, bias, state, ScanSpec(None, None, None, "min_gru", False))
    return final.squeeze(0) if alone else final


def _scanned(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    """A lane. Rows of the weight are halved, not the projected input, whose gradient would have to be put together again."""
    weights = weight.chunk(2)
    biases = (None, None) if bias is None else bias.chunk(2)
    logits, candidate = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    with without_autocast(x.device.type):
        return ops.scan(candidate, logits, state, spec)


def _checked_state(hx: Tensor | None, input: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """In the dtype of states."""
    if hx is None:
        return None
    checked_tensor("hx", hx)
    if hx.shape != shape:
        raise RuntimeError(f"Expected hidden size {shape}, got {list(hx.shape)}")
    wide = state_dtype(input.dtype)
    if hx.dtype not in (input.dtype, wide) or hx.device != input.device:
        raise RuntimeError(f"hx must be {input.dtype} or {wide} on {input.device}, as the input, got {hx.dtype} on {hx.device}")
    return hx.to(wide)
