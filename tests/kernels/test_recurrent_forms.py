"""The forms of the Triton recurrent kernels: each forced, against the reference, and which one the table chooses."""

from __future__ import annotations

import importlib
import os
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
from fastseq import backends  # noqa: E402
from fastseq import functional as F  # noqa: E402
from fastseq.backends.triton import recurrent as triton_backend  # noqa: E402
from fastseq.backends.triton.recurrent_args import BackwardLaunch, ForwardLaunch  # noqa: E402
from fastseq.cells import CELLS  # noqa: E402
from fastseq.choice import self_check, sources  # noqa: E402
from fastseq.choice.decision import Candidate  # noqa: E402
from fastseq.kernels.recurrent import configs  # noqa: E402
from fastseq.ops.types import Backward, Forward, state_dtype  # noqa: E402
from fastseq.reference import recurrent as reference  # noqa: E402
from fastseq.testing import assert_all_close_to_truth  # noqa: E402

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
on_gpu = pytest.mark.gpu
DIVISIBLE = [name for name, row in CELLS.items() if not row.normalized]
OUTPUTS = ("y", "h_n", "c_n", "c", "gates")
GRADIENTS = ("dgates", "drecurrent", "doutput", "dh0", "dc0", "dreset_h", "dreset_c")
H100, A100, CONSUMER = 227 << 10, 163 << 10, 99 << 10


def problem(
    cell, *, steps, batch, hidden, lanes=2, inputs=0, layout="padded", zoneout="none", bias=True, state=True, projection=0,
    resets="none",
) -> Forward:  # fmt: skip
    """In fp64; with ``inputs`` the op projects them, else they are input gates. ``resets``: "zeros", or "given" states."""
    torch.manual_seed(0)
    row, width = CELLS[cell], projection or hidden
    lengths = torch.tensor([max(0, steps - b) for b in range(batch)])
    if layout == "packed":
        lengths = lengths.clamp(min=1)
    sizes = (lengths[None] > torch.arange(steps)[:, None]).sum(1)
    rows = (int(sizes.sum()),) if layout == "packed" else (steps, batch)
    gates, zoned_c = len(row.gates) * hidden, row.wide_states == 1

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return Forward(
        x=random(*rows, inputs or lanes * gates),
        w_ih=random(lanes * gates, inputs) / inputs**0.5 if inputs else None,
        b_ih=random(lanes * gates) if inputs and bias else None,
        weight=random(lanes, gates, width) / hidden**0.5,
        vectors=random(lanes, len(row.vectors) * hidden) if row.vectors else None,
        projection=random(lanes, width, hidden) / hidden**0.5 if projection else None,
        h0=random(lanes, batch, width) if state else None,
        # positive, as the normalizer of an sLSTM is, which cannot begin at 0
        c0=random(lanes, batch, row.wide_states * hidden).abs() if row.has_c and (state or row.wide_states > 1) else None,
        lengths=lengths if layout == "lengths" else None,
        batch_sizes=sizes if layout == "packed" else None,
        hold_h=torch.rand(*rows, lanes, width) < 0.4 if zoneout == "mask" else None,
        hold_c=torch.rand(*rows, lanes, hidden) < 0.4 if zoneout == "mask" and zoned_c else None,
        cell=cell,
        reverse=[0, 1][:lanes],
        zoneout_h=0.3 if zoneout == "proportion" else 0.0,
        zoneout_c=0.4 if zoneout == "proportion" and zoned_c else 0.0,
        save_c=True,
        save_gates=True,
        resets=torch.rand(*rows) < 0.4 if resets != "none" else None,
        reset_h=random(lanes, batch, width) if resets == "given" else None,
        reset_c=random(lanes, batch, row.wide_states * hidden).abs() if resets == "given" and row.has_c else None,
    )


def cast(call: Forward, dtype: torch.dtype, device: str) -> Forward:
    wide = state_dtype(dtype)

    def moved(name: str, value: object) -> object:
        if not isinstance(value, Tensor) or name == "batch_sizes":
            return value
        return value.to(device, (wide if name in ("c0", "reset_c") else dtype) if value.is_floating_point() else None)

    return replace(call, **{f.name: moved(f.name, getattr(call, f.name)) for f in fields(call) if f.init})


