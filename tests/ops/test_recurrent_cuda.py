"""The CUDA kernels of the recurrence, executed on the host: every form that a plan can take, schedules, budgets, the planner.

The op battery (test_recurrent.py) runs them too, as backend "cuda-host", on the plans of one small machine.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import fastseq
from fastseq import backends
from fastseq import functional as F
from fastseq.backends import cuda, library
from fastseq.backends.cuda import recurrent
from fastseq.backends.cuda.plan import Device, Numbers, fields, plan_of
from fastseq.benchmarks.gpu.cuda_plans import ranked
from fastseq.cells import CELLS
from fastseq.choice import device as choice_device
from fastseq.choice import sources
from fastseq.choice.problems import families, problems_of
from fastseq.testing import assert_all_close_to_truth, pooled_error
from support import cuda_host, recurrent_equations
from support.cases import RecurrentCase
from support.recurrent import SEED, RecurrentBattery

executed = pytest.mark.skipif(cuda_host.available() is not None, reason=str(cuda_host.available()))
planned = pytest.mark.skipif(library.reason() is not None, reason=str(library.reason()))

H200 = Device(132, 227 << 10, 16, True)
MACHINES = {
    "clusters": Device(32, 100 << 10, 8, True),
    "flags": Device(32, 100 << 10, 0, True),
    "few": Device(9, 100 << 10, 0, True),  # batch tiles, waves, weights that do not fit the registers
    "small": Device(9, 12 << 10, 0, True),  # segments
    "smaller": Device(9, 8 << 10, 0, True),
    "alone": Device(4, 100 << 10, 0, False),  # CTAs that cannot wait for each other
}
SHAPES = [
    RecurrentCase("lstm", steps=4, batch=3, input=5, hidden=40, bidirectional=True, layout="lengths"),
    RecurrentCase("gru", steps=3, batch=41, input=5, hidden=20, layout="packed"),
    RecurrentCase("rnn_tanh", steps=4, batch=9, input=5, hidden=70, bidirectional=True, state=False),
    RecurrentCase("lstm", steps=3, batch=70, input=5, hidden=24, layout="lengths"),
    RecurrentCase("gru", steps=3, batch=2, input=5, hidden=130),
    RecurrentCase("rnn_relu", steps=3, batch=1, input=5, hidden=1),
    RecurrentCase("lstm", steps=2, batch=2, input=5, hidden=264, bidirectional=True),
]
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def machine(monkeypatch):
    def choose(name: str, precision: str = "ieee") -> None:
        monkeypatch.setattr(cuda_host, "device", MACHINES[name])
        monkeypatch.setattr(cuda_host, "precision", precision)

    return choose


def results(battery: RecurrentBattery, inputs: dict, backend: str, backward: bool = True) -> dict[str, torch.Tensor]:
    with fastseq.use_backend(backend):
        outputs = battery.run(inputs)
        gradients = battery.gradients(outputs, inputs) if backward else {}
        return {f"output {i}": out for i, out in enumerate(outputs)} | gradients


def expected(battery: RecurrentBattery, case: RecurrentCase, inputs: dict, precision: str) -> tuple[dict, dict, float]:
    """The fp64 truth, what PyTorch makes of it in this dtype, and its error in this precision, if that is another one."""
    outputs, grads = battery.truth(inputs)
    truth = {f"output {i}": out for i, out in enumerate(outputs)} | grads
    # TF32 keeps as many bits as fp16
    own = pooled_error(by_equations(battery, battery.make(case, torch.float16)), truth) if precision == "tf32" else 0.0
    return truth, by_equations(battery, inputs), own


def by_equations(battery: RecurrentBattery, inputs: dict) -> dict[str, torch.Tensor]:
    outputs = recurrent_equations.layers(inputs, SEED)
    return {f"output {i}": out for i, out in enumerate(outputs)} | battery.gradients(outputs, inputs)


def refusals(case: RecurrentCase, precision: str) -> list[str]:
    battery = RecurrentBattery()
    inputs = battery.make(case, PRECISIONS[precision])
    x = inputs["x"]
    return [
        reason
        for backward in (False, True)
        for reason in backends.obstacles(
            "cuda-host",
            backends.RecurrentQuery(
                "recurrent",
                x.device,
                x.dtype,
                case.cell,
                case.steps,
                1 + case.bidirectional,
                case.hidden,
                False,
                case.layout,
                False,
                case.batch,
                backward,
            ),  # fmt: skip
        )
    ]


@executed
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MACHINES)
def test_every_form(name, shape, precision, machine):
    machine(name, precision if precision in ("ieee", "tf32") else "ieee")
    against = refusals(shape, precision)
    if against:
        assert all("do not fit" in reason for reason in against)
        return
    battery, dtype = RecurrentBattery(), PRECISIONS[precision]
    inputs = battery.make(shape, dtype)
    truth, plain, own = expected(battery, shape, inputs, precision)
    found = results(battery, inputs, "cuda-host")
    if battery.gradients_jump(shape, torch.bfloat16) and precision != "ieee":
        found, plain, truth = ({name: value for name, value in r.items() if "output" in name} for r in (found, plain, truth))
    assert_all_close_to_truth(found, plain, truth, own_error=own)


@executed
@pytest.mark.parametrize(("cell", "precision"), [("lstm", "bf16"), ("gru", "ieee"), ("rnn_tanh", "tf32")])
def test_every_plan(cell, precision, machine):
    """Not only those that the model finds best."""
    machine("clusters", precision if precision in ("ieee", "tf32") else "ieee")
    case = RecurrentCase(cell, steps=3, batch=11, input=3, hidden=56, layout="lengths")
    battery = RecurrentBattery()
    inputs = battery.make(case, PRECISIONS[precision])
    truth, plain, own = expected(battery, case, inputs, precision)
    own = max(own, pooled_error(plain, truth))  # of outputs and gradients together, where a rank has no backward pass of its own
    of = [plan_of(cell, precision, backward, 11, 1, 56, MACHINES["clusters"]).of for backward in (False, True)]
    assert min(of) > 20
    for rank in range(max(of)):
        with ranked(min(rank, of[0] - 1), min(rank, of[1] - 1)):
            found = results(battery, inputs, "cuda-host", backward=rank < of[1])
        assert_all_close_to_truth(found, *({name: each[name] for name in found} for each in (plain, truth)), own_error=own)
    with ranked(of[0]), pytest.raises(RuntimeError, match=f"rank must be from 0 to {of[0] - 1}, got {of[0]}"):
        results(battery, inputs, "cuda-host")


@planned
def test_the_machines_take_every_form():
    """What test_every_form is there for: without one of these words in a plan it would not see that form."""
    plans = {}
    for name, shape, precision in itertools.product(MACHINES, SHAPES, PRECISIONS):
        for backward in (False, True):
            plan = plan_of(shape.cell, precision, backward, shape.batch, 1 + shape.bidirectional, shape.hidden, MACHINES[name])
            if not plan.obstacle:
                n = plan.numbers
                row_tiles = -(-n.units * (1 if backward else len(CELLS[shape.cell].gates)) // 16)
                plans[name, shape, precision, backward] = (
                    str(plan)
                    + ", beyond registers" * (n.k_tiles * n.k_segments > 32)
                    + ", rows by turns" * (1 << n.m_bits < row_tiles)
                    + ", no power of two" * (n.units.bit_count() > 1)
                )
    words = ["cluster", "flags", "batch tiles", "segments", "wide", "at a time", "of 1 CTAs"]
    words += ["beyond registers", "no power of two"]
    for backward in (False, True):
        for word in (*words, *(("flags, partial sums", "cluster, partial sums") if backward else ("rows by turns",))):
            assert any(word in text for key, text in plans.items() if key[3] == backward), word


@executed
@pytest.mark.parametrize(
    ("name", "cell", "precision"),
    [("clusters", "lstm", "bf16"), ("flags", "gru", "ieee"), ("few", "lstm", "tf32"), ("small", "rnn_tanh", "fp16")],
)
def test_resets(name, cell, precision, machine):
    """From zeros and from states given, in lanes of both directions, of every layout."""
    machine(name, precision if precision in ("ieee", "tf32") else "ieee")
    query = backends.RecurrentQuery(
        "recurrent", torch.device("cpu"), PRECISIONS[precision], cell, 5, 2, 40, False, "padded", batch=11, resets=True
    )
    for family in families(query):
        for problem in problems_of(query, family, precision == "tf32"):
            problem.check(cuda_host, backends.reference)


@executed
@pytest.mark.parametrize("name", ("clusters", "flags", "few"))
def test_every_schedule_gives_the_same_bits(name, machine):
    machine(name)
    battery = RecurrentBattery()
    inputs = battery.make(RecurrentCase("gru", steps=5, batch=10, input=3, hidden=24, layout="lengths"), torch.float32)
    first = None
    for seed in range(24):
        cuda_host.kernels().seed(seed)
        found = results(battery, inputs, "cuda-host")
        first = first or found
        assert all(torch.equal(found[key], first[key]) for key in first), seed
    cuda_host.kernels().seed(0)


@executed
@pytest.mark.parametrize("name", ("clusters", "flags"))
def test_bytes_of_a_step(name, machine):
    """What a CTA receives in a step: states of its sequences; backward their gate gradients, or fp32 sums for its units."""
    machine(name)
    battery, host = RecurrentBattery(), cuda_host.kernels()
    case = RecurrentCase("lstm", steps=7, batch=8, input=3, hidden=64)
    inputs = battery.make(case, torch.bfloat16)

    def received(call) -> int:
        host.reset_counters()
        call()
        counters = host.counters()
        return counters["st_async_bytes" if name == "clusters" else "cp_async_bytes"]

    outputs = []
    with fastseq.use_backend("cuda-host"):
        forward = received(lambda: outputs.append(battery.run(inputs)))
        backward = received(lambda: battery.gradients(outputs[0], inputs))
    for back, bytes_received in ((False, forward), (True, backward)):
        n = plan_of("lstm", "bf16", back, 8, 1, 64, MACHINES[name]).numbers
        each = 4 * -(-n.rows // 4) * 4 if n.reduce_scatter else (1 << n.column_bits) * 2 * (4 if back else 1)  # of a unit
        assert bytes_received == case.steps * n.teams * n.ctas * case.hidden * each


@planned
@pytest.mark.parametrize("cell", recurrent.CELLS)
@pytest.mark.parametrize("device", (H200, Device(108, 163 << 10, 0, True), Device(170, 99 << 10, 8, True)), ids=str)
def test_plans_fit_the_device(device, cell):
    gates = len(CELLS[cell].gates)
    for precision, backward, batch, lanes, hidden in itertools.product(
        PRECISIONS, (False, True), (1, 8, 60, 300), (1, 2), (1, 63, 128, 500, 1024, 2048)
    ):
        plan = plan_of(cell, precision, backward, batch, lanes, hidden, device)
        if plan.obstacle:
            assert hidden >= 500 and f"H={hidden}" in plan.obstacle
            continue
        n = plan.numbers
        columns = 8 * n.n_tiles
        assert n.n_tiles in (1, 2 if precision == "ieee" else 4)
        least = -(-hidden // n.units)
        assert n.units % 8 == 0 and gates * n.units <= 160 and n.ctas >= least and (n.cluster or n.ctas == least)
        assert n.teams == lanes * n.parts
        row_tiles = -(-(n.units * n.ctas if n.reduce_scatter else n.units * (1 if backward else gates)) // 16)
        assert n.k_warps << n.m_bits <= 8
        assert 1 << n.m_bits >= row_tiles or n.k_segments == 1
        depth = gates * n.units * (1 if n.reduce_scatter else n.ctas) if backward else hidden
        assert n.k_tiles * n.k_warps * n.k_segments * (16 if precision in ("fp16", "bf16") else 8) >= depth
        assert n.shared_bytes <= device.shared_bytes and 0 < n.teams_at_once <= n.teams
        assert n.parts * n.rows >= batch > (n.parts - 1) * n.rows and n.rows <= n.batch_tiles * columns
        assert 1 << n.column_bits >= (columns if n.batch_tiles > 1 else n.rows)
        if n.cluster:
            assert n.ctas <= device.cluster and n.ctas.bit_count() == 1 and n.batch_tiles == 1 and n.operand_bytes == 0
        else:
            assert n.teams_at_once * n.ctas <= device.multiprocessors
        assert plan.step_us > 0


@planned
def test_plans_for_a_hopper():
    """The shapes that the kernels exist for keep their weights on the device, with the exchange that fits them."""
    for batch in (1, 8):
        for units in (16, 24, 32):
            text = str(plan_of("lstm", "bf16", False, batch, 1, 16 * units, H200))
            assert f"teams of 16 CTAs with {units} units each for {min(batch, 2)} sequences, cluster (" in text
    for cell, precision in itertools.product(("lstm", "gru"), ("fp16", "bf16", "tf32")):
        for hidden, batch in itertools.product((256, 512, 1024), (1, 16, 64, 256)):
            for backward in (False, True):
                assert not plan_of(cell, precision, backward, batch, 1, hidden, H200).obstacle
    assert "flags" in str(plan_of("lstm", "bf16", False, 1, 1, 2048, H200))
    assert "for 4 sequences, cluster, partial sums (" in str(plan_of("lstm", "bf16", True, 64, 1, 256, H200))
    assert "for 32 sequences, 4 batch tiles, flags, partial sums (" in str(plan_of("lstm", "tf32", True, 64, 1, 1024, H200))
    assert plan_of("lstm", "tf32", False, 1, 1, 2048, H200).obstacle


@planned
def test_the_planner_refuses_nonsense():
    plan = torch.ops.fastseq_native.recurrent_plan
    with pytest.raises(RuntimeError, match="no CUDA kernel for cell slstm"):
        plan("slstm", "fp16", False, 1, 1, 8, [1, 1 << 15, 0, 1])
    with pytest.raises(RuntimeError, match="fp64 is none of fp16, bf16, tf32, ieee"):
        plan("lstm", "fp64", False, 1, 1, 8, [1, 1 << 15, 0, 1])
    for sizes, device in (((0, 1, 8), [1, 1, 0, 1]), ((1, 1, 8), [1, 1]), ((1 << 16, 1, 1 << 16), [1, 1, 0, 1])):
        with pytest.raises(RuntimeError, match="sizes must be positive"):
            plan("lstm", "fp16", False, *sizes, device)


@planned
def test_reasons_against_a_call():
    def against(**changes) -> list[str]:
        facts = {
            "op": "recurrent", "device": torch.device("cpu"), "dtype": torch.float32, "cell": "lstm", "steps": 4, "lanes": 1,
            "hidden": 16, "projected": False, "layout": "padded",
        }  # fmt: skip
        return recurrent.obstacles(backends.RecurrentQuery(**facts | changes), cuda_host.MACHINE)

    assert against() == []
    assert against(cell="slstm") == ["cell slstm is not one of rnn_tanh, rnn_relu, lstm, gru"]
    assert against(dtype=torch.float64) == ["dtype float64 is not one of float16, bfloat16, float32"]
    assert against(projected=True) == ["a projection (proj_size) is not in its kernels"]
    assert against(zoned=True) == ["zoneout is not in its kernels"]
    assert against(lanes=64) == ["64 lanes are more than 63"]
    (reason,) = against(hidden=4096)
    assert reason.startswith("its recurrent weights do not fit") and "H=4096" in reason


def test_without_measurements_it_runs_if_asked_for(monkeypatch):
    """What torch has no kernel for is Triton's."""
    monkeypatch.setenv("FASTSEQ_SELF_CHECK", "0")
    query = backends.RecurrentQuery("recurrent", torch.device("cuda"), torch.float32, "lstm", 4, 1, 16, False, "padded")
    monkeypatch.setattr(sources, "device_of", lambda device: choice_device.Device("cuda", "NVIDIA H999", "9.9", 0))
    monkeypatch.setattr(cuda, "available", lambda: None)
    monkeypatch.setattr(cuda, "why_not", lambda query: [])
    monkeypatch.setattr(backends.triton, "available", lambda: None)
    assert backends.select(query).name == "triton"
    with fastseq.use_backend("cuda"):
        assert backends.select(query).name == "cuda"


