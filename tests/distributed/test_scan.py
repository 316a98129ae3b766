"""Scans, and layers made of them, over ranks are those of one process: outputs, final states, and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastseq
from fastseq.distributed import context_parallel, sum_gradients
from fastseq.functional import scan

B, C = 3, 4

# name: dtype, shape of a behind its time, what the call has beside b and a, steps of the ranks
SCANS: dict[str, tuple[torch.dtype, tuple[int, ...], str, tuple[int, ...]]] = {
    "plain": (torch.float64, (B, C), "", (3, 2)),
    "all": (torch.float64, (B, C), "initial resets lengths", (4, 3)),
    "backwards": (torch.float64, (B, C), "initial resets lengths reverse", (3, 4)),
    "logarithms": (torch.float64, (B, C), "log initial reverse", (2, 2)),
    "logarithms, shared": (torch.float64, (1, C), "log initial", (2, 2)),
    "of channels": (torch.float64, (C,), "initial reverse", (2, 3)),
    "complex": (torch.complex128, (B, C), "initial resets reverse", (3, 3)),
    "blocks": (torch.float64, (B, C, 2, 2), "initial resets", (3, 3)),
    "blocks backwards": (torch.float64, (B, C, 2, 2), "initial lengths reverse", (3, 3)),
    "four": (torch.float64, (B, C), "initial resets lengths", (2, 1, 3, 2)),
    "four backwards": (torch.complex128, (B, C), "initial resets lengths reverse", (2, 1, 3, 2)),
    "fewer steps than ranks": (torch.float64, (B, C), "initial resets reverse", (0, 1, 0, 1)),
    "the first without steps": (torch.float64, (B, C), "initial", (0, 0, 2, 1)),
    "the last without steps": (torch.float64, (B, C), "initial resets reverse", (1, 2, 0, 0)),
    "no steps": (torch.float64, (B, C), "initial", (0, 0)),
}

LAYERS: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "min gru": ("MinGRU", {"num_layers": 2, "bidirectional": True}, "hx resets lengths", (3, 3)),
    "min lstm": ("MinLSTM", {"bidirectional": True, "batch_first": True}, "resets", (2, 3)),
    "hgrn": ("HGRN", {"num_layers": 2, "bidirectional": True}, "hx lengths", (2, 2)),
    "rg-lru": ("RGLRU", {"num_layers": 2, "heads": 2}, "resets", (3, 2)),
    "rg-lru, both ways": ("RGLRU", {"bidirectional": True}, "hx lengths", (3, 2)),
    "qrnn": ("QRNN", {"pooling": "ifo", "bidirectional": True}, "hx resets", (2, 3)),
    "qrnn, two steps": ("QRNN", {"window": 2, "num_layers": 2, "bidirectional": True}, "hx resets lengths", (3, 3)),
    "lru": ("LRU", {"bidirectional": True}, "hx lengths resets", (2, 3)),
    "min gru, four": ("MinGRU", {"num_layers": 2, "bidirectional": True}, "hx resets lengths", (1, 2, 0, 3)),
    "qrnn, two steps, four": ("QRNN", {"window": 2, "bidirectional": True}, "resets lengths", (1, 0, 2, 3)),
    "rg-lru, one step": ("RGLRU", {"bidirectional": True}, "", (0, 0, 1, 0)),
}


def steps_of(sizes: tuple[int, ...], group: Any) -> slice:
    if group is None:
        return slice(0, sum(sizes))
    rank = dist.get_rank(group)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def borders(resets: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """With a row that is reset at the first step of every rank."""
    for border in torch.tensor(sizes).cumsum(0)[:-1].tolist():
        resets[border : border + 1, 1] = True
    return resets


def summed(tensor: Tensor, group: Any) -> Tensor:
    real = torch.view_as_real(tensor).clone() if tensor.is_complex() else tensor.clone()
    if group is not None:
        dist.all_reduce(real, group=group)
    return torch.view_as_complex(real) if tensor.is_complex() else real


def scanned(case: str, group: Any = None) -> dict[str, Tensor]:
    dtype, shape, extra, sizes = SCANS[case]
    torch.manual_seed(len(case))
    total, own = sum(sizes), steps_of(sizes, group)
    blocks = len(shape) > 2
    b = torch.randn(total, B, C, *[2] * blocks, dtype=dtype)
    a = torch.randn(total, *shape, dtype=dtype) * 0.7
    if "log" in extra:
        a = -a.abs()
    weights = torch.randn(b.shape, dtype=dtype)
    given: dict[str, Any] = {"reverse": "reverse" in extra}
    if "initial" in extra:
        given["initial"] = torch.randn(b.shape[1:], dtype=dtype).requires_grad_()
    if "resets" in extra:
        given["resets"] = borders(torch.rand(total, B) < 0.3, sizes)[own]
    if "lengths" in extra:
        given["lengths"] = torch.tensor([total, max(total - 3, 0), 1])
    of_steps = a.shape[0] == total and case != "of channels"
    b, a = b[own].clone().requires_grad_(), (a[own] if of_steps else a[0]).clone().requires_grad_()
    coefficients = {"log_a" if "log" in extra else "a": a}
    if group is None:
        h, final = scan(b, **coefficients, **given)
    else:
        with context_parallel(group):
            h, final = scan(b, **coefficients, **given)
    share = 1 if group is None else len(sizes)
    ((h * weights[own]).real.sum() + (final * final).real.sum() / share).backward()
    found = {"h": h, "final": final, "db": b.grad, "da": a.grad if of_steps else summed(a.grad, group)}
    if "initial" in given:
        found["dinitial"] = summed(given["initial"].grad, group)
    return {name: tensor.detach() for name, tensor in found.items()}


def layered(case: str, group: Any = None) -> dict[str, Tensor]:
    kind, options, extra, sizes = LAYERS[case]
    torch.manual_seed(len(case))
    total, own = sum(sizes), steps_of(sizes, group)
    module = getattr(fastseq, kind)(3, C, dtype=torch.float64, **options)
    x = torch.randn(total, B, 3, dtype=torch.float64)
    _, h_n = module(x.transpose(0, 1) if module.batch_first else x)
    weights = torch.randn(total, B, 2 * C, dtype=torch.float64)
    states = [torch.randn_like(state) for state in (h_n if isinstance(h_n, tuple) else (h_n,))]
    given: dict[str, Any] = {}
    if "hx" in extra:
        for state in states:
            state.requires_grad_()
        given["hx"] = tuple(states) if isinstance(h_n, tuple) else states[0]
    if "resets" in extra:
        given["resets"] = borders(torch.rand(total, B) < 0.3, sizes)[own]
    if "lengths" in extra:
        given["lengths"] = torch.tensor([total, max(total - 2, 0), 1])
    x = x[own].clone().requires_grad_()
    seen = x
    if module.batch_first:
        seen, given["resets"] = x.transpose(0, 1), given["resets"].T
    if group is None:
        output, h_n = module(seen, **given)
    else:
        with context_parallel(group):
            output, h_n = module(seen, **given)
    output = output.transpose(0, 1) if module.batch_first else output
    finals = h_n if isinstance(h_n, tuple) else (h_n,)
    share = 1 if group is None else len(sizes)
    loss = (output * weights[own][..., : output.shape[-1]]).sum() + sum((f * f).real.sum() for f in finals) / share
    loss.backward()
    if group is not None:
        sum_gradients(module, group)
    found = {"h": output, "db": x.grad} | {f"final {i}": state for i, state in enumerate(finals)}
    found |= {f"d {name}": parameter.grad for name, parameter in module.named_parameters()}
    if "hx" in given:
        found |= {f"dhx {i}": summed(state.grad, group) for i, state in enumerate(states)}
    return {name: tensor.detach() for name, tensor in found.items()}


def check(group: Any, run: Any, case: str, sizes: tuple[int, ...]) -> None:
    """To rounding: what a rank's steps make of the state before them is multiplied at once, not step by step."""
    own, whole, steps = run(case, group), run(case), steps_of(sizes, group)
    assert own.keys() == whole.keys()
    for name, tensor in own.items():
        of_steps = name in ("h", "db") or (name == "da" and whole[name].shape != tensor.shape)
        expected = whole[name][steps] if of_steps else whole[name]
        assert tensor.shape == expected.shape, f"{case}, {name}"
        scale = max(1.0, whole[name].abs().max().item()) if whole[name].numel() else 1.0
        error = (tensor - expected).abs().max().item() if tensor.numel() else 0.0
        assert error <= 1000 * torch.finfo(torch.float64).eps * scale, f"{case}, {name}: {error:.2e} of {scale:.2e}"


def check_all(group: Any, size: int) -> None:
    for case, (*_, sizes) in SCANS.items():
        if len(sizes) == size:
            check(group, scanned, case, sizes)
    for case, (*_, sizes) in LAYERS.items():
        if len(sizes) == size:
            check(group, layered, case, sizes)


@pytest.mark.parametrize("size", [2, 4])
def test_is_what_one_process_computes(ranks, size):
    ranks.run(check_all, size, size=size)
