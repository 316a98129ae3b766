"""Modules whose heads are on several ranks are what they are on one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from fastseq.distributed import context_parallel, shard_sequence, sum_gradients
from fastseq.distributed.tensor_parallel import HeadParallel

T, S, B, E, HEADS = 4, 5, 3, 8, 4

ATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "self": ({}, ""),
    "self, weights": ({"batch_first": True}, "weights"),
    "cross": ({"bias": False}, "cross per head"),
    "cross, two objects": ({}, "keys"),
    "other widths": ({"kdim": 5, "vdim": 6}, "cross mask weights"),
    "appended": ({"add_bias_kv": True, "add_zero_attn": True}, "cross padding"),
    "masks": ({}, "cross mask of heads padding"),
    "causal": ({}, "causal"),
}
RECURRENT: dict[str, tuple[str, dict[str, Any], str]] = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}, "hx lengths resets reset_to cells"),
    "gru": ("GRU", {"num_layers": 2, "batch_first": True, "recompute": True}, "hx"),
    "rnn": ("RNN", {"nonlinearity": "relu", "bidirectional": True, "bias": False}, "packed"),
    "slstm": ("SLSTM", {"num_layers": 2}, "hx"),
    "layer norm": ("LayerNormLSTM", {"num_layers": 2, "bidirectional": True, "zoneout": 0.1}, "cells"),
    "peepholes": ("PeepholeLSTM", {}, "unbatched hx"),
}


def attended(case: str, mesh: Any = None) -> dict[str, Tensor]:
    options, extra = ATTENTION[case]
    torch.manual_seed(3)
    module = fastseq.MultiheadAttention(E, HEADS, dtype=torch.float64, **options).eval()
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    inputs = [torch.randn(S if i else T, B, width, dtype=torch.float64).requires_grad_() for i, width in enumerate(widths)]
    given: dict[str, Any] = {"need_weights": "weights" in extra or "per head" in extra}
    given["average_attn_weights"] = "per head" not in extra
    if "cross" not in extra:
        inputs = inputs[:2] if "keys" in extra else inputs[:1]
    query, key, value = inputs if len(inputs) == 3 else (inputs[0], inputs[-1], inputs[-1])
    masks = []
    if "mask" in extra:
        shape = (B * HEADS, T, S) if "of heads" in extra else (T, S)
        masks.append(torch.randn(shape, dtype=torch.float64).requires_grad_())
        given["attn_mask"] = masks[0]
    if "padding" in extra:
        hidden = torch.arange(S) >= torch.tensor([S, S - 1, 2])[:, None]
        given["key_padding_mask"] = torch.zeros(B, S, dtype=torch.float64).masked_fill(hidden, -torch.inf) if masks else hidden
    if "causal" in extra:
        given |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64), "is_causal": True}
    if mesh is not None:
        module = parallelize_module(module, mesh, HeadParallel())
    if module.batch_first:
        query = key = value = inputs[0].transpose(0, 1)
    out, weights = module(query, key, value, **given)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(-1, 1, weights.numel(), dtype=out.dtype).view(weights.shape)).sum()
    loss.backward()
    found = {"out": out} | ({} if weights is None else {"weights": weights})
    found |= {f"d input {i}": tensor.grad for i, tensor in enumerate((*inputs, *masks))}
    return found | gradients(module, mesh)


def gradients(module: nn.Module, mesh: Any) -> dict[str, Tensor]:
    """Whole, in the shape of the module on one rank."""
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad if mesh is None else parameter.grad.full_tensor()
        divided = mesh is not None and grad.dim() > 1 and "out_proj" not in name and name[:2] not in ("q_", "k_", "v_", "bi")
        divided |= mesh is not None and name.startswith(("in_proj_bias", "bias_ih", "bias_hh", "bias_ln"))
        found[f"d {name}"] = grad.flatten(0, 1) if divided else grad
    return found


def recurred(case: str, mesh: Any = None) -> dict[str, Tensor]:
    kind, options, extra = RECURRENT[case]
    torch.manual_seed(4)
    module = getattr(fastseq, kind)(3, E, num_heads=HEADS, dtype=torch.float64, **options).eval()
    lanes, names = module.num_layers * (2 if module.bidirectional else 1), fastseq.cells.CELLS[module.cell].states
    batch = () if "unbatched" in extra else (B,)
    x = torch.randn(T, *batch, 3, dtype=torch.float64).requires_grad_()

    def states(*shape: int) -> list[Tensor]:
        found = [torch.randn(lanes, *shape, E, dtype=torch.float64) for _ in names]
        if len(names) > 2:
            found[2] = found[2].abs() + 1
        return [state.requires_grad_() for state in found]

    hx, anew = states(*batch), states(1)
    given: dict[str, Any] = {}
    if "hx" in extra:
        given["hx"] = tuple(hx) if len(names) > 1 else hx[0]
    if "lengths" in extra:
        given["lengths"] = torch.tensor([T, 1, 0])
    if "resets" in extra:
        given |= {"resets": torch.rand(T, B) < 0.4, "reset_to": tuple(anew)}
    if "cells" in extra:
        given["return_cells"] = True
    if mesh is not None:
        module = parallelize_module(module, mesh, HeadParallel())
    seen: Any = x.transpose(0, 1) if module.batch_first else x
    if "packed" in extra:
        seen = pack_padded_sequence(seen, torch.tensor([2, T, 1]), enforce_sorted=False)
    output, finals, *cells = module(seen, **given)
    output = output.data if isinstance(output, PackedSequence) else output
    finals = finals if isinstance(finals, tuple) else (finals,)
    results = (output, *finals, *cells)
    sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in results).backward()
    found = {f"result {i}": tensor for i, tensor in enumerate(results)} | {"dx": x.grad}
    found |= {f"d state {i}": state.grad for i, state in enumerate((*hx, *anew)) if state.grad is not None}
    return found | gradients(module, mesh)


def check(group: Any, run: Any, case: str) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    parallel, whole = run(case, mesh), run(case)
    assert parallel.keys() == whole.keys(), case
    for name, tensor in parallel.items():
        what = f"{case}, {name}"
        torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}")


def check_all(group: Any) -> None:
    for case in ATTENTION:
        check(group, attended, case)
    for case in RECURRENT:
        check(group, recurred, case)


@pytest.mark.parametrize("size", [2, 4])
def test_is_what_one_process_computes(ranks, size):
    ranks.run(check_all, size=size)


def shards(group: Any) -> None:
    """A rank holds its part of every parameter with heads, and training goes on in it."""
    mesh = DeviceMesh.from_group(group, "cpu")
    model = nn.ModuleDict({"attention": fastseq.MultiheadAttention(E, HEADS), "rnn": fastseq.GRU(E, E, num_heads=HEADS)})
    whole = {name: p.numel() for name, p in model.named_parameters()}
    parallelize_module(model, mesh, {"attention": HeadParallel(), "rnn": HeadParallel()})
    for name, parameter in model.named_parameters():
        part = 1 if name.endswith("out_proj.bias") else dist.get_world_size(group)
        assert parameter.to_local().numel() * part == whole[name], name
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.ones(T, B, E)
    before = model["rnn"](x)[0].detach()
    model["rnn"](model["attention"](x, x, x, need_weights=False)[0])[0].sum().backward()
    optimizer.step()
    assert (model["rnn"](x)[0] - before).abs().max() > 0


def test_a_rank_holds_its_part(ranks):
    ranks.run(shards)


def heads_times_steps(group: Any) -> None:
    """Heads along one dimension of a mesh, steps along the other; ``sum_gradients`` sums DTensors where they are."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("context", "heads"))
    context = mesh["context"]
    torch.manual_seed(6)
    x = torch.randn(B, S, E, dtype=torch.float64)
    for whole, call in (
        (fastseq.MultiheadAttention(E, HEADS, batch_first=True).double(), lambda m, x: m(x, x, x, need_weights=False)[0]),
        (fastseq.LSTM(E, E, 2, batch_first=True, num_heads=HEADS, dtype=torch.float64), lambda m, x: m(x)[0]),
    ):
        module = parallelize_module(copy.deepcopy(whole), mesh["heads"], HeadParallel())
        expected = call(whole, x)
        expected.sin().sum().backward()
        with context_parallel(context):
            output = call(module, shard_sequence(x, context, dim=1))
        output.sin().sum().backward()
        sum_gradients(module, context)
        torch.testing.assert_close(output, shard_sequence(expected, context, dim=1), rtol=1e-12, atol=1e-12)
        for own, other in zip(module.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(own.grad.full_tensor().reshape(other.shape), other.grad, rtol=1e-12, atol=1e-12)


def test_heads_times_steps(ranks):
    ranks.run(heads_times_steps, size=4)


def refusals(group: Any) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    for module, kind, text in (
        (fastseq.MultiheadAttention(6, 3), ValueError, "a number of heads that 2 ranks divide, got 3"),
        (fastseq.LSTM(3, 4), ValueError, "a number of heads that 2 ranks divide, got 1"),
        (nn.Linear(3, 4), TypeError, "got Linear"),
        (fastseq.MinGRU(3, 4), TypeError, "got MinGRU"),
    ):
        with pytest.raises(kind, match=text):
            parallelize_module(module, mesh, HeadParallel())
    module = parallelize_module(fastseq.GRU(3, 4, num_heads=2), mesh, HeadParallel())
    with pytest.raises(RuntimeError, match=r"Expected h of size \[1, B, 4\] each, got \[\[2, 3, 4\]\]"):
        module(torch.ones(2, 3, 3), torch.ones(2, 3, 4))


def test_what_it_cannot_do_is_refused(ranks):
    ranks.run(refusals)
