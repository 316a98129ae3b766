"""The textbook form of every case of attention: every score in memory. In fp64 the truth, in another dtype torch's error to beat.

Letters as in attention.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .attention import AttentionWorkload

BUCKETS, MAX_DISTANCE = 32, 128  # of T5's relative bias
CAP = 5.0  # of capped scores


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, visible: Tensor | None = None, cap: float = 0.0
) -> Tensor:
    """softmax(capped(q k^T scale) + bias) v with every score in memory: [B, H, T, E]."""
    group = q.shape[1] // k.shape[1]
    k, v = (t if group == 1 else t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


def visible(w: AttentionWorkload, device: torch.device | str) -> Tensor | None:
    """[T, S] of bool, True: attend. None: every pair."""
    i, j = torch.arange(w.T, device=device)[:, None], torch.arange(w.S, device=device)
    seen: Tensor | None = None
    if w.function == "band":
        seen = (j - i).abs() <= w.window
    elif w.causal or w.window:
        seen = (j <= i) & (j > i - w.window) if w.window else j <= i
    if w.block:
        blocks = blocks_seen(w).to(device).repeat_interleave(w.block, 0).repeat_interleave(w.block, 1)[: w.T, : w.S]
        seen = blocks if seen is None else seen & blocks
    return seen


def blocks_seen(w: AttentionWorkload) -> Tensor:
    """[T / block, S / block] of bool, rounded up: the four last blocks, and the first one, for all, as in sparse transformers."""
    i, j = (torch.arange(-(-n // w.block)) for n in (w.T, w.S))
    return (i[:, None] >= j) & ((i[:, None] - j < 4) | (j == 0))


def alibi_slopes(w: AttentionWorkload, tensors: dict[str, Tensor]) -> Tensor:
    """[H], 2 to the power of -8 / H, -16 / H .. -8 (Press et al., 2022), as they are in fp32."""
    return torch.exp2(-8 * torch.arange(1, w.heads + 1) / w.heads).float().double()


def alibi_bias(w: AttentionWorkload, slopes: Tensor) -> Tensor:
    """[1, H, T, S]"""
    distance = (torch.arange(w.S, device=slopes.device) - torch.arange(w.T, device=slopes.device)[:, None]).abs()
    return -slopes[None, :, None, None] * distance


def t5_buckets(T: int, S: int, device: torch.device | str, *, bidirectional: bool = True) -> Tensor:
    """[T, S] of int64: T5's bucket of the distance key - query (Raffel et al., 2020): half of them exact, half logarithmic."""
    distance = torch.arange(S, device=device) - torch.arange(T, device=device)[:, None]
    count = BUCKETS
    first: Tensor | int = 0
    if bidirectional:
        count //= 2
        first = (distance > 0).long() * count
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = count // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (ratio * (count - exact)).long()).clamp(max=count - 1)
    return first + torch.where(distance < exact, distance, far)


def shifted(product: Tensor) -> Tensor:
    """[.., T, M] over the rows of R, farthest first, to [.., T, S] over keys (T = S = M), by Transformer-XL's pad and view.

    What it puts above the diagonal is of another row, and hidden by the causal mask.
    """
    *leading, T, M = product.shape
    return F.pad(product, (1, 0)).view(*leading, M + 1, T)[..., 1:, :].view(*leading, T, M)


def positions(w: AttentionWorkload, q: Tensor, u: Tensor, p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Transformer-XL's content queries q + u and its term over distances, [B, H, T, S], scaled."""
    return q + u[:, None], shifted((q + p[:, None]) @ r.mT) * w.E**-0.5


def valid_keys(w: AttentionWorkload, lengths: Tensor) -> Tensor:
    """[B, T] of bool, True: a real key. `lengths` are normal deviates; rows end between T / 2 and T."""
    ends = (w.T * (0.75 + 0.25 * torch.tanh(lengths.double()))).long().clamp(min=1)
    return torch.arange(w.T, device=lengths.device) < ends[:, None]


def dense(w: AttentionWorkload, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_attention(q, k, v, w.E**-0.5, None, visible(w, q.device))


def biased(w: AttentionWorkload, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return softmax_attention(q, k, v, w.E**-0.5, bias, visible(w, q.device))


def t5(w: AttentionWorkload, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    bias = F.embedding(t5_buckets(w.T, w.S, q.device), table).permute(2, 0, 1)[None]
    return softmax_attention(q, k, v, w.E**-0.5, bias, visible(w, q.device))


def alibi(w: AttentionWorkload, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return softmax_attention(q, k, v, w.E**-0.5, alibi_bias(w, slopes), visible(w, q.device))


def softcap(w: AttentionWorkload, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_attention(q, k, v, w.E**-0.5, None, visible(w, q.device), CAP)


def transformer_xl(w: AttentionWorkload, q: Tensor, k: Tensor, v: Tensor, u: Tensor, p: Tensor, r: Tensor) -> Tensor:
    content, bias = positions(w, q, u, p, r)
    return softmax_attention(content, k, v, w.E**-0.5, bias, visible(w, q.device))


def multihead(w: AttentionWorkload, x: Tensor, lengths: Tensor, **parameters: Tensor) -> tuple[Tensor, Tensor | None]:
    T = x.shape[1]
    heads = F.linear(x, parameters["in_proj_weight"], parameters["in_proj_bias"])
    q, k, v = heads.view(*x.shape[:2], 3, w.heads, w.E).permute(2, 0, 3, 1, 4).unbind(0)
    scores = q @ k.mT * w.E**-0.5
    if w.function == "padding":
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        scores = scores.masked_fill(~(causal & valid_keys(w, lengths)[:, None, None]), -math.inf)
    weights = scores.softmax(-1)
    out = F.linear((weights @ v).transpose(1, 2).flatten(2), parameters["out_proj.weight"], parameters["out_proj.bias"])
    return out, weights.mean(1) if w.function == "weights" else None
