"""Online softmax, and dropout of its weights.

m_i is the running maximum of a row's scores, l_i the running sum of their exponentials ("FlashAttention", arXiv 2205.14135;
"Online normalizer calculation for softmax", arXiv 1805.02867).

Scores are as `bias.scores` has them. exp2 is the exponential that devices have: where nothing but a positive scale shapes the
product (`parts.base2`), one multiply-add per score leads to it; else differences of scores are formed first, as a score of
finfo.min (a mask, in some models) has no log2 e times itself.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """In fp64, which has no instruction for either, exp2 of x log2 e would round once more than exp itself."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def start(parts, h, BM: tl.constexpr, acc: tl.constexpr):
    """m_i and l_i of a row before its first key: of the sink, if there is one."""
    m_i = tl.full((BM,), float("-inf"), acc)
    l_i = tl.zeros((BM,), acc)
    if parts.sinks is not None:
        sink = tl.load(parts.sinks + h).to(acc)
        m_i = tl.zeros((BM,), acc) + sink
        l_i = tl.where(m_i == float("-inf"), 0.0, l_i + 1)
    return m_i, l_i


@triton.jit
def update(s, m_i, l_i, parts):
    """exp(s - m_i) [BM, BN] for the new m_i, which is next, then l_i, and the factor for what was summed before."""
    new = tl.maximum(m_i, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row without keys so far
    if parts.base2 is not None:
        w = tl.exp2(s * parts.base2 - (base * parts.base2)[:, None])
        factor = tl.exp2((m_i - base) * parts.base2)
    else:
        w = exp(s - base[:, None])
        factor = exp(m_i - base)
    return w, new, l_i * factor + tl.sum(w, 1), factor


@triton.jit
def finish(m_i, l_i, parts):
    """What a row's sum of weighted values is multiplied by, and its lse: 0 and -inf for a row without keys."""
    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    if parts.base2 is not None:
        lse = (m_i * parts.base2 + tl.log2(l_i)) / LOG2E
    else:
        lse = m_i + tl.log2(l_i) / LOG2E
    return tl.where(empty, 0.0, 1 / l_i), tl.where(empty, float("-inf"), lse)


@triton.jit
def weights(s, lse, parts):
    """exp(s - lse) [BM, BN] for a row's final lse [BM]; zero for a row without keys."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if parts.base2 is not None:
        return tl.exp2(s * parts.base2 - (lse * LOG2E)[:, None])
    return exp(s - lse[:, None])


@triton.jit
def survives(random, dropout):
    """Whether a weight with this random number, 32 bits, is kept."""
    return random.to(tl.uint32, bitcast=True) >= tl.cast(dropout.threshold, tl.uint32)


@triton.jit
def _quads(dropout, which, i, quad, BM: tl.constexpr, BN: tl.constexpr):
    """Of rows i [BM] and keys from 4 quad on, in fours: four times [BM, BN // 4] random numbers."""
    zero = tl.zeros((BM, BN // 4), tl.uint32)
    c0 = zero + (quad + tl.arange(0, BN // 4))[None, :].to(tl.uint32)
    c1 = zero + i[:, None].to(tl.uint32)
    return tl.philox(tl.load(dropout.seed), c0, c1, zero + which.to(tl.uint32), zero)


@triton.jit
def _of_fours(of, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN], from the first, second, third and fourth of every four keys."""
    return tl.reshape(tl.join(tl.join(of[0], of[2]), tl.join(of[1], of[3])), (BM, BN))


@triton.jit
def _surviving(of, dropout):
    return survives(of[0], dropout), survives(of[1], dropout), survives(of[2], dropout), survives(of[3], dropout)


@triton.jit
def _kept_anywhere(dropout, which, i, first, BM: tl.constexpr, BN: tl.constexpr):
    """`kept` of keys from `first` on, which need not be a multiple of 4: then every four are of two fours of random numbers."""
    quad, shift = (first >> 2).to(tl.int32), first & 3
    a, b, c, d = _surviving(_quads(dropout, which, i, quad, BM, BN), dropout)
    if shift != 0:
        e, f, g, _ = _surviving(_quads(dropout, which, i, quad + 1, BM, BN), dropout)
        one, two = shift % 2 == 1, shift >= 2
        a, b, c, d, e, f = (
            tl.where(one, b, a),
            tl.where(one, c, b),
            tl.where(one, d, c),
            tl.where(one, e, d),
            tl.where(one, f, e),
            tl.where(one, g, f),
        )
        a, b, c, d = tl.where(two, c, a), tl.where(two, d, b), tl.where(two, e, c), tl.where(two, f, d)
    return _of_fours((a, b, c, d), BM, BN)


@triton.jit
def kept(dropout, parts, b, h, Hq, i, j0, BM: tl.constexpr, BN: tl.constexpr, QUADS: tl.constexpr = True):
    """[BM, BN]: which weights of rows i [BM] and keys from j0 on survive. QUADS: j0 is a multiple of 4. A part of a larger
    attention may begin anywhere in it."""
    if parts.part is not None:
        row, key = tl.load(dropout.seed + 1).to(tl.int32), tl.load(dropout.seed + 2)
        which = tl.load(dropout.seed + 3) + b * tl.load(dropout.seed + 4) + h
        keep = _kept_anywhere(dropout, which, row + i, key + j0, BM, BN)
    elif QUADS:
        keep = survives(_of_fours(_quads(dropout, b * Hq + h, i, j0 // 4, BM, BN), BM, BN), dropout)
    else:
        keep = _kept_anywhere(dropout, b * Hq + h, i, j0, BM, BN)
    return keep


@triton.jit
def dropped(w, dropout, parts, b, h, Hq, i, j0, BM: tl.constexpr, BN: tl.constexpr):
    """The weights [BM, BN] after dropout, if there is one."""
    if dropout is not None:  # not an early return: Triton compiles what follows one
        w = tl.where(kept(dropout, parts, b, h, Hq, i, j0, BM, BN), w * dropout.scale, 0.0)
    return w
