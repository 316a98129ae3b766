"""Layers in which no unit sees another, parallel in time: against the loop over their steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastseq.cells import CELLS
from fastseq.ops.types import Backward, Forward
from fastseq.reference import recurrent as reference
from fastseq.reference import recurrent_parallel as parallel
from fastseq.reference import scan
from fastseq.reference.cells import steps as cell_steps

ROUNDING = dict(rtol=1e-11, atol=1e-12)
UNITS = [name for name, row in CELLS.items() if row.jacobian]
EXACT = parallel.Solver(1e-11, 40, 0, False)
RESULTS = ("y", "h_n", "c_n", "c", "gates")
GRADIENTS = ("dgates", "drecurrent", "doutput", "dh0", "dc0", "dreset_h", "dreset_c")


def problem(
    cell: str,
    layout: str = "padded",
    size: float = 1.0,
    steps: int = 9,
    batch: int = 4,
    reverse: tuple[int, ...] = (0, 1, 1, 0, 0),
    dtype: torch.dtype = torch.float64,
) -> Forward:
    """Input gates, weights of that size and states, of lanes that are units."""
    torch.manual_seed(0)
    row, lanes = CELLS[cell], len(reverse)
    lengths = torch.tensor([steps, *(max(1, steps - 3 * b) for b in range(1, batch))])
    sizes = (lengths[None] > torch.arange(steps)[:, None]).sum(1)
    if layout == "lengths":
        lengths[1] = 0
    rows = (int(sizes.sum()),) if layout == "packed" else (steps, batch)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    call = Forward(
        x=random(*rows, lanes * len(row.gates)),
        w_ih=None,
        b_ih=None,
        weight=size * random(lanes, len(row.gates), 1),
        vectors=random(lanes, len(row.vectors)) if row.vectors else None,
        projection=None,
        h0=random(lanes, batch, 1),
        c0=random(lanes, batch, 1) if row.has_c else None,
        lengths=lengths if layout == "lengths" else None,
        batch_sizes=sizes if layout == "packed" else None,
        hold_h=None,
        hold_c=None,
        cell=cell,
        reverse=list(reverse),
        zoneout_h=0.0,
        zoneout_c=0.0,
        save_c=True,
        save_gates=True,
    )
    names = ("x", "weight", "vectors", "h0", "c0")
    return replace(call, **{name: t.to(dtype) for name in names if (t := getattr(call, name)) is not None})


def with_resets(call: Forward, states: bool = True) -> Forward:
    """Rows that start anew in some steps, of which their first and last are some, from states of their own or from zeros."""
    rows = call.x.shape[:-1]
    torch.manual_seed(3)
    resets = torch.rand(rows) < 0.3
    resets[0] = resets[-1] = True
    resets[1] = False
    of_states = {"reset_h": torch.randn_like(call.h0), "reset_c": None if call.c0 is None else torch.randn_like(call.c0)}
    return replace(call, resets=resets, **(of_states if states else {}))


def backward_of(call: Forward, grads: tuple[str, ...]) -> Backward:
    """Of the loop's results."""
    y, h_n, c_n, c, gates = reference.forward(call)
    torch.manual_seed(1)
    given = {"dy": torch.randn_like(y), "dh_n": torch.randn_like(h_n), "dc_n": torch.randn_like(c_n), "dc": torch.randn_like(c)}
    of = [given[name] if name in grads and given[name].numel() else None for name in given]
    return Backward(
        *(*of, call.weight, call.vectors, None, call.h0, call.c0, call.lengths, call.batch_sizes, None, None, y, c, gates),
        *(call.cell, call.reverse, 0.0, 0.0, call.resets, call.reset_h, call.reset_c),
    )


def scan_backward(*args):
    return scan.backward(*args[:-1])


def solved(call: Forward, solver: parallel.Solver = EXACT, sequential=reference.forward):
    return parallel.newton(call, solver, scan.forward, sequential)


def assert_same(found, expected, names, **bounds):
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, **(bounds or ROUNDING), equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", UNITS)
def test_backward(cell, layout):
    call = backward_of(problem(cell, layout), ("dy", "dh_n", "dc_n", "dc"))
    assert parallel.serves(call)
    assert_same(parallel.backward(call, scan_backward), reference.backward(call), GRADIENTS)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_backward_with_resets(cell, layout, states):
    call = backward_of(with_resets(problem(cell, layout), states), ("dy", "dh_n", "dc_n", "dc"))
    assert_same(parallel.backward(call, scan_backward), reference.backward(call), GRADIENTS)


@pytest.mark.parametrize("iterations", [40, 1])
@pytest.mark.parametrize("chunk", [0, 1, 4])
@pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_newton_with_resets(cell, layout, chunk, iterations):
    """Within a chunk and at its edge, and where the sequential kernel goes on."""
    call = with_resets(problem(cell, layout, size=2.0))
    found, report = solved(call, EXACT._replace(chunk=chunk, max_iterations=iterations))
    assert bool(report.fallen) == (iterations == 1 and chunk != 1)
    assert_same(found, reference.forward(call), RESULTS, rtol=1e-8, atol=1e-9)


