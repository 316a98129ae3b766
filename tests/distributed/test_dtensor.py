"""DTensors through the ops: results and gradients are those of whole tensors, and what is sharded by rows, heads or channels is
not gathered on the way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastseq
from fastseq.distributed import context_parallel, shard_sequence, sum_gradients
from fastseq.functional import attention, scan

B, HEADS, T, E = 4, 4, 5, 6


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return (attention(q, k, v, layout="bhsd", attn_bias=bias, causal=True),)


def windowed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
    return (attention(q, k, v, layout="bhsd", window_size=(2, 1), sinks=sinks),)


def scanned(b: Tensor, a: Tensor, initial: Tensor) -> tuple[Tensor, ...]:
    return scan(b, a * 0.5, initial=initial)


def gated(b: Tensor, a: Tensor, initial: Tensor) -> tuple[Tensor, ...]:
    return scan(b, log_a=-a.abs(), initial=initial, reverse=True)


SHAPES = ((B, HEADS, T, E), (B, 2, T, E), (B, 2, T, E))
SCAN = ((T, B, E), (T, B, E), (B, E))
# what runs, shapes, placements of each tensor, whether nothing is gathered
CASES: dict[str, tuple[Any, tuple[tuple[int, ...], ...], tuple[Any, ...], bool]] = {
    "attention by rows": (attended, (*SHAPES, (B, 1, T, T)), (Shard(0),) * 4, True),
    "attention by rows, shared bias": (attended, (*SHAPES, (1, HEADS, T, T)), (*(Shard(0),) * 3, Replicate()), True),
    "attention by heads": (attended, (*SHAPES, (1, HEADS, T, T)), (Shard(1),) * 4, True),
    "attention by keys": (attended, (*SHAPES, (1, 1, T, T)), (Replicate(), Shard(2), Shard(2), Replicate()), False),
    "attention by features": (attended, (*SHAPES, (1, 1, T, T)), (Shard(3), Shard(3), Shard(3), Replicate()), False),
    "sinks by heads": (windowed, (*SHAPES, (HEADS,)), (Shard(1), Shard(1), Shard(1), Shard(0)), True),
    "scan by rows": (scanned, SCAN, (Shard(1), Shard(1), Shard(0)), True),
    "scan by channels": (scanned, SCAN, (Shard(2), Shard(2), Shard(1)), True),
    "scan by steps": (scanned, SCAN, (Shard(0), Shard(0), Replicate()), False),
    "scan, shared coefficients": (scanned, ((T, B, E), (T, 1, E), (B, E)), (Shard(1), Replicate(), Shard(0)), True),
    "logarithms by rows": (gated, SCAN, (Shard(1), Shard(1), Shard(0)), True),
    "logarithms by channels": (gated, SCAN, (Shard(2), Shard(2), Shard(1)), True),
}


def check(group: Any, case: str) -> None:
    run, shapes, placements, stays = CASES[case]
    mesh = DeviceMesh.from_group(group, "cpu")
    whole = [tensor.requires_grad_() for tensor in tensors(*shapes)]
    expected = run(*whole)
    weights = tensors(*[tuple(t.shape) for t in expected])
    sum((t * w).sum() for t, w in zip(expected, weights, strict=True)).backward()
    given = [
        distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_()
        for tensor, placement in zip(whole, placements, strict=True)
    ]
    shared = [distribute_tensor(w, mesh, [Replicate()]) for w in weights]
    with CommDebugMode() as seen:
        results = run(*given)
        sums = [(t * w.redistribute(placements=t.placements)).sum() for t, w in zip(results, shared, strict=True)]
    counts = {str(name): count for name, count in seen.get_comm_counts().items() if count}
    assert not stays or not counts, f"{case}: {counts}"
    total = sum(sums).redistribute(placements=[Replicate()])
    with CommDebugMode() as seen:
        total.backward()
    gathers = {str(name): count for name, count in seen.get_comm_counts().items() if count and "gather" in str(name)}
    assert not stays or not gathers, f"{case}: {gathers}"
    for name, own, of_all in [
        *(("result", r, e) for r, e in zip(results, expected, strict=True)),
        *(("gradient", g.grad, w.grad) for g, w in zip(given, whole, strict=True)),
    ]:
        what = f"{case}, {name}"
        torch.testing.assert_close(
            own.full_tensor(), of_all, rtol=1e-12, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}"
        )


def check_all(group: Any) -> None:
    for case in CASES:
        check(group, case)


@pytest.mark.parametrize("size", [2])
def test_is_what_whole_tensors_give(ranks, size):
    ranks.run(check_all, size=size)


def remembered(group: Any) -> None:
    """What DTensor decided for a call it does not take for another one, of another number or with another tensor given."""
    mesh = DeviceMesh.from_group(group, "cpu")
    whole = tensors(*SHAPES)
    q, k, v = (distribute_tensor(tensor, mesh, [Shard(2)]) for tensor in whole)
    lengths = torch.tensor([5, 3, 1, 2], dtype=torch.int32)
    for options in ({"scale": 1.0}, {"scale": 0.25}, {"softcap": 2.0}, {"seqlens_q": lengths}, {"seqlens_k": lengths}):
        own = {name: distribute_tensor(of, mesh, [Shard(0)]) if of is lengths else of for name, of in options.items()}
        found = attention(q, k, v, layout="bhsd", **own).full_tensor()
        torch.testing.assert_close(found, attention(*whole, layout="bhsd", **options), rtol=1e-12, atol=1e-12)
    b, a, h0 = (t.requires_grad_() for t in tensors(*SCAN))
    for wanted in ((True, False, True), (False, True, False), (True, True, True)):
        for placement in (Shard(1), Shard(0)):
            given = [t.detach().requires_grad_(want) for t, want in zip((b, a, h0), wanted, strict=True)]
            placements = (placement, placement, Replicate())
            parts = [
                distribute_tensor(t.detach(), mesh, [p]).requires_grad_(t.requires_grad)
                for t, p in zip(given, placements, strict=True)
            ]
            for reverse in (False, True):
                for tensor in (*given, *parts):
                    tensor.grad = None
                scan(given[0], given[1], initial=given[2], reverse=reverse)[0].sin().sum().backward()
                scan(parts[0], parts[1], initial=parts[2], reverse=reverse)[0].sin().sum().backward()
                for one, own in zip(given, parts, strict=True):
                    assert (one.grad is None) == (own.grad is None)
                    if one.grad is not None:
                        torch.testing.assert_close(own.grad.full_tensor(), one.grad, rtol=1e-12, atol=1e-12)


def test_another_call_is_another_decision(ranks):
    ranks.run(remembered)


LAYERS: dict[str, tuple[str, dict[str, Any], str, Any]] = {
    "lstm by rows": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}, "hx lengths resets cells", Shard(1)),
    "gru by rows": ("GRU", {"num_layers": 2, "batch_first": True}, "hx", Shard(0)),
    "slstm by steps": ("SLSTM", {}, "hx", Shard(0)),
    "lstm by features": ("LSTM", {}, "", Shard(2)),
    "min gru by rows": ("MinGRU", {"num_layers": 2}, "", Shard(1)),
    "min gru by rows, no biases": ("MinGRU", {"batch_first": True, "bias": False}, "", Shard(0)),
    "min lstm by steps": ("MinLSTM", {"num_layers": 2}, "", Shard(0)),
    "hgrn by features": ("HGRN", {}, "", Shard(2)),
    "qrnn by rows": ("QRNN", {"num_layers": 2}, "", Shard(1)),
    "qrnn of two steps by rows": ("QRNN", {"num_layers": 2, "window": 2, "bidirectional": True}, "hx lengths", Shard(1)),
    "hgrn by rows": ("HGRN", {"num_layers": 2, "bidirectional": True}, "hx lengths resets", Shard(1)),
    "rg-lru by rows": ("RGLRU", {"num_layers": 2, "bidirectional": True, "heads": 2}, "hx resets", Shard(1)),
    "rg-lru by rows, batch first": ("RGLRU", {"batch_first": True, "bias": False}, "lengths", Shard(0)),
    "rg-lru by steps": ("RGLRU", {"heads": 2}, "hx", Shard(0)),
    "rg-lru by features of an input that is projected": ("RGLRU", {"heads": 2}, "hx", Shard(2)),
    "lru by rows": ("LRU", {"num_layers": 2, "bidirectional": True, "bias": True}, "hx lengths resets", Shard(1)),
    "lru by rows, batch first": ("LRU", {"batch_first": True, "state_size": 3}, "hx", Shard(0)),
    "lru by steps": ("LRU", {}, "", Shard(0)),
    "lru by features": ("LRU", {}, "hx", Shard(2)),
}


def recurred(case: str, mesh: Any = None) -> dict[str, Tensor]:
    kind, options, extra, placement = LAYERS[case]
    torch.manual_seed(1)
    module = getattr(fastseq, kind)(3, 4, dtype=torch.float64, **options)
    rows = 3  # two ranks have different numbers of them
    x = torch.randn((rows, T, 3) if module.batch_first else (T, rows, 3), dtype=torch.float64)
    with torch.no_grad():
        hx = module(x)[1]
    given: dict[str, Any] = {}
    if "lengths" in extra:
        given["lengths"] = torch.tensor([5, 0, 3])
    if "resets" in extra:
        given["resets"] = torch.rand(T, rows) < 0.3
    states = list(hx) if isinstance(hx, tuple) else [hx]
    if mesh is not None:
        module = distribute_module(module, mesh)
        x = distribute_tensor(x, mesh, [placement])
        states = [distribute_tensor(state, mesh, [Replicate()]) for state in states]
        given = {name: distribute_tensor(tensor, mesh, [Replicate()]) for name, tensor in given.items()}
    x.requires_grad_()
    for state in states:
        state.requires_grad_()
    if "hx" in extra:
        given["hx"] = tuple(states) if isinstance(hx, tuple) else states[0]
    if "cells" in extra:
        given["return_cells"] = True
    with CommDebugMode() as seen:
        output, finals, *cells = module(x, **given)
    results = [output, *(finals if isinstance(finals, tuple) else (finals,)), *cells]
    if mesh is not None and placement == Shard(0 if getattr(module, "batch_first", False) else 1):
        assert output.placements == (placement,) and not seen.get_total_counts(), "rows stay where they are"
    sum((t.abs() if t.is_complex() else t).sin().sum() for t in results).backward()
    found = {f"result {i}": t for i, t in enumerate(results)} | {"dx": x.grad}
    found |= {f"d state {i}": state.grad for i, state in enumerate(states) if "hx" in extra}
    found |= {f"d {name}": parameter.grad for name, parameter in module.named_parameters()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}


def check_layers(group: Any) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    for case in LAYERS:
        own, whole = recurred(case, mesh), recurred(case)
        assert own.keys() == whole.keys()
        for name, tensor in own.items():
            what = f"{case}, {name}"
            torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}")


def test_layers_are_what_whole_tensors_give(ranks):
    ranks.run(check_layers)


def by_channels(group: Any) -> None:
    """Heads of an RG-LRU have nothing to do with one another: ranks that divide them send nothing, forward or backward."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for batched, heads in ((True, 4), (False, 2)):
        torch.manual_seed(2)
        whole = fastseq.RGLRU(8, 8, 2, heads=heads, dtype=torch.float64)
        x, hx = (torch.randn(n, *[3] * batched, 8, dtype=torch.float64).requires_grad_() for n in (T, 2))
        resets = torch.rand(x.shape[:-1]) < 0.3

        def along_heads(name: str, module: Any, mesh: DeviceMesh) -> None:
            for own, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(own, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))

        module = distribute_module(copy.deepcopy(whole), mesh, along_heads)
        parts = [distribute_tensor(t.detach(), mesh, [Shard(t.dim() - 1)]).requires_grad_() for t in (x, hx)]
        cut = distribute_tensor(resets, mesh, [Replicate()])
        with CommDebugMode() as seen:
            output, h_n = module(parts[0], parts[1], resets=cut)
            (output.to_local().sin().sum() + h_n.to_local().cos().sum()).backward()
        assert not seen.get_total_counts(), seen.get_comm_counts()
        assert output.placements == h_n.placements == (Shard(x.dim() - 1),) or not batched
        expected, final = whole(x, hx, resets=resets)
        (expected.sin().sum() + final.cos().sum()).backward()
        pairs = [(output, expected), (h_n, final), (parts[0].grad, x.grad), (parts[1].grad, hx.grad)]
        pairs += [(own.grad, other.grad) for own, other in zip(module.parameters(), whole.parameters(), strict=True)]
        for own, other in pairs:
            torch.testing.assert_close(own.full_tensor(), other, rtol=1e-12, atol=1e-12)


