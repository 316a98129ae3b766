"""First-order linear recurrences, and back: one kernel each, with channels on the lanes and a plain loop over time.

Where rows and channels are too few to fill a device, time is cut into chunks and a kernel runs twice: with TOTALS every chunk
writes what it makes of the state that it is given (a product, a sum, and whether a reset lets nothing through), then every chunk
takes the totals before its own, in order, and walks its steps. What is added to what does not depend on who is first.

Grid: (tiles of channels * chunks * rows,). Steps are counted by i along the walk, t in memory; a walk that goes back loads
backwards. U steps are loaded before the first of them is stored.
"""

import triton
import triton.language as tl

from fastseq.kernels.scan.cells import transition, transition_backward
from fastseq.kernels.scan.numbers import (
    add,
    adjoint,
    apply,
    choose,
    compose,
    identity,
    load_apart,
    load_numbers,
    outer,
    store_apart,
    store_numbers,
    zeros,
)


@triton.jit
def owner(layout, chunks, BC: tl.constexpr):
    """Channels, chunk and row of this program; the row is int64."""
    at, tiles = tl.program_id(0), tl.cdiv(layout.C, BC)
    return at % tiles * BC + tl.arange(0, BC), at // tiles % chunks, (at // tiles // chunks).to(tl.int64)


@triton.jit
def extent(layout, row):
    """First step in memory and number of steps of a row."""
    if layout.starts is not None:
        start = tl.minimum(tl.maximum(tl.load(layout.starts + row), 0), layout.T)
        stop = tl.minimum(tl.maximum(tl.load(layout.starts + row + 1), 0), layout.T)
        return start, tl.maximum(stop - start, 0)
    elif layout.lengths is not None:
        return layout.T * 0, tl.minimum(tl.maximum(tl.load(layout.lengths + row), 0), layout.T)
    else:
        return layout.T * 0, layout.T + 0


@triton.jit
def step_of(i, length, REVERSE: tl.constexpr):
    """t of i."""
    if REVERSE:
        return length - 1 - i
    else:
        return i


@triton.jit
def places(x, layout, row, start, t, c):
    """Of the channels of a step, in channels."""
    lane = row
    if layout.starts is not None:
        lane = row * 0
    return (start + t).to(tl.int64) * x.step + lane * x.row + c * x.channel


@triton.jit
def begins(layout, row, start, length, i, inside, FRESH: tl.constexpr, REVERSE: tl.constexpr):
    """Whether step i has no state before it: the first without an initial state, or behind a reset."""
    alone = i < 0
    if FRESH:
        alone = i == 0
    if layout.resets is not None:
        behind = step_of(i, length, REVERSE)  # a reset cuts between a step of memory and the one before it
        if REVERSE:
            behind = behind + 1
        lane = row
        if layout.starts is not None:
            lane = row * 0
        at = (start + behind).to(tl.int64) * layout.reset_step + lane * layout.reset_row
        alone = alone | (tl.load(layout.resets + at, mask=inside & (behind >= 0) & (behind < length), other=0) != 0)
    return alone


@triton.jit
def load_gate(gate, at, mask, BC: tl.constexpr, ACC: tl.constexpr):
    """Of the cells that have one; else zeros."""
    if gate.pointer is not None:
        return tl.load(gate.pointer + at, mask=mask, other=0.0).to(ACC)
    else:
        return tl.zeros((BC,), ACC)


@triton.jit
def load_vector(vector, c, real, BC: tl.constexpr, ACC: tl.constexpr):
    if vector is not None:
        return tl.load(vector + c, mask=real, other=0.0)
    else:
        return tl.zeros((BC,), ACC)


