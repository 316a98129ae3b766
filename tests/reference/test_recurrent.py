"""The specification against torch.nn in fp64, and its written-out backward against autograd through its forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastseq.cells import CELLS
from fastseq.reference import recurrent as reference
from fastseq.reference.cells import steps

STATES = pytest.mark.parametrize("layout", ("padded", "lengths", "packed"))


def problem(cell: str, layout: str, projection: int = 0):
    """x, w_ih, weight, bias, projection, h0, c0 in fp64 with gradients; lengths, batch_sizes. w_ih is the identity."""
    torch.manual_seed(0)
    row, lanes, hidden, batch, length = CELLS[cell], 2, 5, 4, 6
    lengths = torch.tensor([6, 4, 4, 1])
    sizes = (lengths[None] > torch.arange(length)[:, None]).sum(1)
    rows = (int(sizes.sum()),) if layout == "packed" else (length, batch)
    width = projection or hidden

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    columns = lanes * len(row.gates) * hidden
    return (
        random(*rows, columns),
        torch.eye(columns, dtype=torch.float64),
        random(lanes, len(row.gates) * hidden, width),
        random(lanes, hidden) if row.recurrent_bias else None,
        random(lanes, projection, hidden) if projection else None,
        random(lanes, batch, width),
        random(lanes, batch, hidden) if row.has_c else None,
        lengths if layout == "lengths" else None,
        sizes if layout == "packed" else None,
    )


@pytest.mark.parametrize("cell", CELLS)
def test_one_step_is_torchs_cell(cell):
    torch.manual_seed(0)
    row = CELLS[cell]
    options = {"nonlinearity": cell.removeprefix("rnn_")} if row.family == "rnn" else {}
    module = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[row.family](3, 4, dtype=torch.float64, **options)
    x, h, c = (torch.randn(2, n, dtype=torch.float64) for n in (3, 4, 4))
    x_gates = x @ module.weight_ih.T + module.bias_ih
    r = h @ module.weight_hh.T
    bias = None
    if row.recurrent_bias:
        x_gates[:, :-4] += module.bias_hh[:-4]
        bias = module.bias_hh[-4:]
    else:
        x_gates = x_gates + module.bias_hh
    h_new, c_new, saved = steps(cell).step(x_gates, r, bias, h, c if row.has_c else None)
    expected = module(x, (h, c) if row.has_c else h)
    expected_h, expected_c = expected if row.has_c else (expected, None)
    torch.testing.assert_close(h_new, expected_h)
    if row.has_c:
        torch.testing.assert_close(c_new, expected_c)
    assert (0 if saved is None else saved.shape[-1] // 4) == len(row.saved)


@pytest.mark.parametrize("cell,projection", [*((cell, 0) for cell in CELLS), ("lstm", 3)])
@STATES
def test_backward_is_the_gradient_of_forward(cell, projection, layout):
    x, w_ih, weight, bias, w_hr, h0, c0, lengths, sizes = problem(cell, layout, projection)
    reverse = [0, 1]
    y, h_n, c_n, c, gates = reference.forward(
        x, w_ih, None, weight, bias, w_hr, h0, c0, lengths, sizes, cell, reverse, True, True
    )
    outputs = [y, h_n, *((c_n, c) if CELLS[cell].has_c else ())]
    grads = [torch.randn_like(out) for out in outputs]
    dy, dh_n, dc_n, dc = [*grads, None, None][:4]
    dgates, drecurrent, dprojected, dh0, dc0 = reference.backward(
        dy, dh_n, dc_n, dc, weight, w_hr, h0, c0, lengths, sizes, y.detach(), c.detach(), gates.detach(), cell, reverse
    )
    wanted = {"x": x, "h0": h0} | ({"c0": c0} if c0 is not None else {}) | ({"bias": bias} if bias is not None else {})
    expected = dict(zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), grads), strict=True))
    torch.testing.assert_close(dgates.flatten(-2), expected["x"])
    torch.testing.assert_close(dh0, expected["h0"])
    if c0 is not None:
        torch.testing.assert_close(dc0, expected["c0"])
    if bias is not None:
        torch.testing.assert_close(drecurrent.flatten(0, -3).sum(0), expected["bias"])
    assert bool(dprojected.numel()) == bool(projection)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_sixteen_bits_are_computed_in_fp32(dtype):
    """c and the sums stay in fp32; only what is stored is rounded."""
    x, w_ih, weight, _, _, h0, c0, *_ = (None if t is None else t.detach() for t in problem("lstm", "padded"))
    low = [t.to(dtype) for t in (x, w_ih, weight, h0)]
    reverse = [0, 1]
    y, _, c_n, c, gates = reference.forward(
        low[0], low[1], None, low[2], None, None, low[3], c0.float(), None, None, "lstm", reverse, True, True
    )
    exact = [t.double() for t in low]
    truth = reference.forward(*exact[:2], None, exact[2], None, None, exact[3], c0, None, None, "lstm", reverse, True, True)
    assert (y.dtype, gates.dtype, c.dtype, c_n.dtype) == (dtype, dtype, torch.float32, torch.float32)
    torch.testing.assert_close(y.double(), truth[0], rtol=0, atol=4 * torch.finfo(dtype).eps)
    # rounding h disturbs c, but c itself is not rounded to the low dtype
    assert not torch.equal(c, c.to(dtype).float())