def test_heads_of_an_rg_lru_are_divided_without_a_message(ranks):
    ranks.run(by_channels)


def in_two_dimensions(group: Any) -> None:
    """Rows along one dimension of a mesh, heads along the other."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    torch.manual_seed(3)
    whole, x = fastseq.RGLRU(8, 8, heads=2, dtype=torch.float64), torch.randn(T, B, 8, dtype=torch.float64, requires_grad=True)
    module = distribute_module(copy.deepcopy(whole), mesh)
    part = distribute_tensor(x.detach(), mesh, [Shard(1), Shard(2)]).requires_grad_()
    output, h_n = module(part)
    assert output.placements == (Shard(1), Shard(2)) and h_n.placements == (Shard(1), Shard(2))
    (output.sin().sum() + h_n.cos().sum()).full_tensor().backward()
    expected, final = whole(x)
    (expected.sin().sum() + final.cos().sum()).backward()
    pairs = [(output, expected), (h_n, final), (part.grad, x.grad)]
    pairs += [(own.grad, other.grad) for own, other in zip(module.parameters(), whole.parameters(), strict=True)]
    for own, other in pairs:
        torch.testing.assert_close(own.full_tensor(), other, rtol=1e-12, atol=1e-12)


def test_rows_times_heads(ranks):
    ranks.run(in_two_dimensions, size=4)


def compiled(group: Any) -> None:
    """Whole graphs, forward and backward, of layers on their shards."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for kind, options in (("GRU", {}), ("MinGRU", {}), ("RGLRU", {"heads": 2}), ("LRU", {}), ("QRNN", {"window": 2})):
        module = distribute_module(getattr(fastseq, kind)(4, 4, dtype=torch.float64, **options), mesh)
        x = distribute_tensor(tensors((T, B, 4))[0], mesh, [Shard(1)]).requires_grad_()
        found = []
        outputs = lambda x, module=module: module(x)[0]  # noqa: E731
        for call in (outputs, torch.compile(outputs, fullgraph=True, backend="aot_eager")):
            output = call(x)
            assert output.placements == (Shard(1),)
            output.sin().sum().full_tensor().backward()
            found.append([output, x.grad, *[parameter.grad for parameter in module.parameters()]])
            x.grad = None
            module.zero_grad()
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own.full_tensor(), other.full_tensor(), rtol=1e-12, atol=1e-12)


