"""What is added to the product of a query and a key, and the cap on it."""

import triton
import triton.language as tl

from fastseq.kernels.attention.memory import pair_places
from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def band(relative_k, h, i0, j0, shift, cols, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, W: tl.constexpr):
    """[W, BE]: the rows of relative_k that a tile of BM queries from i0 and keys from j0 meets. Row r belongs to the distance
    j - p = r + (j0 - i0 - shift) - (BM - 1); zero outside the table. W: a power of two, at least BM + BN - 1."""
    r = tl.arange(0, W) + (j0 - i0 - shift - (BM - 1) + relative_k.zero)
    at = relative_k.pointer + h * relative_k.head + r.to(tl.int64)[:, None] * relative_k.row + cols[None, :]
    valid = ((r >= 0) & (r < relative_k.length))[:, None]
    if E != BE:
        valid &= (cols < E)[None, :]
    return tl.load(at, mask=valid, other=0.0)


@triton.jit
def from_band(x, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr):
    """[BM, BN] from [BM, W]: entry (i, j) is x[i, j - i + BM - 1] (the relative shift of Transformer-XL, inside a tile)."""
    index = tl.arange(0, BN)[None, :] - tl.arange(0, BM)[:, None] + (BM - 1)
    return tl.gather(x, index, axis=1)


@triton.jit
def to_band(x, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr):
    """The transpose of `from_band`: [BM, W] from [BM, BN], zero where no entry goes."""
    index = tl.arange(0, W)[None, :] + tl.arange(0, BM)[:, None] - (BM - 1)
    inside = (index >= 0) & (index < BN)
    return tl.where(inside, tl.gather(x, tl.where(inside, index, 0), axis=1), 0.0)


@triton.jit
def scores(product, parts, b, h, i, j, shift, Tq, Tk):
    """From q k^T [BM, BN] to s, without masks, and to tanh(s / softcap) (or anything, without a softcap).

    With `parts.base2` the product itself stands for s, which is base2 / log2 e times that: the softmax multiplies."""
    t = product
    if parts.base2 is not None:
        return product, t
    s = product * parts.scale
    if parts.softcap is not None:
        t = tanh(s / parts.softcap)
        s = t * parts.softcap
    if parts.bias is not None:
        inside = (i < Tq)[:, None] & (j < Tk)[None, :]
        s += tl.load(pair_places(parts.bias, b, h, i, j), mask=inside, other=0.0).to(s.dtype)
    distance = j[None, :] - i[:, None] - shift
    if parts.slopes is not None:
        slope = tl.load(parts.slopes.pointer + b * parts.slopes.batch + h * parts.slopes.head)
        s -= slope.to(s.dtype) * tl.abs(distance).to(s.dtype)
    if parts.relative_bias is not None:
        x = parts.relative_bias
        index = distance + x.zero
        s += tl.load(x.pointer + h * x.head + index, mask=(index >= 0) & (index < x.length), other=0.0).to(s.dtype)
    return s, t
