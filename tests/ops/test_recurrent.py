"""The recurrent op, on every backend of this machine: the battery, and what only a recurrence can get wrong."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import functional as F
from fastseq.backends.cpu.recurrent import CELLS as NATIVE
from fastseq.cells import CELLS
from fastseq.ops.types import state_dtype
from fastseq.testing import assert_close_to_truth
from support import recurrent_equations
from support.cases import RECURRENT_CASES, RecurrentCase
from support.recurrent import RecurrentBattery


class TestRecurrent(RecurrentBattery):
    # what only a recurrence can get wrong

    def test_cells_of_every_step(self, backend):
        """c of every step, with its gradient, against a loop over torch's own cell."""
        torch.manual_seed(0)
        dtype = self.widest(backend)
        module, cell = nn.LSTM(3, 6, dtype=dtype), nn.LSTMCell(3, 6, dtype=dtype)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
        x = torch.randn(7, 2, 3, dtype=dtype, requires_grad=True)
        weights = torch.randn(7, 2, 6, dtype=dtype)
        with fastseq.use_backend(backend):
            *_, cells = F.lstm(x, None, list(module.parameters()), return_cells=True)
            (grad,) = torch.autograd.grad((cells[0] * weights).sum(), x)
        state, expected = None, []
        for x_t in x:
            state = cell(x_t, state)
            expected.append(state[1])
        (expected_grad,) = torch.autograd.grad((torch.stack(expected) * weights).sum(), x)
        torch.testing.assert_close(cells[0], torch.stack(expected))
        torch.testing.assert_close(grad, expected_grad)

    @pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
    def test_rows_do_not_touch(self, backend, cell):
        """Each row of a ragged batch gives what it gives alone, whatever stands beyond its length; length 0 leaves the state."""
        case = RecurrentCase(cell, steps=6, batch=5, hidden=9, bidirectional=True, layout="lengths")
        inputs = self.make(case, self.widest(backend))
        inputs["lengths"] = torch.tensor([6, 0, 3, 1, 4])
        with fastseq.use_backend(backend), torch.no_grad():
            outputs = self.run(inputs)
            inputs["x"][3:, 2] = torch.nan
            assert all(torch.equal(a, b) for a, b in zip(outputs, self.run(inputs), strict=True))
            for row, length in enumerate(inputs["lengths"].tolist()):
                assert not outputs[0][length:, row].any()
                states = [name for name in ("h0", "c0") if name in inputs]
                if length == 0:
                    for name, final in zip(states, outputs[1:], strict=True):
                        assert torch.equal(final[:, row], inputs[name][:, row])
                    continue
                alone = dict(inputs, x=inputs["x"][:length, row : row + 1], lengths=None)
                alone |= {name: inputs[name][:, row : row + 1] for name in states}
                y, *finals = self.run(alone)
                torch.testing.assert_close(outputs[0][:length, row], y[:, 0])
                for final, expected in zip(outputs[1:], finals, strict=True):
                    torch.testing.assert_close(final[:, row], expected[:, 0])

    @pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
    def test_large_and_not_a_number(self, backend, cell):
        """Saturated gates stay exact, NaN and infinity go where torch sends them."""
        case = RecurrentCase(cell, batch=4, hidden=20, state=False)
        inputs = self.make(case, torch.float32)
        with torch.no_grad():
            inputs["x"] *= torch.tensor([1.0, 1e4, 1e30, 1.0])[:, None]
            inputs["x"][2, 3, 1] = torch.nan
            expected = self.run_torch(inputs)
            with fastseq.use_backend(backend):
                outputs = self.run(inputs)
        for actual, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual, wanted, equal_nan=True, rtol=1e-5, atol=1e-6)

    def test_a_relu_of_nan_hands_its_gradient_on(self, backend):
        """As torch's does, and selects rather than multiplies: what is infinite beside a shut unit does not come back as NaN."""
        torch.manual_seed(0)
        module, x, dy = nn.RNN(3, 5, nonlinearity="relu"), torch.randn(2, 4, 3), torch.randn(2, 4, 5)
        h0 = torch.randn(1, 4, 5)
        h0[0, 1, 2], dy[1, 2, 0] = torch.nan, torch.inf
        params = [p.detach().requires_grad_() for p in module.parameters()]
        found = []
        ours = functools.partial(fastseq.functional.rnn, nonlinearity="relu")
        for run in (lambda *given: torch.rnn_relu(*given, True, 1, 0.0, False, False, False), ours):
            leaves = [tensor.clone().requires_grad_() for tensor in (x, h0)]
            with fastseq.use_backend(backend):
                y = run(*leaves, params)[0]
            found.append(torch.autograd.grad(y, [*leaves, *params], dy))
        for expected, actual in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-6)

    def test_beyond_65535_steps(self, backend):
        """More steps than fit 16 bits (where CUDA's vendor kernels end): as one call, and as two with the state carried over."""
        if backend in ("reference", "triton"):
            pytest.skip("a Python loop, as Triton's interpreter is, counts as far as it likes")
        torch.manual_seed(0)
        params = [p.detach() for p in nn.GRU(2, 3).parameters()]
        x = torch.randn(70_001, 2, 2, requires_grad=True)
        cut = 40_000
        with fastseq.use_backend(backend):
            y, h_n = F.gru(x, None, params)
            first, state = F.gru(x[:cut], None, params)
            second, final = F.gru(x[cut:], state, params)
            (grad,) = torch.autograd.grad(y[-1].sum() + y[5].sum(), x)
            (expected,) = torch.autograd.grad(second[-1].sum() + first[5].sum(), x)
        assert y.shape[0] == 70_001
        torch.testing.assert_close(y, torch.cat((first, second)))
        torch.testing.assert_close(h_n, final)
        torch.testing.assert_close(grad, expected)
        assert grad[:6].any() and grad[-1].any()

    def test_relu_gradients_in_bfloat16(self, backend):
        """From the same forward outputs, so that both sides agree on which units were off."""
        torch.manual_seed(0)
        weight = torch.randn(2, 40, 40).bfloat16() / 8
        x, w_ih = torch.randn(6, 9, 3).bfloat16(), torch.randn(80, 3).bfloat16()
        reverse = [0, 1]
        y, *_ = torch.ops.fastseq.recurrent_forward(
            x, w_ih, None, weight, *[None] * 8, "rnn_relu", reverse, 0.0, 0.0, False, False
        )
        dy = torch.randn_like(y)
        empty = y.new_empty(0)

        def dgates(dtype: torch.dtype) -> Tensor:
            return torch.ops.fastseq.recurrent_backward(
                dy.to(dtype), None, None, None, weight.to(dtype), *[None] * 8, y.to(dtype), empty.to(state_dtype(dtype)),
                empty.to(dtype), "rnn_relu", reverse, 0.0, 0.0,
            )[0]  # fmt: skip

        with fastseq.use_backend("reference"):
            truth, by_reference = dgates(torch.float64), dgates(torch.bfloat16)
        with fastseq.use_backend(backend):
            assert_close_to_truth(dgates(torch.bfloat16), by_reference, truth, "dgates")

    @pytest.mark.parametrize("batch_first_strides", (False, True))
    def test_strided_inputs(self, backend, batch_first_strides):
        """Inputs and incoming gradients of any strides and offsets."""
        torch.manual_seed(0)
        dtype = self.widest(backend)
        module = nn.LSTM(4, 5, bidirectional=True, dtype=dtype)
        x = torch.randn(3, 6, 9, dtype=dtype)[..., 2:6].transpose(0, 1) if batch_first_strides else None
        x = (torch.randn(12, 3, 4, dtype=dtype)[::2] if x is None else x).detach().requires_grad_()
        with fastseq.use_backend(backend):
            y, h, c = F.lstm(x, None, list(module.parameters()), bidirectional=True)
            (grad,) = torch.autograd.grad(y[:, :, ::2].sum() + h[:, 1].sum(), x)
        expected, (h_n, _) = module(x)
        (expected_grad,) = torch.autograd.grad(expected[:, :, ::2].sum() + h_n[:, 1].sum(), x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, expected_grad)

    def test_empty_batch(self, backend):
        module = nn.LSTM(4, 5)
        x = torch.randn(3, 0, 4, requires_grad=True)
        with fastseq.use_backend(backend):
            y, h, c = F.lstm(x, None, list(module.parameters()))
            y.sum().backward()
        assert y.shape == (3, 0, 5) and h.shape == c.shape == (1, 0, 5)
        assert x.grad is not None and x.grad.shape == x.shape
        assert module.weight_hh_l0.grad is not None and not module.weight_hh_l0.grad.any()

    def test_bad_values(self, backend):
        params = list(nn.GRU(4, 5).parameters())
        x = torch.randn(6, 2, 4)
        with fastseq.use_backend(backend):
            for lengths in ([7, 1], [-1, 2]):
                with pytest.raises(RuntimeError, match=r"lengths must lie in \[0, 6\]"):
                    F.gru(x, None, params, lengths=torch.tensor(lengths))
            for sizes in ([2, 3, 1], [4, 0], [4, 4]):
                with pytest.raises(RuntimeError, match="batch_sizes"):
                    F.gru(x[0].repeat(3, 1)[:6], None, params, batch_sizes=torch.tensor(sizes))

    def test_recomputing_gives_the_same_gradients_and_holds_less(self, backend):
        check_recomputing(RecurrentCase("lstm", steps=6, batch=4, hidden=16, input=3), backend)

    @pytest.mark.parametrize("cell", CELLS)
    def test_a_sequence_cut_in_pieces_gives_the_same_bits(self, backend, cell, monkeypatch):
        """What goes from step to step is what goes from call to call: h rounded as it is stored, the other states in fp32."""
        pieces = [(1,) * 5]
        if backend == "cpu":
            pieces = [(2, 3), (3, 2)]  # a call of one step does its product otherwise, by torch
        elif backend == "triton":
            monkeypatch.setenv("FASTSEQ_TRITON_RECURRENT", "stepwise")  # the same form for a call of one step
        row, hidden = CELLS[cell], 20
        gates = len(row.gates) * hidden
        for dtype in (torch.float32, torch.bfloat16):
            if not self.supports(RecurrentCase(cell), dtype, backend):
                continue
            torch.manual_seed(0)
            x, weight = torch.randn(5, 3, gates).to(dtype), torch.randn(1, gates, hidden).to(dtype)
            vectors = torch.randn(1, len(row.vectors) * hidden).to(dtype) if row.vectors else None
            h0 = torch.randn(1, 3, hidden).to(dtype)
            c0 = torch.rand(1, 3, row.wide_states * hidden) if row.has_c else None

            def run(x, h, c, weight=weight / 4, vectors=vectors):
                return torch.ops.fastseq.recurrent_forward(
                    x, None, None, weight, vectors, None, h, c, *[None] * 4, cell, [0], 0.0, 0.0, True, True
                )

            with fastseq.use_backend(backend):
                whole = run(x, h0, c0)
                for sizes in pieces:
                    h, c, parts = h0, c0, []
                    for piece in x.split(sizes):
                        parts.append(run(piece, h, c))
                        _, h, c_n, *_ = parts[-1]
                        c = c_n if row.has_c else None
                    assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
                    assert all(torch.equal(*pair) for pair in zip(parts[-1][1:3], whole[1:3], strict=True))
                    kept = [torch.cat([part[i] for part in parts]) for i in (3, 4)]
                    assert all(torch.equal(*pair) for pair in zip(kept, whole[3:], strict=True))

    @pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh", "peephole_lstm", "slstm"))
    def test_one_step_of_which_some_sequences_have_none(self, backend, cell):
        """The batch in any order of lengths: a sequence without a step keeps its state, and no other takes its place."""
        if backend in ("triton", "cuda-host"):
            batch, hidden = 5, 20
        else:
            batch, hidden = 32, 256
        case = RecurrentCase(cell, steps=1, batch=batch, hidden=hidden, bidirectional=True, layout="lengths")
        dtype, before = self.widest(backend), torch.get_num_threads()
        inputs = self.make(case, dtype)
        inputs["lengths"] = torch.randint(0, 2, (batch,))
        assert inputs["lengths"].any() and not inputs["lengths"].all()
        expected = recurrent_equations.layers(inputs, 0)
        expected_grads = self.gradients(expected, inputs)
        able = self.supports(case, dtype, backend)
        try:
            for threads in (1, 2) if backend == "cpu" else (before,):
                torch.set_num_threads(threads)
                with fastseq.use_backend(backend if able else "auto"):
                    outputs = self.run(inputs)
                with self.backward_of(inputs, backend):
                    grads = self.gradients(outputs, inputs)
                torch.testing.assert_close(outputs, expected)
                torch.testing.assert_close(grads, expected_grads)
        finally:
            torch.set_num_threads(before)