def test_layers_are_compiled_whole(ranks):
    ranks.run(compiled)


def rows_times_steps(group: Any) -> None:
    """Rows as DTensors along one dimension of a mesh, steps on the ranks of the other."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("context", "data"))
    context, data = mesh["context"], mesh["data"]
    for kind, options in (("LSTM", {"bidirectional": True}), ("MinGRU", {}), ("RGLRU", {"heads": 2}), ("LRU", {})):
        torch.manual_seed(5)
        whole, x = getattr(fastseq, kind)(4, 4, 2, dtype=torch.float64, **options), torch.randn(T, B, 4, dtype=torch.float64)
        expected = whole(x)[0]
        expected.sin().sum().backward()
        module = distribute_module(copy.deepcopy(whole), data)
        module.zero_grad()
        part = distribute_tensor(shard_sequence(x, context, dim=0), data, [Shard(1)])
        with context_parallel(context):
            output = module(part)[0]
        assert output.placements == (Shard(1),)
        output.sin().sum().backward()
        sum_gradients(module, context)
        torch.testing.assert_close(output.full_tensor(), shard_sequence(expected, context, dim=0), rtol=1e-12, atol=1e-12)
        for own, other in zip(module.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(own.grad.full_tensor(), other.grad, rtol=1e-12, atol=1e-12)
        with pytest.raises(RuntimeError, match="is a DTensor on the ranks that share the sequence"):
            sum_gradients(module, data)
        with pytest.raises(RuntimeError, match="input is a DTensor on the ranks that share the sequence"), context_parallel(data):
            module(part)
    q = distribute_tensor(tensors((B, HEADS, T, E))[0], data, [Shard(0)])
    with pytest.raises(RuntimeError, match="q is a DTensor: give this rank's own tensor"), context_parallel(context):
        attention(q, q, q, layout="bhsd")
    b = distribute_tensor(tensors((T, B, E))[0], data, [Shard(1)])
    with pytest.raises(RuntimeError, match="b is a DTensor: give this rank's own tensor"), context_parallel(context):
        scan(b, b)


def test_rows_times_steps(ranks):
    ranks.run(rows_times_steps, size=4)


def refusals(group: Any) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    x = distribute_tensor(torch.randn(T, B, 3), mesh, [Shard(1)])
    with pytest.raises(RuntimeError, match="so a parameter must be one of the same mesh, got a Parameter"):
        fastseq.LSTM(3, 4)(x)
    module = distribute_module(fastseq.LSTM(3, 4), mesh)
    with pytest.raises(RuntimeError, match="so lengths must be one of the same mesh, got a Tensor"):
        module(x, lengths=torch.full((B,), T))


def test_what_it_cannot_do_is_refused(ranks):
    ranks.run(refusals)
