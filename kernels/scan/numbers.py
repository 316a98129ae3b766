"""The arithmetic of a channel, by kind: 0 real, 1 complex, 2 blocks of 2 x 2. States are tuples of N = 1, 2, 2 tiles,
coefficients of M = 1, 2, 4 (of a block row by row).
"""

import triton
import triton.language as tl


@triton.jit
def load_numbers(pointer, at, mask, N: tl.constexpr, ACC: tl.constexpr):
    """N tiles; those of a channel lie side by side."""
    tiles = ()
    for i in tl.static_range(N):
        tiles = tiles + (tl.load(pointer + at * N + i, mask=mask, other=0.0).to(ACC),)
    return tiles


@triton.jit
def store_numbers(pointer, at, tiles, mask, N: tl.constexpr):
    for i in tl.static_range(N):
        tl.store(pointer + at * N + i, tiles[i].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_apart(pointer, at, C, mask, N: tl.constexpr):
    """N tiles, C apart."""
    tiles = ()
    for i in tl.static_range(N):
        tiles = tiles + (tl.load(pointer + at + i * C, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_apart(pointer, at, C, tiles, mask, N: tl.constexpr):
    for i in tl.static_range(N):
        tl.store(pointer + at + i * C, tiles[i], mask=mask)


@triton.jit
def zeros(N: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(N):
        tiles = tiles + (tl.zeros((BC,), ACC),)
    return tiles


@triton.jit
def identity(KIND: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    one, zero = tl.full((BC,), 1.0, ACC), tl.zeros((BC,), ACC)
    if KIND == 0:
        return (one,)
    elif KIND == 1:
        return (one, zero)
    else:
        return (one, zero, zero, one)


@triton.jit
def choose(condition, then, otherwise, N: tl.constexpr):
    """Not by products: what is not chosen may be infinite or NaN."""
    tiles = ()
    for i in tl.static_range(N):
        tiles = tiles + (tl.where(condition, then[i], otherwise[i]),)
    return tiles


@triton.jit
def add(x, y, N: tl.constexpr):
    tiles = ()
    for i in tl.static_range(N):
        tiles = tiles + (x[i] + y[i],)
    return tiles


@triton.jit
def apply(a, h, KIND: tl.constexpr):
    """a h."""
    if KIND == 0:
        return (a[0] * h[0],)
    elif KIND == 1:
        return (a[0] * h[0] - a[1] * h[1], a[0] * h[1] + a[1] * h[0])
    else:
        return (a[0] * h[0] + a[1] * h[1], a[2] * h[0] + a[3] * h[1])


@triton.jit
def adjoint(a, KIND: tl.constexpr):
    """The conjugate, or the transpose."""
    if KIND == 0:
        return a
    elif KIND == 1:
        return (a[0], -a[1])
    else:
        return (a[0], a[2], a[1], a[3])


@triton.jit
def compose(a, b, KIND: tl.constexpr):
    """a after b."""
    if KIND < 2:
        return apply(a, b, KIND)
    else:
        return (
            a[0] * b[0] + a[1] * b[2],
            a[0] * b[1] + a[1] * b[3],
            a[2] * b[0] + a[3] * b[2],
            a[2] * b[1] + a[3] * b[3],
        )


@triton.jit
def outer(g, h, KIND: tl.constexpr):
    """The gradient of a in a h, from that of the product."""
    if KIND == 0:
        return (g[0] * h[0],)
    elif KIND == 1:
        return (g[0] * h[0] + g[1] * h[1], g[1] * h[0] - g[0] * h[1])
    else:
        return (g[0] * h[0], g[0] * h[1], g[1] * h[0], g[1] * h[1])