def backward_of(call: Forward, results: tuple[Tensor, ...]) -> Backward:
    """With every gradient given."""
    y, h_n, c_n, c, gates = results
    generator = torch.Generator().manual_seed(1)

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, dtype=torch.float64, generator=generator).to(tensor)

    given = [like(y), like(h_n), *((like(c_n), like(c)) if call.row.has_c else (None, None))]
    return Backward(
        *given, call.weight, call.vectors, call.projection, call.h0, call.c0, call.lengths, call.batch_sizes, call.hold_h,
        call.hold_c, y, c, gates, call.cell, call.reverse, call.zoneout_h, call.zoneout_c, call.resets, call.reset_h,
        call.reset_c,
    )  # fmt: skip


def results_of(backend, forward: str, backward: str, call: Forward) -> dict[str, Tensor]:
    """Outputs, and the gradients that follow from them."""
    outputs = getattr(backend, forward)(call)
    gradients = getattr(backend, backward)(backward_of(call, outputs))
    return dict(zip(OUTPUTS + GRADIENTS, (*outputs, *gradients), strict=True))


def expected_of(call: Forward) -> dict[str, Tensor]:
    return results_of(reference, "forward", "backward", call)


def actual_of(call: Forward) -> dict[str, Tensor]:
    return results_of(triton_backend, "recurrent_forward", "recurrent_backward", call)


