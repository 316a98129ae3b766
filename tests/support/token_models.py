"""What holds of models of tokens, whatever their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracles import frozen
from torch import Tensor, nn

TIGHT = 1e-12  # of fp64 results of order 1, along two ways


def close(actual: Tensor, expected: Tensor, bound: float = TIGHT) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max().item() <= bound * max(1.0, expected.abs().max().item())


def step_is_forward(model: nn.Module, inputs: Tensor, state: Any, bound: float = TIGHT) -> None:
    """``step`` says at every prefix what ``forward`` says at its end, and from a state in the middle as well."""
    steps, so_far = inputs.shape[1], state
    for t in range(steps):
        out, so_far = model.step(inputs[:, t], so_far)
        close(out, model(inputs[:, : t + 1], state)[0][:, -1], bound)
    whole = model(inputs, state)[0]
    first, middle = model(inputs[:, : steps // 2], state)
    close(torch.cat([first, model(inputs[:, steps // 2 :], middle)[0]], 1), whole, bound)


def causal(forward: Callable[[Tensor], Tensor], inputs: Tensor, other: Tensor) -> None:
    """What comes later changes nothing before it, and something after: `other` [B, T, ..] differs from `inputs` everywhere."""
    place = inputs.shape[1] // 2
    changed = torch.cat([inputs[:, :place], other[:, place:]], 1)
    before, after = forward(inputs), forward(changed)
    close(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any()


def permuted(forward: Callable[..., Tensor], *batch: Tensor) -> None:
    """Rows in another order give the same rows in that order."""
    order = torch.arange(len(batch[0])).roll(1)
    close(forward(*(each[order] for each in batch)), forward(*batch)[order])


def captured(function: Callable[..., Any], *args: Any) -> None:
    """``torch.compile(fullgraph=True)`` takes it: one graph, with the same results. Nothing is generated: that takes long."""
    torch._dynamo.reset()
    found = torch.compile(function, fullgraph=True, backend="eager")(*args)
    for actual, wanted in zip(tensors(found), tensors(function(*args)), strict=True):
        close(actual, wanted)


def compiled(model: nn.Module, function: Callable[..., Tensor], *args: Any) -> None:
    """Compiled by inductor it gives the same result and gradients."""
    torch._dynamo.reset()
    found, expected = torch.compile(function, fullgraph=True)(*args), function(*args)
    close(found, expected)
    of_both = [torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (found, expected)]
    for actual, wanted in zip(*of_both, strict=True):
        close(actual, wanted)


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for each in tree for tensor in tensors(each)] if isinstance(tree, tuple) else []


def same_gradients(
    output: Tensor | tuple[Tensor, ...], model: nn.Module, expected: dict[str, Tensor], bound: float = TIGHT
) -> None:
    """Of ``frozen.weighted(output)``, for every parameter of the model that wants one."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    outputs = output if isinstance(output, tuple) else (output,)
    assert named.keys() == expected.keys()
    for name, found in zip(named, torch.autograd.grad(frozen.weighted(*outputs), list(named.values())), strict=True):
        close(found, expected[name], bound)
