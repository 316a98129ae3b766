"""Layer normalization of tiles over the units of a row, without scale and shift, and its backward."""

import triton
import triton.language as tl


@triton.jit
def row_mean(tiles, real, H, N: tl.constexpr):
    """[BB, 1]: over N tiles together; ``real``: the units that exist, the others are anything."""
    total = tl.sum(tl.where(real, tiles[0], 0.0), 1)
    for k in tl.static_range(1, N):
        total += tl.sum(tl.where(real, tiles[k], 0.0), 1)
    return (total / (N * H))[:, None]


@triton.jit
def normalize(tiles, real, H, N: tl.constexpr):
    """Tiles with mean 0 and variance 1 over all of them together, and what they were multiplied by [BB, 1]."""
    mean = row_mean(tiles, real, H, N)
    centered, squares = (), ()
    for k in tl.static_range(N):
        centered = centered + (tl.where(real, tiles[k] - mean, 0.0),)
        squares = squares + (centered[k] * centered[k],)
    scale = 1 / tl.sqrt(row_mean(squares, real, H, N) + 1e-5)
    normal = ()
    for k in tl.static_range(N):
        normal = normal + (centered[k] * scale,)
    return normal, scale


@triton.jit
def normalize_backward(grads, normal, scale, real, H, N: tl.constexpr):
    """Gradients of the tiles from those of their normalized values."""
    products = ()
    for k in tl.static_range(N):
        products = products + (grads[k] * normal[k],)
    mean, along = row_mean(grads, real, H, N), row_mean(products, real, H, N)
    tiles = ()
    for k in tl.static_range(N):
        tiles = tiles + (scale * (grads[k] - mean - normal[k] * along),)
    return tiles