@executed
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_the_gpu_is_given_the_same_arguments(direction, monkeypatch):
    """The native op takes them by the names that the host's kernels are given."""
    given = {}
    run = cuda_host.MACHINE.run

    def watch(way, cell, precision, plan, arguments):
        given[way] = set(arguments)
        run(way, cell, precision, plan, arguments)

    monkeypatch.setattr(cuda_host, "MACHINE", cuda_host.MACHINE._replace(run=watch))
    with fastseq.use_backend("cuda-host"):
        fastseq.GRU(3, 4)(torch.randn(2, 2, 3))[0].sum().backward()
    schema = getattr(torch.ops.fastseq_native, f"recurrent_cuda_{direction}").default._schema
    assert {argument.name for argument in schema.arguments} == {"cell", "precision", "plan", *given[direction]}


@planned
def test_a_plan_has_the_same_fields_in_both_languages():
    assert fields() == Numbers._fields
    plan = plan_of("lstm", "fp16", True, 8, 2, 512, H200)
    assert plan.native == list(plan.numbers)


@executed
def test_explain_shows_the_plan():
    module = fastseq.GRU(8, 64)
    with fastseq.use_backend("cuda-host"):
        text = str(fastseq.explain(module, torch.randn(3, 2, 8)))
    assert ": cuda-host, 2 teams of 8 CTAs with 8 units each for 1 sequences, cluster (a model predicts" in text


@executed
def test_sequences_of_length_zero_and_none_of_full_length():
    torch.manual_seed(0)
    params = [p.detach() for p in torch.nn.LSTM(3, 12).parameters()]
    x, lengths = torch.randn(6, 4, 3), torch.tensor([0, 3, 1, 0])
    with fastseq.use_backend("cuda-host"):
        y, h, c = F.lstm(x, None, params, lengths=lengths)
    with fastseq.use_backend("reference"):
        expected = F.lstm(x, None, params, lengths=lengths)
    for actual, wanted in zip((y, h, c), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