def assert_same(call: Forward) -> None:
    expected = expected_of(call)
    for name, value in actual_of(call).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def forced(monkeypatch):
    return lambda form: monkeypatch.setenv("FASTSEQ_TRITON_RECURRENT", form)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks of units and several tiles of weights where there are few units."""
    monkeypatch.setattr(configs, "_streamed", lambda *_: ({"BB": 2, "BH": 16, "BK": 16}, {"num_warps": 4, "num_stages": 1}))


@interpreted
@pytest.mark.parametrize("layout,zoneout", [("padded", "none"), ("lengths", "mask"), ("packed", "proportion")])
@pytest.mark.parametrize("cell", DIVISIBLE)
def test_streamed_is_the_reference(forced, small_tiles, cell, layout, zoneout):
    """Blocks of a batch with rows that have no step; 20 units, padded to 32."""
    forced("streamed")
    call = problem(cell, steps=2, batch=3, hidden=20, layout=layout, zoneout=zoneout)
    assert ForwardLaunch(call).config.form == "streamed"
    assert_same(call)


@interpreted
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_streamed_without_states(forced, small_tiles, steps):
    forced("streamed")
    assert_same(problem("lstm", steps=steps, batch=3, hidden=16, lanes=1, inputs=3, state=False))


@interpreted
def test_streamed_with_the_tiles_of_a_gpu(forced, monkeypatch):
    forced("streamed")
    monkeypatch.setattr(configs, "shared_memory", lambda device: H100)
    assert_same(problem("gru", steps=2, batch=17, hidden=133, lanes=1))


@interpreted
@pytest.mark.parametrize("cell, layout", [("rnn_tanh", "padded"), ("gru", "lengths"), ("lstm", "packed")])
def test_parallel_is_the_reference(forced, cell, layout):
    """Back through all steps by one scan, where no unit sees another."""
    forced("parallel")
    call, notes = problem(cell, steps=3, batch=3, hidden=1, layout=layout), []
    with backends.watching(lambda query, name: None, notes.append):
        assert_same(call)
    assert "backward parallel in time" in notes


@interpreted
def test_parallel_without_steps(forced):
    forced("parallel")
    assert_same(problem("gru", steps=0, batch=3, hidden=1, lanes=1, inputs=3))


@interpreted
@pytest.mark.parametrize("facts", [{"hidden": 2}, {"zoneout": "proportion"}], ids=str)
def test_what_is_not_parallel_takes_another_form(forced, facts):
    forced("parallel")
    notes: list[str] = []
    with backends.watching(lambda query, name: None, notes.append):
        assert_same(problem(**{"cell": "rnn_tanh", "steps": 2, "batch": 2, "hidden": 1} | facts))
    assert not any("parallel" in note for note in notes)


def test_parallel_is_a_candidate_where_it_can_run():
    query = backends.RecurrentQuery("recurrent", torch.device("cuda"), torch.float32, "gru", 9, 62, 1, False, "padded")
    assert "parallel" in triton_backend.forms(query)
    for other in ({"hidden": 2}, {"cell": "slstm"}, {"cell": "layer_norm_gru"}, {"zoned": True}, {"steps": 1}):
        assert "parallel" not in triton_backend.forms(query._replace(**other))


def test_parallel_runs_where_it_was_measured_to_be_the_fastest():
    """And has a verdict of its own in the self-check."""
    query = backends.RecurrentQuery("recurrent", torch.device("cuda"), torch.float32, "gru", 9, 62, 1, False, "padded")
    with sources.instead(lambda call: Candidate("triton", "parallel") if call.op == "recurrent" else None):
        assert triton_backend.form(query, "backward") == "parallel" == triton_backend.variant(query, "backward")
        family = self_check.family_of(backends.BACKENDS["triton"], query, "backward")
    assert family.startswith("triton: recurrent backward, gru, float32") and family.endswith(", parallel")


def test_parallel_is_a_variant_of_its_own(forced):
    query = backends.RecurrentQuery("recurrent", torch.device("cpu"), torch.float32, "gru", 9, 62, 1, False, "padded")
    forced("parallel")
    assert triton_backend.variant(query, "backward") == "parallel"
    assert triton_backend.variant(query, "forward").startswith("whole")
    assert "parallel" not in triton_backend.variant(query._replace(hidden=2), "backward")


@interpreted
@pytest.mark.parametrize(
    "batch,inputs,zoneout", [(1, 3, "none"), (3, 0, "mask"), (4, 70, "proportion"), (6, 40, "mask"), (16, 0, "none")]
)
@pytest.mark.parametrize("cell", DIVISIBLE)
def test_single_is_the_reference(cell, batch, inputs, zoneout):
    """Sums for up to four rows, matrix instructions beyond; inputs longer than a tile, and input gates."""
    call = problem(cell, steps=1, batch=batch, hidden=9, inputs=inputs, zoneout=zoneout, bias=batch != 6)
    assert ForwardLaunch(call).config.form == "single"
    assert_same(call)


@interpreted
@pytest.mark.parametrize("batch", [2, 7])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_single_of_weights_longer_than_a_tile(cell, batch):
    call = problem(cell, steps=1, batch=batch, hidden=70, lanes=1, inputs=130)
    assert ForwardLaunch(call).config.form == "single"
    assert_same(call)


@interpreted
@pytest.mark.parametrize("batch", [3, 8])
def test_single_without_states_and_without_saving(batch):
    call = problem("lstm", steps=1, batch=batch, hidden=5, inputs=4, state=False)
    expected = reference.forward(call)
    outputs = triton_backend.recurrent_forward(replace(call, save_c=False, save_gates=False))
    for value, other in zip(outputs[:3], expected, strict=False):
        torch.testing.assert_close(value, other)
    assert outputs[3].numel() == outputs[4].numel() == 0


@interpreted
def test_more_rows_than_a_single_step_takes(forced):
    call = problem("lstm", steps=1, batch=18, hidden=5, inputs=4, lanes=1)
    assert ForwardLaunch(call).config.form == "stepwise"
    assert_same(call)
    forced("single")
    assert ForwardLaunch(call).config.form == "single"
    assert_same(call)


@interpreted
@pytest.mark.parametrize("cell", ["layer_norm_lstm", "layer_norm_gru"])
def test_one_normalized_step_is_not_divided(forced, cell):
    forced("single")
    call = problem(cell, steps=1, batch=3, hidden=5, inputs=4)
    config = ForwardLaunch(call).config
    assert config.form == "stepwise"
    assert "normalization" in config.reason
    assert_same(call)


@interpreted
@pytest.mark.parametrize("form", ["whole", "stepwise"])
def test_the_other_forms_take_one_step_if_forced(forced, form):
    forced(form)
    call = problem("gru", steps=1, batch=3, hidden=5, inputs=4)
    assert ForwardLaunch(call).config.form == BackwardLaunch(backward_of(call, reference.forward(call))).config.form == form
    assert_same(call)


@interpreted
@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_torchs_cells(cell, batch):
    """Outputs and every gradient of a module's step."""
    torch.manual_seed(0)
    module = {"rnn_tanh": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell](6, 9, dtype=torch.float64)
    x, h, c = (torch.randn(batch, n, dtype=torch.float64, requires_grad=True) for n in (6, 9, 9))
    state, params = (h, c) if cell == "lstm" else h, list(module.parameters())
    wanted = [x, h, *([c] if cell == "lstm" else []), *params]
    with backends.use_backend("triton"):
        ours = {"rnn_tanh": F.rnn_cell, "lstm": F.lstm_cell, "gru": F.gru_cell}[cell](x, state, *params)
        gradients = torch.autograd.grad(sum(t.square().sum() for t in (ours if cell == "lstm" else [ours])), wanted)
    torchs = module(x, state)
    expected = torch.autograd.grad(sum(t.square().sum() for t in (torchs if cell == "lstm" else [torchs])), wanted)
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(gradients, expected)


