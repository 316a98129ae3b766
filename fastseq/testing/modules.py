"""torch.nn's recurrent modules and ours side by side: same weights, same inputs, every result and every
gradient.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastseq import modules
from fastseq.testing.compare import assert_close_to_truth

# Sizes small enough for hundreds of cases, all different, none a multiple of a vector.
T, B, I, H = 6, 3, 4, 5  # noqa: E741

# What may differ in fp64, where torch's own result is the truth: the order of sums of some 30 terms.
FP64 = dict(rtol=1e-13, atol=1e-14)

# One module of each kind plain and one with everything, for tests that need not walk all options.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", dict(num_layers=2, bidirectional=True)),
    ("RNN", dict(nonlinearity="relu", bias=False)),
    ("LSTM", dict()),
    ("LSTM", dict(num_layers=2, bidirectional=True, proj_size=3)),
    ("GRU", dict()),
    ("GRU", dict(num_layers=2, bidirectional=True, bias=False)),
]


def both(
    name: str, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """torch's module and ours with the same weights, in `dtype`. `sizes` are I and H unless given."""
    torch.manual_seed(1)
    theirs = getattr(nn, name)(*(sizes or (I, H)), **options).to(dtype)
    ours = getattr(modules, name)(*(sizes or (I, H)), **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that have the same bits in `dtype` wherever the seed is the same."""
    return torch.randn(*size).to(dtype)


def initial(module: nn.Module, batch: int | None = B, dtype: torch.dtype = torch.float32) -> Any:
    """hx for `module`; batch None: unbatched."""
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if batch is None else (batch,)
    h_0 = random(lanes, *batch, module.proj_size or module.hidden_size, dtype=dtype)
    if module.mode != "LSTM":
        return h_0
    return h_0, random(lanes, *batch, module.hidden_size, dtype=dtype)


def leaves(value: Any) -> list[Tensor]:
    """Tensors that carry gradients in an argument or a result, in order."""
    if value is None:
        return []
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in value for leaf in leaves(part)]


def copied(value: Any, dtype: torch.dtype) -> Any:
    """`value` in `dtype` with fresh tensors that require grad."""
    if value is None:
        return None
    if isinstance(value, PackedSequence):
        return PackedSequence(copied(value.data, dtype), *value[1:])
    if isinstance(value, Tensor):
        return value.detach().clone().to(dtype).requires_grad_()
    return tuple(copied(part, dtype) for part in value)


def run(module: nn.Module, input: Any, hx: Any = None, **keywords: Any) -> dict[str, Tensor]:
    """Every result and every gradient of one call, by name. The cotangents are the same at every call."""
    dtype = next(module.parameters()).dtype
    input, hx = copied(input, dtype), copied(hx, dtype)
    module.zero_grad()
    results = leaves(module(input, hx, **keywords))
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(r.shape, generator=generator).bfloat16().to(r.dtype) for r in results]
    torch.autograd.backward(results, cotangents)
    values = {f"result {i}": result.detach() for i, result in enumerate(results)}
    values |= {f"grad of argument {i}": leaf.grad for i, leaf in enumerate(leaves((input, hx)))}
    values |= {f"grad of {name}": parameter.grad for name, parameter in module.named_parameters()}
    return values


def assert_as_good(actual: dict[str, Tensor], expected: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """`actual` is as near to `truth` as `expected` is; all three are what `run` returns.

    Results are judged together, and so are gradients, each first divided by its magnitude: the largest error
    in a tensor of five elements says little about what torch loses.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert actual[name].dtype == value.dtype, name

    for kind in ("result", "grad"):
        names = [name for name in expected if name.startswith(kind)]
        magnitudes = [max(1.0, *truth[name].abs().flatten().tolist()) for name in names]
        scales = [2.0 ** -math.ceil(math.log2(m)) for m in magnitudes]  # powers of two: exact in every dtype
        ours, theirs, exact = (
            torch.cat([values[name].flatten() * scale for name, scale in zip(names, scales, strict=True)])
            for values in (actual, expected, truth)
        )
        order = f"{kind}s in the order {', '.join(f'{name} ({truth[name].numel()})' for name in names)}"
        if theirs.dtype == torch.float64:
            torch.testing.assert_close(ours, theirs, **FP64, msg=lambda m, o=order: f"{o}: {m}")
        else:
            assert_close_to_truth(ours, theirs, exact, order)


def assert_same(
    theirs: nn.Module, ours: nn.Module, input: Any, hx: Any = None, seed: int | None = None
) -> None:
    """`ours(input, hx)` and its gradients are as near the truth, which is torch's in fp64, as torch's are."""

    def seeded(module: nn.Module) -> dict[str, Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        return run(module, input, hx)

    assert_as_good(seeded(ours), seeded(theirs), seeded(copy.deepcopy(theirs).double()))
