"""Which program does what, and how it reads and writes rows of tensors in global memory."""

import triton
import triton.language as tl


@triton.jit
def owner(blocks, heads):
    """Block, head and sequence of this program, of a grid (blocks * heads * B,): the other dimensions of a grid end at 65535.
    Head and sequence are int64, as what they are multiplied with may exceed 2^31 elements."""
    at = tl.program_id(0)
    return at % blocks, (at // blocks % heads).to(tl.int64), (at // blocks // heads).to(tl.int64)


@triton.jit
def load_rows(x, b, h, first, rows, T, cols, E: tl.constexpr, BE: tl.constexpr, WHOLE: tl.constexpr = False):
    """[len(rows), BE] of x: rows from `first` on, zero beyond T and E. WHOLE: no row is beyond T."""
    at = x.pointer + b * x.batch + h * x.head + (first + rows).to(tl.int64)[:, None] * x.time + cols[None, :]
    if WHOLE:
        if E == BE:
            return tl.load(at)
        return tl.load(at, mask=(cols < E)[None, :], other=0.0)
    valid = (rows < T)[:, None]
    if E != BE:
        valid &= (cols < E)[None, :]
    return tl.load(at, mask=valid, other=0.0)


@triton.jit
def store_rows(x, value, b, h, first, rows, T, E: tl.constexpr, BE: tl.constexpr):
    """The opposite of `load_rows`."""
    cols = tl.arange(0, BE)
    at = x.pointer + b * x.batch + h * x.head + (first + rows).to(tl.int64)[:, None] * x.time + cols[None, :]
    valid = (rows < T)[:, None]
    if E != BE:
        valid &= (cols < E)[None, :]
    tl.store(at, value.to(x.pointer.dtype.element_ty), mask=valid)


@triton.jit
def load_scalars(x, b, h, first, rows, T):
    """[len(rows)] of x, zero beyond T."""
    return tl.load(x.pointer + b * x.batch + h * x.head + first + rows, mask=rows < T, other=0.0)


@triton.jit
def store_scalars(x, value, b, h, first, rows, T):
    """The opposite of `load_scalars`."""
    tl.store(x.pointer + b * x.batch + h * x.head + first + rows, value, mask=rows < T)


@triton.jit
def pair_places(x, b, h, i, j):
    """Where x has its entries for rows i [BM] and keys j [BN]: [BM, BN] pointers."""
    return x.pointer + b * x.batch + h * x.head + i.to(tl.int64)[:, None] * x.query + j.to(tl.int64)[None, :] * x.key