@triton.jit
def through(totals, state, row, chunk, chunks, c, C, real, KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """What becomes of a state in a chunk."""
    at = row * chunks + chunk
    product = load_apart(totals.product, at * (M * C) + c, C, real, M)
    own = load_apart(totals.state, at * (N * C) + c, C, real, N)
    return choose(tl.load(totals.cut + at) != 0, own, add(apply(product, state, KIND), own, N), N)


@triton.jit(do_not_specialize=["chunks", "span"])
def forward(
    b, a, gate, h,  # of gate the pointer may be None
    vector,  # wide [C] or None
    initial, final,  # wide [rows, C, N], initial None: zeros
    totals,  # of one chunk its pointers are None
    layout, chunks,
    span,  # steps of a chunk
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CELL: tl.constexpr, REVERSE: tl.constexpr, TOTALS: tl.constexpr,
    U: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c, chunk, row = owner(layout, chunks, BC)
    C, real = layout.C, c < layout.C
    start, length = extent(layout, row)
    begin = chunk * span
    end = tl.minimum(begin + span, length)
    state, product, cut = zeros(N, BC, ACC), identity(KIND, BC, ACC), begin < 0
    shared = load_vector(vector, c, real, BC, ACC)
    if not TOTALS:
        if initial is not None:
            state = load_numbers(initial, row * C + c, real, N, ACC)
        if totals.product is not None:
            for before in range(0, chunk):
                state = through(totals, state, row, before, chunks, c, C, real, KIND, N, M)
    for first in range(begin, end, U):
        loaded = ()
        for u in tl.static_range(U):
            i = first + u
            t, inside = step_of(i, length, REVERSE), i < end
            given = load_numbers(b.pointer, places(b, layout, row, start, t, c), real & inside, N, ACC)
            weight = load_numbers(a.pointer, places(a, layout, row, start, t, c), real & inside, M, ACC)
            second = load_gate(gate, places(gate, layout, row, start, t, c), real & inside, BC, ACC)
            alone = begins(layout, row, start, length, i, inside, initial is None, REVERSE)
            loaded = loaded + ((given, weight, second, alone),)
        for u in tl.static_range(U):
            i = first + u
            given, weight, second, alone = loaded[u]
            factor, added = transition(weight, given, second, shared, alone, CELL)
            inside = i < end
            moved = choose(alone, added, add(apply(factor, state, KIND), added, N), N)
            state = choose(inside, moved, state, N)
            if TOTALS:
                product = choose(inside, compose(factor, product, KIND), product, M)
                cut = cut | (alone & inside)
            else:
                at = places(h, layout, row, start, step_of(i, length, REVERSE), c)
                store_numbers(h.pointer, at, moved, real & inside, N)
    if TOTALS:
        at = row * chunks + chunk
        store_apart(totals.product, at * (M * C) + c, C, product, real, M)
        store_apart(totals.state, at * (N * C) + c, C, state, real, N)
        tl.store(totals.cut + at, cut.to(tl.int32))  # every tile of channels writes the same
    else:
        if layout.lengths is not None:
            nothing = zeros(N, BC, ACC)
            for t in range(tl.maximum(begin, length), tl.minimum(begin + span, layout.T)):
                store_numbers(h.pointer, places(h, layout, row, start, t, c), nothing, real, N)
        ends = ((length > begin) & (length <= begin + span)) | ((length == 0) & (chunk == 0))
        store_numbers(final, row * C + c, state, real & ends, N)


@triton.jit(do_not_specialize=["chunks", "span"])
def backward(
    dh, b, a, gate, h, db, da, dgate,  # of all but a and h the pointer may be None
    vector,  # wide [C] or None
    sums,  # wide [rows, chunks, C, M] or None: of every chunk the sum over its steps of a constant a's gradient, or of a vector's
    initial, dfinal, dinitial,  # wide [rows, C, N]; the first two or None
    totals, layout, chunks, span,
    KIND: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CELL: tl.constexpr, REVERSE: tl.constexpr, TOTALS: tl.constexpr,
    U: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c, chunk, row = owner(layout, chunks, BC)
    C, real = layout.C, c < layout.C
    start, length = extent(layout, row)
    begin = chunk * span
    end = tl.minimum(begin + span, length)
    carry, product, cut, total = zeros(N, BC, ACC), identity(KIND, BC, ACC), begin < 0, zeros(M, BC, ACC)
    shared = load_vector(vector, c, real, BC, ACC)
    if not TOTALS:
        if dfinal is not None:
            carry = load_numbers(dfinal, row * C + c, real, N, ACC)
        if totals.product is not None:
            for behind in range(0, chunks - 1 - chunk):
                carry = through(totals, carry, row, chunks - 1 - behind, chunks, c, C, real, KIND, N, M)
    for done in range(0, end - begin, U):
        loaded = ()
        for u in tl.static_range(U):
            i = end - 1 - done - u
            t, inside = step_of(i, length, REVERSE), i >= begin
            valid = real & inside
            given, before = zeros(N, BC, ACC), zeros(N, BC, ACC)
            if dh.pointer is not None:
                given = load_numbers(dh.pointer, places(dh, layout, row, start, t, c), valid, N, ACC)
            weight = load_numbers(a.pointer, places(a, layout, row, start, t, c), valid, M, ACC)
            logits = zeros(N, BC, ACC)
            if CELL >= 2 and not TOTALS:
                logits = load_numbers(b.pointer, places(b, layout, row, start, t, c), valid, N, ACC)
            second = load_gate(gate, places(gate, layout, row, start, t, c), valid, BC, ACC)
            alone = begins(layout, row, start, length, i, inside, initial is None, REVERSE)
            if not TOTALS:
                if CELL >= 2 or da.pointer is not None or sums is not None:
                    at = places(h, layout, row, start, step_of(i - 1, length, REVERSE), c)
                    before = load_numbers(h.pointer, at, valid & (i > 0), N, ACC)
                    if initial is not None:
                        before = choose(i == 0, load_numbers(initial, row * C + c, valid & (i == 0), N, ACC), before, N)
            loaded = loaded + ((given, weight, logits, second, alone, before),)
        run = zeros(M, BC, ACC)
        for u in tl.static_range(U):
            i = end - 1 - done - u
            given, weight, logits, second, alone, before = loaded[u]
            factor, _ = transition(weight, logits, second, shared, alone, CELL)
            inside = i >= begin
            whole = add(given, carry, N)
            back = adjoint(factor, KIND)
            moved = choose(alone, zeros(N, BC, ACC), apply(back, whole, KIND), N)
            carry = choose(inside, moved, carry, N)
            if TOTALS:
                product = choose(inside, compose(back, product, KIND), product, M)
                cut = cut | (alone & inside)
            else:
                t = step_of(i, length, REVERSE)
                through_h = choose(alone, zeros(M, BC, ACC), outer(whole, before, KIND), M)
                gradient, of_b, of_gate, of_vector = transition_backward(
                    through_h, whole, weight, logits, second, shared, alone, factor, CELL
                )
                if db.pointer is not None:
                    store_numbers(db.pointer, places(db, layout, row, start, t, c), of_b, real & inside, N)
                if da.pointer is not None:
                    store_numbers(da.pointer, places(da, layout, row, start, t, c), gradient, real & inside, M)
                if dgate.pointer is not None:
                    store_numbers(dgate.pointer, places(dgate, layout, row, start, t, c), (of_gate,), real & inside, 1)
                if sums is not None:
                    if vector is not None:
                        run = add(run, choose(inside, (of_vector,), zeros(M, BC, ACC), M), M)
                    else:
                        run = add(run, choose(inside, gradient, zeros(M, BC, ACC), M), M)
        total = add(total, run, M)
    if TOTALS:
        at = row * chunks + chunk
        store_apart(totals.product, at * (M * C) + c, C, product, real, M)
        store_apart(totals.state, at * (N * C) + c, C, carry, real, N)
        tl.store(totals.cut + at, cut.to(tl.int32))
    else:
        if sums is not None:
            store_numbers(sums, (row * chunks + chunk) * C + c, total, real, M)
        if layout.lengths is not None:
            for t in range(tl.maximum(begin, length), tl.minimum(begin + span, layout.T)):
                if db.pointer is not None:
                    store_numbers(db.pointer, places(db, layout, row, start, t, c), zeros(N, BC, ACC), real, N)
                if da.pointer is not None:
                    store_numbers(da.pointer, places(da, layout, row, start, t, c), zeros(M, BC, ACC), real, M)
                if dgate.pointer is not None:
                    store_numbers(dgate.pointer, places(dgate, layout, row, start, t, c), zeros(1, BC, ACC), real, 1)
        store_numbers(dinitial, row * C + c, carry, real & (chunk == 0), N)