PRECISIONS = [
    pytest.param(device, dtype, marks=mark)
    for device, dtype, mark in (
        ("cpu", torch.float32, interpreted),
        ("cpu", torch.float16, interpreted),
        ("cpu", torch.bfloat16, interpreted),
        ("cuda", torch.float16, on_gpu),
        ("cuda", torch.bfloat16, on_gpu),
    )
]


@pytest.mark.parametrize("device,dtype", PRECISIONS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "slstm"])
@pytest.mark.parametrize("form,steps,batch", [("streamed", 4, 3), ("single", 1, 3), ("single", 1, 7)])
def test_as_precise_as_the_reference(forced, form, steps, batch, cell, device, dtype):
    forced(form)
    rounded = cast(problem(cell, steps=steps, batch=batch, hidden=24, inputs=10), dtype, device)
    assert ForwardLaunch(rounded).config.form == form
    truth = expected_of(cast(rounded, torch.float64, device))
    assert_all_close_to_truth(actual_of(rounded), expected_of(rounded), truth)


CUTS = [("padded", "none", "zeros"), ("lengths", "mask", "given"), ("packed", "proportion", "given")]
WALKS = ("whole", "streamed", "stepwise")


@interpreted
@pytest.mark.parametrize("layout,zoneout,resets", CUTS)
@pytest.mark.parametrize("form,cell", [("whole", "lstm"), ("whole", "gru"), ("streamed", "lstm"), ("stepwise", "lstm")])
def test_resets_are_the_references(forced, small_tiles, form, cell, layout, zoneout, resets):
    """In both directions, at first steps and at last ones."""
    forced(form)
    call = problem(cell, steps=3, batch=3, hidden=20, layout=layout, zoneout=zoneout, resets=resets)
    assert ForwardLaunch(call).config.form == form
    assert_same(call)


@interpreted
@pytest.mark.parametrize(
    "form,cell",
    [("whole", "layer_norm_lstm"), ("whole", "rnn_tanh"), ("stepwise", "layer_norm_gru"), ("stepwise", "gru")]
    + [("streamed", "gru"), ("streamed", "slstm")],
)
def test_resets_of_other_cells(forced, small_tiles, form, cell):
    forced(form)
    call = problem(cell, steps=4, batch=2, hidden=9, resets="given")
    assert ForwardLaunch(call).config.form == form
    assert_same(call)


@interpreted
@pytest.mark.parametrize("layout,zoneout,resets", CUTS)
def test_resets_before_a_projection(layout, zoneout, resets):
    call = problem("lstm", steps=4, batch=3, hidden=9, projection=7, layout=layout, zoneout=zoneout, resets=resets)
    assert_same(call)


