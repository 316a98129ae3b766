"""The specification of a scan: against a loop over rows and steps, and its backward formula against autograd."""

from __future__ import annotations

import pytest
import torch

from fastseq.ops.types import SCAN_CELLS, ScanSpec
from fastseq.reference import scan as reference
from support.scan import SCAN_CASES, make_scan, scan_by_torch

ROUNDING = dict(rtol=1e-12, atol=1e-12)
TIME_MAJOR = [case for case in SCAN_CASES if not case.batch_first]


def problem(case):
    """Arguments of the reference: time-major, a packed batch of one row, complex numbers as such."""
    inputs = make_scan(case, torch.float64)
    b, a, gate, vector, initial = (inputs[name] for name in ("b", "a", "gate", "vector", "initial"))
    if case.kind == "complex":
        b, a, initial = (t if t is None else torch.view_as_complex(t) for t in (b, a, initial))
    resets = inputs["resets"]
    if case.layout == "packed":
        b, a, resets = b.unsqueeze(1), a.unsqueeze(1), None if resets is None else resets.unsqueeze(1)
    spec = ScanSpec(resets, inputs["lengths"], inputs["cu_seqlens"], case.cell, case.reverse)
    return inputs, (b, a, gate, vector, initial), spec


@pytest.mark.parametrize("case", TIME_MAJOR, ids=str)
def test_against_a_loop(case):
    inputs, given, spec = problem(case)
    h, final = reference.forward(*given, spec)
    h = h.squeeze(1) if case.layout == "packed" else h
    found = tuple(torch.view_as_real(t) if case.kind == "complex" else t for t in (h, final))
    torch.testing.assert_close(found, scan_by_torch(inputs), **ROUNDING)


@pytest.mark.parametrize("given_grads", [(True, True), (True, False), (False, True)], ids=["both", "h", "final"])
@pytest.mark.parametrize("case", [case for case in TIME_MAJOR if case.steps * case.batch * case.channels], ids=str)
def test_backward_formula(case, given_grads):
    """The gradients that autograd finds through the loop of the reference, where outputs are given a gradient."""
    _, given, spec = problem(case)
    b, a, gate, vector, initial = given
    outputs = reference.forward(*given, spec)
    torch.manual_seed(1)
    grads = [torch.randn_like(out) if given else None for out, given in zip(outputs, given_grads, strict=True)]
    tensors = [t for t in given if t is not None]
    used = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    expected = torch.autograd.grad([out for out, _ in used], tensors, [grad for _, grad in used])
    read = b.detach() if SCAN_CELLS[case.cell].reads_b else None
    db, da, *others = reference.backward(*grads, read, a.detach(), gate, vector, outputs[0].detach(), initial, spec)
    found = [db, da.sum_to_size(a.shape), *others]
    wanted = [grad for grad, tensor in zip(found, given, strict=True) if tensor is not None]
    torch.testing.assert_close(wanted, list(expected), **ROUNDING)
