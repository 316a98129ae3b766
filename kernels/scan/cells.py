"""The cells of a scan: what is coefficient and addend of a step, and back. CELL is the place of a name in ``SCAN_CELLS`` of
``fastseq/ops/types.py``: 0 given, 1 log, 2 min_gru, 3 min_lstm, 4 hgrn, 5 rg_lru, 6 qrnn, 7 qrnn_ifo.

a and b are tuples of tiles, as are the coefficient and the addend; of a layer's cells (2 and on) of one. ``gate`` and ``vector``
are tiles, zero for cells that have none; ``alone``: there is no state before the step. The equations: ``fastseq.reference.scan``.
"""

import triton
import triton.language as tl

from fastseq.kernels.recurrent.activations import tanh


@triton.jit
def positive(x):
    """g of minGRU, and its slope."""
    s = tl.sigmoid(x)
    return tl.where(x >= 0, x + 0.5, s), tl.where(x >= 0, 1.0, s * tl.sigmoid(-x))


@triton.jit
def shares(forget, input):
    """Of two gates' logits 1 + e^-input and 1 + e^-forget, and the exponentials alone, all over the largest term: the gates'
    shares in their sum are p / (p + q) and q / (p + q), whatever underflows."""
    largest = tl.maximum(tl.maximum(-input, -forget), 0.0)
    one, of_input, of_forget = tl.exp(-largest), tl.exp(-input - largest), tl.exp(-forget - largest)
    return one + of_input, one + of_forget, of_input, of_forget


@triton.jit
def decay(a, vector, alone):
    """Of the RG-LRU: log a, a, and sqrt(1 - a^2), which is 1 where a state is the first; as a series where it would cancel."""
    log = -vector * tl.sigmoid(a)
    y = 2 * log
    series = 1 + y / 12
    for i in tl.static_range(10):
        series = 1 + y / (11 - i) * series
    rest = tl.where(y > -0.25, -y * series, 1 - tl.exp(y))
    return log, tl.exp(log), tl.where(alone, 1.0, tl.sqrt(tl.maximum(rest, 1e-30)))


@triton.jit
def transition(a, b, gate, vector, alone, CELL: tl.constexpr):
    """Coefficient and addend."""
    if CELL == 0:
        return a, b
    elif CELL == 1:
        return (tl.exp(a[0]),), b
    elif CELL == 2:
        z = tl.sigmoid(a[0])
        candidate, _ = positive(b[0])
        return (1 - z,), (z * candidate,)
    elif CELL == 3:
        p, q, _, _ = shares(a[0], gate)
        candidate, _ = positive(b[0])
        return (p / (p + q),), (q / (p + q) * candidate,)
    elif CELL == 4:
        return (vector + (1 - vector) * tl.sigmoid(a[0]),), ((1 - vector) * tl.sigmoid(-a[0]) * b[0] * tl.sigmoid(b[0]),)
    elif CELL == 5:
        _, coefficient, root = decay(a[0], vector, alone)
        return (coefficient,), (root * tl.sigmoid(gate) * b[0],)
    elif CELL == 6:
        return (tl.sigmoid(a[0]),), (tl.sigmoid(-a[0]) * tanh(b[0]),)
    else:
        return (tl.sigmoid(a[0]),), (tl.sigmoid(gate) * tanh(b[0]),)


@triton.jit
def transition_backward(of_coefficient, of_addend, a, b, gate, vector, alone, factor, CELL: tl.constexpr):
    """Gradients of a, b, gate and vector; ``factor`` is the coefficient."""
    of_gate, of_vector = tl.zeros_like(gate), tl.zeros_like(vector)
    if CELL == 0:
        return of_coefficient, of_addend, of_gate, of_vector
    elif CELL == 1:
        return (of_coefficient[0] * factor[0],), of_addend, of_gate, of_vector
    else:
        x, g = of_coefficient[0], of_addend[0]
        s, rest = tl.sigmoid(a[0]), tl.sigmoid(-a[0])
        if CELL == 2:
            candidate, slope = positive(b[0])
            of_a, of_b = (g * candidate - x) * s * rest, g * s * slope
        elif CELL == 3:
            p, q, of_input, of_forget = shares(a[0], gate)
            candidate, slope = positive(b[0])
            of_share = (x - g * candidate) / ((p + q) * (p + q))
            of_a, of_b = of_share * p * of_forget, g * (q / (p + q)) * slope
            of_gate = -of_share * q * of_input
        elif CELL == 4:
            i = tl.sigmoid(b[0])
            of_f = x - g * b[0] * i
            of_a, of_b = of_f * (1 - vector) * s * rest, g * (1 - vector) * rest * i * (1 + b[0] * (1 - i))
            of_vector = of_f * rest
        elif CELL == 5:
            log, coefficient, root = decay(a[0], vector, alone)
            i = tl.sigmoid(gate)
            of_log = (x - tl.where(alone, 0.0, g * i * b[0] * coefficient / root)) * coefficient
            of_a, of_b = of_log * log * rest, g * root * i
            of_gate, of_vector = g * root * b[0] * i * tl.sigmoid(-gate), -of_log * s
        elif CELL == 6:
            z = tanh(b[0])
            of_a, of_b = (x - g * z) * s * rest, g * rest * (1 - z * z)
        else:
            z, i = tanh(b[0]), tl.sigmoid(gate)
            of_a, of_b = x * s * rest, g * i * (1 - z * z)
            of_gate = g * z * i * tl.sigmoid(-gate)
        return (of_a,), (of_b,), of_gate, of_vector
