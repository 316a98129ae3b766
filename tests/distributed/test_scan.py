"""Scans, and layers made of them, over ranks are those of one process: outputs, final states, and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastseq
from fastseq.distributed import context_parallel, sum_gradients
from fastseq.distributed import scan as across
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


def same_bits(group: Any) -> None:
    for run, case in ((scanned, "all"), (layered, "min gru"), (layered, "qrnn, two steps")):
        first, second = run(case, group), run(case, group)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), case


def test_the_same_bits_every_time(ranks):
    ranks.run(same_bits)


def cut_off(group: Any) -> None:
    """What is before a reset on another rank does not count, be it NaN; coefficients may multiply to infinity if h is zero."""
    rank = dist.get_rank(group)
    b, a = torch.ones(2, 1, 2, dtype=torch.float64), torch.full((2, 1, 2), 0.5, dtype=torch.float64)
    if rank == 0:
        b[:] = torch.nan
    resets = torch.tensor([[rank == 1], [False]])
    for reverse in (False, True):
        given = b.clone().requires_grad_()
        with context_parallel(group):
            h, final = scan(given, a, resets=resets, reverse=reverse)
        assert h.isfinite().all() == bool(rank) and (final.isfinite().all() or reverse)
        if rank == 0:
            h = h.nan_to_num()
        h.sum().backward()
        assert given.grad.isfinite().all() or rank == 0
    zeros, huge = torch.zeros(2, 1, 2), torch.full((2, 1, 2), 1e30)
    with context_parallel(group):
        h, final = scan(zeros, huge)
    assert (h == 0).all() and (final == 0).all()


def test_what_is_cut_off_may_be_anything(ranks):
    ranks.run(cut_off)


def refused(group: Any, kind: type[Exception], text: str, call: Any, **options: Any) -> None:
    """By this rank, as by all others, in the same words."""
    try:
        with context_parallel(group, **options):
            call()
    except kind as error:
        said = str(error)
    else:
        raise AssertionError(f"nothing was raised, expected {kind.__name__}: {text}")
    assert text in said, said
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, said, group=group)
    assert len(set(every)) == 1, every


def refusals(group: Any) -> None:
    rank = dist.get_rank(group)
    b, a = torch.randn(2, B, C), torch.rand(2, B, C)
    wide = torch.randn(2, B, C + rank)
    refused(
        group,
        RuntimeError,
        "rank 0 has [.., 3, 4] torch.float32 on cpu, rank 1 has [.., 3, 5]",
        lambda: scan(wide, wide.sigmoid()),
    )
    refused(group, RuntimeError, "reverse: rank 0 has False, rank 1 has True", lambda: scan(b, a, reverse=bool(rank)))
    refused(group, RuntimeError, "given: rank 0 has ['b', 'a']", lambda: scan(b, a, initial=b[0] if rank else None))
    refused(group, RuntimeError, "wants gradients: rank 0 has False", lambda: scan(b.clone().requires_grad_(bool(rank)), a))
    refused(group, RuntimeError, "lengths must lie in [0, 4]", lambda: scan(b, a, lengths=torch.tensor([1, 5, 0])))
    refused(group, RuntimeError, "lengths: rank 0 has [1, 2, 0]", lambda: scan(b, a, lengths=torch.tensor([1, 2 + rank, 0])))
    refused(group, ValueError, "must be one run", lambda: scan(b, a), sharding="zigzag")
    refused(group, ValueError, "cu_seqlens do not go with", lambda: scan(b[:, 0], a[:, 0], cu_seqlens=torch.tensor([0, 2])))
    unit, x = fastseq.RGLRU(C, C, bidirectional=True), torch.randn(2, B, C)
    resets = torch.zeros(2, B, dtype=torch.bool)
    refused(group, NotImplementedError, "RG-LRU that goes backwards", lambda: unit(x, resets=resets))
    refused(group, NotImplementedError, "RG-LRU that goes backwards", lambda: unit(x, lengths=torch.tensor([4, 1, 0])))


def test_what_it_cannot_do_is_refused_by_all(ranks):
    ranks.run(refusals)


def failures(group: Any) -> None:
    """A rank that raises while it computes goes on with what the others wait for."""
    rank, forward, backward = dist.get_rank(group), across._forward_op, across._backward_op
    b, a = torch.randn(2, B, C, requires_grad=True), torch.rand(2, B, C)

    def failing(*_: Any) -> Any:
        raise RuntimeError("no more memory")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(across, "_forward_op", failing)
        refused(group, RuntimeError, "rank 1: no more memory", lambda: scan(b, a))
    with context_parallel(group):
        h, _ = scan(b, a)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(across, "_backward_op", failing)
        with pytest.raises(RuntimeError, match="rank 1: no more memory"):
            h.sum().backward()
    assert (across._forward_op, across._backward_op) == (forward, backward)


def test_an_error_on_one_rank_reaches_all(ranks):
    ranks.run(failures, size=4)


def faults(group: Any) -> None:
    """Protocols with a fault in them, each of which ``check`` must see."""
    part, exchanged = across._Part, across._exchanged
    behind, before = part.behind, part.before
    planted: dict[str, tuple[Any, str, Any, str]] = {
        "what is before a rank is forgotten": (part, "behind", lambda self, state: self.b, "four"),
        "a reset at a border is not seen": (
            part,
            "behind",
            lambda self, state: behind(self._replace(apart=torch.zeros_like(self.apart)), state),
            "four backwards",
        ),
        "parts are those of the neighbors": (
            across,
            "_exchanged",
            lambda *args: (parts := exchanged(*args))[1:] + parts[:1],
            "four",
        ),
        "gradients are not conjugate": (
            part,
            "before",
            lambda self, gradient, of_steps: before(self._replace(a=self.a.conj()), gradient, of_steps),
            "four backwards",
        ),
        "gradients are not sent back": (
            part,
            "before",
            lambda self, gradient, of_steps: (before(self, gradient, of_steps)[0] * 0, of_steps * 0),
            "four",
        ),
    }
    for where, name, function, case in planted.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, name, function)
            with pytest.raises(AssertionError, match=f"{case}, "):
                check(group, scanned, case, SCANS[case][-1])
        check(group, scanned, case, SCANS[case][-1])


def test_faults_are_seen(ranks):
    ranks.run(faults, size=4)