def test_segments_are_solved_side_by_side():
    """No more iterations than steps between resets, whatever the weights: the scan stops there as well."""
    call = with_resets(problem("gru", size=4.0, steps=40))
    assert max(solved(call)[1].iterations) > 5
    call.resets[:] = (torch.arange(40) % 4 == 0)[:, None]
    assert max(solved(call)[1].iterations) <= 4


def test_a_reset_ends_what_is_not_finite():
    call = with_resets(problem("lstm"))
    call.x[4, 1] = torch.nan
    call.resets[5:7, 1] = torch.tensor([False, True])
    (y, *others), _ = solved(call)
    assert_same((y, *others), reference.forward(call), RESULTS, rtol=1e-8, atol=1e-9)
    assert y[4:6, 1, 0].isnan().all() and y[6:, 1, 0].isfinite().all()


@pytest.mark.parametrize("grads", [("dy",), ("dh_n", "dc_n"), ("dc",)], ids="+".join)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_backward_of_some_gradients(cell, grads):
    call = backward_of(problem(cell, "lengths"), grads)
    assert parallel.serves(call)
    assert_same(parallel.backward(call, scan_backward), reference.backward(call), GRADIENTS)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("cell", UNITS)
def test_backward_without_states_of_few_steps(cell, steps):
    call = backward_of(replace(problem(cell, steps=steps, batch=1), h0=None, c0=None), ("dy", "dc_n"))
    assert_same(parallel.backward(call, scan_backward), reference.backward(call), GRADIENTS)


def test_what_it_serves():
    call = problem("gru")
    assert parallel.serves(call)
    assert not parallel.serves(replace(call, zoneout_h=0.5))
    assert not parallel.serves(replace(call, hold_h=torch.zeros(9, 4, 5, 1, dtype=torch.bool)))
    assert not parallel.serves(replace(call, weight=call.weight.new_zeros(5, 6, 2)))
    assert not parallel.serves(replace(call, cell="layer_norm_gru"))