@interpreted
@pytest.mark.parametrize("resets", ["zeros", "given"])
@pytest.mark.parametrize("cell,batch,state", [("lstm", 3, True), ("lstm", 7, False), ("gru", 7, True)])
def test_resets_of_a_single_step(cell, batch, state, resets):
    call = problem(cell, steps=1, batch=batch, hidden=9, inputs=4, state=state, resets=resets)
    assert ForwardLaunch(call).config.form == "single"
    assert_same(call)


def not_a_number(cell: str, resets: str) -> Forward:
    """Rows cut in the middle. What is no number: input before that, a first state that is replaced, input after that."""
    call = problem(cell, steps=4, batch=3, hidden=5, resets=resets)
    call.resets[:] = torch.tensor([False, False, True, False])[:, None]
    call.resets[0, 1] = True
    call.x[1, 0], call.x[3, 2] = torch.nan, torch.nan
    call.h0[0, 1] = torch.nan
    return call


def nan_of(call: Forward) -> dict[str, Tensor]:
    found = actual_of(call)
    for name, wanted in expected_of(call).items():
        torch.testing.assert_close(found[name], wanted, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
    return found


@interpreted
@pytest.mark.parametrize("cell,resets", [("lstm", "given"), ("gru", "zeros")])
@pytest.mark.parametrize("form", WALKS)
def test_what_is_no_number_stays_in_its_segment(forced, small_tiles, form, cell, resets):
    forced(form)
    found = nan_of(not_a_number(cell, resets))
    for rows in (found["y"], found["dgates"]):
        assert rows[1, 0].isnan().all() and rows[2:, 0].isfinite().all() and rows[:, 1].isfinite().all()
        assert rows[3, 2].isnan().all() and rows[:2, 2].isfinite().all()


if os.environ.get("TRITON_INTERPRET") == "1":
    import triton
    from triton import language as tl

    from fastseq.kernels.recurrent import step

    @triton.jit
    def a_step_late(layout, resets, t, back, lengths, b):
        """`cut_before` of the step before."""
        return step.cut_before(layout, resets, tl.where(back, t + 1, t - 1), back, lengths, b)

    @triton.jit
    def where_it_stands(layout, resets, t, back, lengths, b):
        """`cut_before` that takes a lane backwards for one forward."""
        return step.cut_before(layout, resets, t, t < 0, lengths, b)

    @triton.jit
    def all_passed_on(grads, sums, at, mask, cut, H, N: tl.constexpr, BB: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
        """`cut_off` that cuts nothing."""
        return grads

    @triton.jit
    def times_zero(mask, new, old, N: tl.constexpr):
        """`choose` by multiplication."""
        tiles = ()
        for k in tl.static_range(N):
            tiles = tiles + (new[k] * tl.where(mask, 1.0, 0.0) + old[k] * tl.where(mask, 0.0, 1.0),)
        return tiles

    FAULTS = {
        "late": ("cut_before", a_step_late),
        "alike": ("cut_before", where_it_stands),
        "gradients": ("cut_off", all_passed_on),
        "times zero": ("choose", times_zero),
    }


@interpreted
@pytest.mark.parametrize(
    "form,fault",
    [("whole", "late"), ("whole", "alike"), ("whole", "times zero"), ("streamed", "late"), ("streamed", "gradients")]
    + [("stepwise", fault) for fault in ("alike", "gradients", "times zero")],
)
def test_a_wrong_cut_is_seen(forced, small_tiles, monkeypatch, form, fault):
    forced(form)
    monkeypatch.setattr(importlib.import_module(f"fastseq.kernels.recurrent.{form}"), *FAULTS[fault])
    with pytest.raises(AssertionError):
        nan_of(not_a_number("lstm", "zeros"))


def chosen(shared, dtype, cell, hidden, batch=32, projected=False, form=None, one_step=False, backward=False):
    row = CELLS[cell]
    return configs.recurrent(
        shared, dtype, len(row.gates), hidden, batch, projected, row.normalized, form, one_step, backward
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shared", "dtype", "cell", "hidden", "form"),
    [
        (H100, torch.bfloat16, "lstm", 128, "whole"),
        (A100, torch.bfloat16, "lstm", 128, "whole"),
        (CONSUMER, torch.bfloat16, "lstm", 128, "streamed"),
        (CONSUMER, torch.bfloat16, "lstm", 64, "whole"),
        (H100, torch.bfloat16, "lstm", 129, "streamed"),
        (H100, torch.bfloat16, "lstm", 256, "streamed"),
        (H100, torch.bfloat16, "lstm", 257, "stepwise"),
        (H100, torch.bfloat16, "gru", 295, "streamed"),
        (H100, torch.bfloat16, "gru", 296, "stepwise"),
        (H100, torch.bfloat16, "rnn_tanh", 256, "whole"),
        (A100, torch.bfloat16, "rnn_tanh", 512, "streamed"),
        (CONSUMER, torch.bfloat16, "rnn_tanh", 513, "stepwise"),
        (H100, torch.float32, "lstm", 64, "whole"),
        (CONSUMER, torch.float32, "lstm", 64, "whole"),
        (A100, torch.float32, "lstm", 100, "streamed"),
        (H100, torch.float32, "lstm", 182, "stepwise"),
        (H100, torch.bfloat16, "layer_norm_lstm", 128, "whole"),
        (H100, torch.bfloat16, "layer_norm_lstm", 256, "stepwise"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_the_table(shared, dtype, cell, hidden, form, backward):
    config = chosen(shared, dtype, cell, hidden, backward=backward)
    assert config.form == form
    assert "KiB" in config.reason


def test_the_table_for_batches_projections_and_single_steps():
    bf16 = torch.bfloat16
    assert chosen(H100, bf16, "lstm", 256, batch=1024).form == "streamed"
    assert chosen(H100, bf16, "lstm", 256, batch=1025).form == "stepwise"
    assert chosen(H100, bf16, "lstm", 64, projected=True).form == "stepwise"
    assert chosen(H100, bf16, "lstm", 4096, batch=16, one_step=True).form == "single"
    assert chosen(H100, bf16, "lstm", 64, batch=17, one_step=True).form == "stepwise"
    assert chosen(H100, bf16, "lstm", 64, batch=1, one_step=True, backward=True).form == "stepwise"
    assert chosen(H100, bf16, "lstm", 64, batch=1, one_step=True, projected=True).form == "stepwise"


@pytest.mark.parametrize("form", configs.FORMS)
def test_a_form_that_cannot_run_a_call_is_not_forced(form):
    bf16 = torch.bfloat16
    assert chosen(H100, bf16, "lstm", 64, form=form).form == ("whole" if form == "single" else form)
    assert chosen(H100, bf16, "lstm", 64, form=form, one_step=True).form == form
    assert chosen(H100, bf16, "lstm", 64, form=form, projected=True).form == "stepwise"
    normalized = chosen(H100, bf16, "layer_norm_gru", 64, form=form).form
    assert normalized == (form if form in ("whole", "stepwise") else "whole")


@pytest.mark.parametrize("shared", [H100, A100, CONSUMER])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("hidden", [16, 100, 129, 512])
@pytest.mark.parametrize("cell", DIVISIBLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_streamed_tiles_fit(shared, dtype, cell, hidden, backward):
    """All stages but the one in registers lie in shared memory."""
    config = chosen(shared, dtype, cell, hidden, form="streamed", backward=backward)
    tiles, stages = config.tiles, config.options["num_stages"]
    beside = 1 if backward else len(CELLS[cell].gates)
    assert 2 <= stages
    assert (stages - 1) * (beside * tiles["BH"] + tiles["BB"]) * tiles["BK"] * dtype.itemsize <= shared


def test_an_unknown_form_is_refused(forced):
    forced("resident")
    with pytest.raises(
        ValueError, match="FASTSEQ_TRITON_RECURRENT=resident is none of single, whole, streamed, stepwise, parallel"
    ):
        triton_backend.recurrent_forward(problem("lstm", steps=2, batch=2, hidden=4))