def check_recomputing(case: RecurrentCase, backend: str) -> None:
    battery, held, results = RecurrentBattery(), {}, {}
    for recompute in (False, True):
        inputs = battery.make(replace(case, recompute=recompute), torch.float32)
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved=saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with fastseq.use_backend(backend):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                outputs = battery.run(inputs)
            results[recompute] = [*outputs, *battery.gradients(outputs, inputs).values()]
        held[recompute] = sum(t.nbytes for t in {t.data_ptr(): t for t in saved if t.numel()}.values())
    rows, lanes = inputs["x"].shape[:-1].numel(), 2 if case.bidirectional else 1
    assert held[False] - held[True] == rows * lanes * len(CELLS[case.cell].saved) * case.hidden * 4
    torch.testing.assert_close(results[True], results[False])


@pytest.mark.parametrize("layout", ("padded", "lengths", "packed"))
@pytest.mark.parametrize(("cell", "backend"), [*((cell, "reference") for cell in CELLS), *((cell, "cpu") for cell in NATIVE)])
def test_recomputing_of_every_cell_and_layout(cell, layout, backend):
    """The states before a step are found by its place in the layout, in both directions."""
    check_recomputing(RecurrentCase(cell, steps=6, batch=4, hidden=16, input=3, bidirectional=True, layout=layout), backend)