@pytest.mark.parametrize("chunk", [0, 1, 4, 9, 100])
@pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_newton_in_chunks(cell, layout, chunk):
    call = problem(cell, layout)
    found, report = solved(call, EXACT._replace(chunk=chunk))
    assert not report.fallen and report.residual <= EXACT.tolerance
    assert len(report.iterations) == 2 * (1 if chunk in (0, 100) else -(-9 // chunk))
    assert_same(found, reference.forward(call), RESULTS, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cell", [cell for cell in UNITS if cell not in ("gru", "lstm")])
def test_newton(cell):
    call = problem(cell, "lengths")
    assert_same(solved(call)[0], reference.forward(call), RESULTS, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("saves", [(True, False), (False, True), (False, False)])
def test_newton_gives_what_is_wanted(saves):
    call = replace(problem("lstm"), save_c=saves[0], save_gates=saves[1])
    for a, b in zip(solved(call)[0], reference.forward(call), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize("cell, size, least, most", [
    ("gru", 0.25, 3, 5), ("gru", 1.0, 5, 14), ("lstm", 0.25, 2, 4), ("lstm", 1.0, 4, 8), ("rnn_tanh", 0.25, 2, 5),
])  # fmt: skip
def test_iterations(cell, size, least, most):
    """As many as units need that do not hold on for long: a Jacobian that is wrong in a term would take tens."""
    call = replace(problem(cell, size=size, steps=512, batch=2, reverse=(0,) * 16), vectors=None, h0=None, c0=None)
    found, report = solved(call, parallel.Solver(1e-6, 40, 0, True))
    assert least <= report.iterations[0] <= most, report
    assert_same(found[:1], reference.forward(call)[:1], RESULTS[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
def test_the_residual_is_what_was_asked_for(tolerance):
    """By one application of the step to what is returned."""
    call = problem("gru", size=2.0, steps=40, reverse=(0,) * 5)
    (y, *_), report = solved(call, parallel.Solver(tolerance, 40, 0, True))
    assert report.residual <= tolerance
    earlier = torch.cat((call.h0.transpose(0, 1)[None], y[:-1]))
    again, _, _ = cell_steps("gru").step(call.input_gates(), call.weight.squeeze(-1) * earlier, call.vectors, earlier, None)
    assert ((again - y).abs() / (1 + y.abs())).max() <= tolerance


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_iterations_make_the_first_steps_exact(iterations):
    """So many and one more; the sequential kernel goes on from there, or later."""
    call, begun = problem("gru", size=4.0, steps=40, batch=1, reverse=(0,) * 8), []

    def sequential(part: Forward):
        begun.append(40 - part.steps)
        return reference.forward(part)

    found, report = solved(call, parallel.Solver(1e-9, iterations, 0, False), sequential)
    assert begun[0] > iterations and report.fallen == {0} and report.iterations == [iterations]
    assert_same(found, reference.forward(call), RESULTS, rtol=0, atol=1e-7)


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_falls_back(cell, layout, chunk):
    call = problem(cell, layout, size=4.0, steps=24)
    found, report = solved(call, parallel.Solver(1e-10, 1, chunk, False))
    assert report.fallen and "by the sequential kernel then rows 0" in str(report)
    assert_same(found, reference.forward(call), RESULTS, rtol=1e-7, atol=1e-8)


def test_falls_back_in_parts_of_lanes():
    """The sequential kernels take 62 of them."""
    call, lanes = problem("lstm", size=4.0, steps=20, reverse=(0,) * 70), []

    def sequential(part: Forward):
        lanes.append(part.lanes)
        return reference.forward(part)

    found, _ = solved(call, parallel.Solver(1e-10, 1, 0, False), sequential)
    assert lanes == [62, 8]
    assert_same(found, reference.forward(call), RESULTS, rtol=1e-7, atol=1e-8)


def test_raises():
    call = problem("gru", size=4.0, steps=40)
    words = r"did not reach its tolerance of 1e-10 in 2 iterations, but a residual of \d.*, in 4 of 4 rows, from step \d+ on"
    with pytest.raises(RuntimeError, match=words):
        solved(call, parallel.Solver(1e-10, 2, 0, True))
    call.x[3, 1] = torch.nan
    with pytest.raises(RuntimeError, match="but numbers that are not finite, in 1 of 4 rows, from step"):
        solved(call, parallel.Solver(1e-10, 40, 8, True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("cell", UNITS)
def test_numbers_that_are_not_finite(cell, value):
    """Go where the sequential kernel sends them, and other rows do not notice."""
    call = problem(cell)
    clean, _ = solved(call)
    call.x[4, 1] = value
    found, report = solved(call)
    assert report.fallen <= {1}
    assert_same(found, reference.forward(call), RESULTS, rtol=1e-8, atol=1e-9)
    others = [0, 2, 3]
    for name, a, b in zip(RESULTS, found, clean, strict=True):
        if a.numel():
            assert torch.equal(a[:, others], b[:, others]), name


def test_rows_do_not_touch():
    """A row that takes more iterations than the others, or fewer, changes none of their bits."""
    call, loose = problem("gru", size=2.0, steps=40), parallel.Solver(1e-2, 30, 0, True)
    clean, few = solved(call, loose)
    call.x[:, 1] = 3 * torch.randn(40, 15)
    found, other = solved(call, loose)
    assert few.iterations != other.iterations
    for name, a, b in zip(RESULTS, found, clean, strict=True):
        if a.numel():
            assert torch.equal(a[:, [0, 2, 3]], b[:, [0, 2, 3]]), name


def test_overflow_is_a_failure_not_a_result():
    """Weights so large that iterates leave fp32's range before they come back."""
    call = problem("gru", size=1.0, steps=60, batch=2, dtype=torch.float32)
    call.weight.copy_(torch.tensor([0.0, 0.0, 40.0])[:, None])
    found, report = solved(call, parallel.Solver(1e-5, 40, 0, False))
    assert_same(found, reference.forward(call), RESULTS, rtol=1e-3, atol=1e-3)
    assert report.residual <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", UNITS)
def test_inside_is_float32(cell, dtype):
    """The trajectory is that of the rounded inputs in fp32: of bf16, rounded once where the loop rounds h in each step."""
    call = problem(cell, steps=64, dtype=dtype)
    if call.c0 is not None:
        call = replace(call, c0=call.c0.float())
    wide = {name: t.double() for name in ("x", "weight", "vectors", "h0", "c0") if (t := getattr(call, name)) is not None}
    truth = reference.forward(replace(call, **wide))
    found, _ = solved(call, parallel.Solver(1e-6, 40, 0, True))
    for name, a, b in zip(RESULTS, found, truth, strict=True):
        eps = torch.finfo(a.dtype).eps
        assert (a.double() - b).abs().max() <= max(2e-5, eps) * b.abs().max().clamp(min=1) if a.numel() else True, name


@pytest.mark.parametrize("run", [solved, lambda call: (parallel.backward(backward_of(call, ("dy", "dc")), scan_backward), None)])
def test_the_same_bits_each_time(run):
    call = problem("lstm", "lengths", size=2.0, steps=30)
    for a, b in zip(run(call)[0], run(call)[0], strict=True):
        assert torch.equal(a, b)


def test_nothing_to_solve():
    call = problem("lstm")
    nobody = {"x": call.x[:, :0], "h0": call.h0[:, :0], "c0": call.c0[:, :0]}
    found, report = solved(replace(call, **nobody))
    assert [t.numel() for t in found] == [0] * 5 and "iterations 0" in str(report)
