"""torch.nn's recurrent modules and ours side by side: same weights, same inputs, every result and every
gradient.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastseq import modules
from fastseq.testing import assert_close_to_truth

# Sizes small enough for hundreds of cases, all different, none a multiple of a vector.
T, B, I, H = 6, 3, 4, 5  # noqa: E741

# What may differ in fp64, where torch's own result is the truth: the order of sums of some 30 terms.
FP64: dict[str, Any] = dict(rtol=1e-13, atol=1e-14)

# One module of each kind plain and one with everything, for tests that need not walk all options.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("RNN", dict(num_layers=2, bidirectional=True)),
    ("RNN", dict(nonlinearity="relu", bias=False)),
    ("LSTM", dict()),
    ("LSTM", dict(num_layers=2, bidirectional=True, proj_size=3)),
    ("GRU", dict()),
    ("GRU", dict(num_layers=2, bidirectional=True, bias=False)),
]


def both(name: str, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch's module and ours with the same weights, in `dtype`. `sizes` are I and H unless given."""
    torch.manual_seed(1)
    theirs = getattr(nn, name)(*(sizes or (I, H)), **options).to(dtype)
    ours = getattr(modules, name)(*(sizes or (I, H)), **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that have the same bits in `dtype` wherever the seed is the same."""
    return torch.randn(*size).to(dtype)


def initial(module: nn.RNNBase, batch: int | None = B, dtype: torch.dtype = torch.float32) -> Any:
    """hx for `module`; batch None: unbatched."""
    lanes = module.num_layers * (2 if module.bidirectional else 1)
    rows = () if batch is None else (batch,)
    h_0 = random(lanes, *rows, module.proj_size or module.hidden_size, dtype=dtype)
    if module.mode != "LSTM":
        return h_0
    return h_0, random(lanes, *rows, module.hidden_size, dtype=dtype)


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
    values: dict[str, Any] = {f"result {i}": result.detach() for i, result in enumerate(results)}
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
        worst = int((ours.double() - exact.double()).abs().nan_to_num(nan=torch.inf).argmax())
        bounds = itertools.accumulate(truth[name].numel() for name in names)
        worst_name = next(name for name, bound in zip(names, bounds, strict=True) if worst < bound)
        what = f"{kind}s, worst in {worst_name}"
        if theirs.dtype == torch.float64:
            torch.testing.assert_close(ours, theirs, **FP64, msg=lambda m, w=what: f"{w}: {m}")  # type: ignore[misc]
        else:
            assert_close_to_truth(ours, theirs, exact, what)


def outcomes(
    theirs: nn.Module, ours: nn.Module, input: Any, hx: Any = None, seed: int | None = None, case: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """`run` of ours, of torch's and, as the truth, of torch's in fp64; `case` is added to every name."""

    def seeded(module: nn.Module) -> dict[str, Tensor]:
        if seed is not None:
            torch.manual_seed(seed)
        return {name + case: value for name, value in run(module, input, hx).items()}

    return seeded(ours), seeded(theirs), seeded(copy.deepcopy(theirs).double())


def assert_same(*arguments: Any, **keywords: Any) -> None:
    """Of one call (see `outcomes`): ours is as near to the truth as torch's."""
    assert_as_good(*outcomes(*arguments, **keywords))


def assert_same_together(calls: Iterable[tuple[dict[str, Tensor], ...]]) -> None:
    """Of several calls, each with a `case` of its own. For small ones: the more values, the less luck."""
    totals: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    for outcome in calls:
        for total, values in zip(totals, outcome, strict=True):
            assert not total.keys() & values.keys()
            total.update(values)
    assert_as_good(*totals)