class TestCpuKernels:
    """What is particular to the native CPU kernels: instruction sets, threads."""

    @pytest.fixture(autouse=True)
    def native(self):
        with fastseq.use_backend("cpu"):
            yield

    @pytest.mark.parametrize("level", ("default", "avx2", "avx512", "avx512_bf16", "amx"))
    @pytest.mark.parametrize("dtype", TestRecurrent.DTYPES, ids=str)
    def test_every_instruction_set(self, level, dtype, monkeypatch):
        monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
        if torch.ops.fastseq_native.cpu_level() != level:
            pytest.skip(f"this processor has no {level}")
        battery = TestRecurrent()
        for case in [case for case in RECURRENT_CASES if case.cell in NATIVE][::3]:
            battery.test_forward_and_gradients(case, dtype, "cpu")

    @pytest.mark.parametrize("level", ("default", "avx2", "avx512", "avx512_bf16", "amx"))
    @pytest.mark.parametrize("dtype", TestRecurrent.DTYPES, ids=str)
    @pytest.mark.parametrize("cell", NATIVE)
    def test_short_calls_read_weights_in_place(self, cell, dtype, level, monkeypatch):
        """Few rows beside a deep product: no weights are packed. All remainders of units, depth and rows."""
        monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
        if torch.ops.fastseq_native.cpu_level() != level:
            pytest.skip(f"this processor has no {level}")
        battery = TestRecurrent()
        for steps, batch, hidden, width in ((1, 1, 67, 130), (1, 7, 45, 44), (2, 3, 53, 37), (1, 5, 99, 3), (3, 1, 34, 20)):
            for case in (
                RecurrentCase(cell, steps=steps, batch=batch, hidden=hidden, input=width),
                RecurrentCase(cell, steps=steps, batch=batch, hidden=hidden, input=width, bidirectional=True, layout="lengths"),
            ):
                battery.test_forward_and_gradients(case, dtype, "cpu")

    @pytest.mark.parametrize("cell", NATIVE)
    def test_rows_of_tensors_are_multiplied_as_they_lie(self, cell):
        """By AMX: x, and y as the state before a step. With lengths it is copies of the same numbers that are multiplied."""
        if torch.ops.fastseq_native.cpu_level() != "amx":
            pytest.skip("this processor has no AMX")
        battery, before = TestRecurrent(), torch.get_num_threads()
        sizes = [(5, 32, 64, 32), (4, 40, 32, 96), (3, 1, 96, 64), (4, 20, 64, 33), (4, 17, 64, 32), (4, 16, 40, 32)]
        sizes += [(3, 32, 512, 64)]  # whose input is projected before
        try:
            for threads, (steps, batch, hidden, width) in product((1, 2), sizes):
                torch.set_num_threads(threads)
                case = RecurrentCase(cell, steps=steps, batch=batch, hidden=hidden, input=width, bidirectional=True)
                for resets in ("", "states"):
                    inputs = battery.make(replace(case, resets=resets), torch.bfloat16)
                    with torch.no_grad():
                        found = battery.run(inputs)
                        wanted = battery.run(inputs | {"lengths": torch.full((batch,), steps)})
                    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), (threads, str(case), resets)
        finally:
            torch.set_num_threads(before)

    def test_raw_op_refuses_what_does_not_fit(self):
        """The kernels trust sizes and dtypes, so the native op checks them whoever calls it."""
        x, w_ih, weight = torch.randn(3, 2, 4), torch.randn(15, 4), torch.randn(1, 15, 5)
        y, h_n, empty = torch.empty(3, 2, 1, 5), torch.empty(1, 2, 5), torch.empty(0)

        def call(x=x, w_ih=w_ih, weight=weight, vectors=None, projection=None, ragged=(), gates=empty, cell="gru"):
            ragged = [*ragged, *[None] * (7 - len(ragged))]
            torch.ops.fastseq_native.recurrent_forward(
                x, w_ih, None, None, weight, vectors, projection, None, None, *ragged, cell, 0, 0.0, 0.0, False, y, h_n, empty,
                empty, gates,
            )  # fmt: skip

        call()
        mask = torch.zeros(3, 2, 1, 5, dtype=torch.bool)
        for wrong, message in (
            ({"x": x[:, :, :3].contiguous()}, "w_ih must have 45 elements, got 60"),
            ({"w_ih": w_ih.double()}, "w_ih has a wrong dtype"),
            ({"weight": torch.randn(1, 5, 15).mT}, "weight must be contiguous"),
            ({"vectors": torch.randn(1, 4)}, "vectors must have 5 elements, got 4"),
            ({"projection": torch.randn(1, 5, 5)}, "cell gru has no projection"),
            ({"ragged": (None, None, mask[..., 1:].contiguous())}, "hold_h must have 30 elements, got 24"),
            ({"ragged": (None, None, mask.float())}, "hold_h has a wrong dtype"),
            ({"ragged": (None, None, None, mask)}, "hold_c must have 0 elements, got 30"),
            ({"ragged": (*[None] * 4, mask)}, "resets must have 6 elements, got 30"),
            ({"ragged": (*[None] * 4, mask.float())}, "resets has a wrong dtype"),
            ({"ragged": (*[None] * 5, torch.zeros(1, 2, 4))}, "reset_h must have 10 elements, got 8"),
            ({"gates": torch.empty(30)}, "gates must have 120 elements, got 30"),
            ({"cell": "layer_norm_gru", "vectors": torch.randn(1, 5)}, "vectors must have 20 elements, got 5"),
            ({"cell": "minimal_gru"}, "cell minimal_gru is none of rnn_tanh, .*, slstm"),
            ({"x": None}, "either x and w_ih"),
        ):
            with pytest.raises(RuntimeError, match=message):
                call(**wrong)

    def test_unknown_instruction_set(self, monkeypatch):
        monkeypatch.setenv("FASTSEQ_CPU_LEVEL", "sse9")
        with pytest.raises(RuntimeError, match="FASTSEQ_CPU_LEVEL=sse9"):
            F.gru(torch.randn(2, 1, 4), None, list(nn.GRU(4, 5).parameters()))

    @pytest.mark.parametrize("threads", (1, 2, 3, 5))
    @pytest.mark.parametrize("hidden,batch", ((320, 1), (256, 3), (64, 40)))
    def test_threads_share_a_step(self, threads, hidden, batch):
        """Teams with and without a barrier, more threads than cores, parts that do not divide the batch."""
        battery, before = TestRecurrent(), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            case = RecurrentCase("lstm", steps=6, batch=batch, input=40, hidden=hidden, layout="lengths")
            cases = [
                case,
                replace(case, cell="gru", layout="packed"),
                replace(case, cell="rnn_tanh"),
                replace(case, projection=40),
            ]
            for case in cases:
                battery.test_forward_and_gradients(case, torch.float32, "cpu")
        finally:
            torch.set_num_threads(before)

    def test_fewer_threads_than_asked_for(self):
        """A thread that stands for several participants of a team counts for all of them at its barrier, or nobody gets past."""
        code = """
import torch
torch.set_num_threads(4)
import fastseq
from fastseq import functional as F
torch.manual_seed(0)
for module, call in ((torch.nn.LSTM, F.lstm), (torch.nn.GRU, F.gru)):
    params = list(module(40, 320).parameters())
    x = torch.randn(6, 2, 40, requires_grad=True)
    results = []
    for backend in ("cpu", "reference"):
        with fastseq.use_backend(backend):
            y, *_ = call(x, None, params)
            results.append((y, *torch.autograd.grad(y.sum(), [x, *params])))
    torch.testing.assert_close(*results)
print("done")
"""
        environment = os.environ | {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "done", done.stderr

    def test_concurrent_callers(self):
        """Several Python threads, each with a team of its own, neither mix nor wait for one another for ever."""
        torch.manual_seed(0)
        module = nn.GRU(32, 320)
        params = [p.detach() for p in module.parameters()]
        x = torch.randn(20, 1, 32)
        expected = F.gru(x, None, params)[0]
        wrong: list[int] = []

        def work(index: int) -> None:
            for _ in range(5):
                if not torch.equal(F.gru(x, None, params)[0], expected):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong

    def test_tanh_keeps_small_arguments(self):
        """Relative, not only absolute, accuracy near zero, where a formula through exp cancels."""
        x = torch.logspace(-20, 0, 64).repeat(2)[:, None, None] * torch.tensor([1.0])
        params = [torch.ones(1, 1), torch.zeros(1, 1)]
        y, _ = F.rnn(x, None, params, has_biases=False)
        truth = x.double().tanh()
        assert ((y.double() - truth).abs() / truth).max() < 4 * torch.finfo(torch.float32).eps

    def test_bfloat16_keeps_the_cell_state_in_float32(self):
        torch.manual_seed(0)
        x = torch.randn(50, 2, 4)
        module = nn.LSTM(4, 8)
        half = [p.detach().bfloat16() for p in module.parameters()]
        *_, cells = F.lstm(x.bfloat16(), None, half, return_cells=True)
        exact = [p.double() for p in half]
        *_, truth = F.lstm(x.bfloat16().double(), None, exact, return_cells=True)
        torch_result, _ = nn.LSTM(4, 8, dtype=torch.bfloat16)(x.bfloat16())
        assert cells.dtype == torch_result.dtype
        assert_close_to_truth(cells, truth.bfloat16(), truth, "c", 4)
