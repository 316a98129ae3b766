"""What every causal model of fastseq.models that works on vectors [B, T, W] must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend


def flat(state: Any) -> list[Tensor]:
    """The tensors of a state, in order."""
    return [state] if isinstance(state, Tensor) else [tensor for part in state for tensor in flat(part)]


def assert_steps_are_forward(model: nn.Module, x: Tensor, **bounds: float) -> None:
    """At every prefix, outputs and state; and a call that goes on from a state is as one over all of it."""
    whole, last = model(x)
    state = None
    for t in range(x.shape[1]):
        y, state = model.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t], **bounds)
        prefix, of_prefix = model(x[:, : t + 1])
        torch.testing.assert_close(prefix, whole[:, : t + 1], **bounds)
        torch.testing.assert_close(flat(state), flat(of_prefix), **bounds)
        rest, final = model(x[:, t + 1 :], state)
        torch.testing.assert_close(rest, whole[:, t + 1 :], **bounds)
        torch.testing.assert_close(flat(final), flat(last), **bounds)


def assert_causal(model: nn.Module, x: Tensor) -> None:
    """What comes later changes nothing, and what came before does; a shorter row in a batch is the row alone."""
    whole, t = model(x)[0], x.shape[1] // 2
    other = x.clone()
    other[:, t:] *= -1
    changed = model(other)[0]
    torch.testing.assert_close(changed[:, :t], whole[:, :t])
    assert (changed[:, t:] - whole[:, t:]).abs().amax(-1).min() > 1e-6
    torch.testing.assert_close(model(x[1:, :t])[0], whole[1:, :t])


def assert_rows_stand_alone(model: nn.Module, x: Tensor) -> None:
    """Rows in another order give results in that order, states too."""
    order = torch.arange(len(x)).roll(1)
    y, state = model(x)
    permuted, of_permuted = model(x[order])
    torch.testing.assert_close(permuted, y[order])
    torch.testing.assert_close(model(x[order], None)[0], y[order])
    again, _ = model(x, state)
    torch.testing.assert_close(model(x[order], of_permuted)[0], again[order])


_SLOW = (pytest.mark.slow, pytest.mark.timeout(1200))  # inductor compiles some models for minutes
ON_COMPILERS = pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=_SLOW)])


def assert_compiles(run: Any, model: nn.Module, compiler: str, *inputs: Tensor) -> None:
    """Without a break, with equal results and gradients. By "eager" nothing is generated, which takes longest."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    expected, found = run(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (expected, found)]
    torch.testing.assert_close(grads[1], grads[0])
    assert counter.frame_count == 1


def trained(model: nn.Module, loss: Any, steps: int, rate: float, clip: float = 1.0) -> float:
    """Adam on ``loss()``; the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    value = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return value.item()
