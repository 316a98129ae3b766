"""PyTorch's own samples for nn.MultiheadAttention and the transformers around it, as its test_modules.py uses them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db

import fastseq
from support.modules import assert_as_good

NAMES = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerEncoder", "TransformerDecoderLayer", "Transformer")
INFOS = [info for info in module_db if info.module_cls.__module__.startswith("torch.nn.") and info.module_cls.__name__ in NAMES]


def samples(info, dtype, training=True):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training))


def built(info, sample, dtype):
    """torch's module, and a converted copy of it."""
    torch.manual_seed(5)
    given = sample.constructor_input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = info.module_cls(*given.args, **given.kwargs).to(dtype)
        ours = copy.deepcopy(theirs)
        assert fastseq.convert(ours)
    return theirs, ours


def outcome(module, sample):
    """Results and the gradients of inputs and parameters, by name."""
    module.zero_grad()
    dtype = next(module.parameters()).dtype
    arguments = [t.detach().to(dtype).requires_grad_() for t in sample.forward_input.args]
    results = module(*arguments, **sample.forward_input.kwargs)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    sum((r * torch.linspace(0.5, 1.5, r.numel()).to(r).view_as(r)).sum() for r in results).backward()
    values = {f"result {i}": result.detach() for i, result in enumerate(results)}
    values |= {f"grad of input {i}": a.grad for i, a in enumerate(arguments)}
    return values | {f"grad of {name}": p.grad for name, p in module.named_parameters()}


def test_all_are_there():
    assert sorted(info.module_cls.__name__ for info in INFOS) == sorted(NAMES)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_gradients(info, dtype):
    """As near to fp64 as torch's; and what PyTorch's own test compares with, to its tolerances."""
    outcomes = [{}, {}, {}]
    for number, sample in enumerate(samples(info, dtype)):
        theirs, ours = built(info, sample, dtype)
        for values, module in zip(outcomes, (ours, theirs, copy.deepcopy(theirs).double()), strict=True):
            values |= {f"{name} of sample {number}": value for name, value in outcome(module, sample).items()}
        if sample.reference_fn is not None:
            given = sample.forward_input
            torch.testing.assert_close(ours(*given.args, **given.kwargs), sample.reference_fn(ours, *given.args, **given.kwargs))
    assert_as_good(*outcomes)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_eval_without_gradients(info):
    """Where torch takes its fast path."""
    for sample in samples(info, torch.float64, training=False):
        theirs, ours = built(info, sample, torch.float64)
        with torch.no_grad():
            expected = theirs.eval()(*sample.forward_input.args, **sample.forward_input.kwargs)
            actual = ours.eval()(*sample.forward_input.args, **sample.forward_input.kwargs)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_gradcheck_and_gradgradcheck(info):
    every = samples(info, torch.float64)
    for sample in every[:: len(every) // 2]:
        _, module = built(info, sample, torch.float64)
        names = [name for name, _ in module.named_parameters()]
        arguments = [t.detach() for t in sample.forward_input.args]

        def call(*flat, module=module, names=names, sample=sample):
            count = len(sample.forward_input.args)
            parameters = dict(zip(names, flat[count:], strict=True))
            return torch.func.functional_call(module, parameters, flat[:count], sample.forward_input.kwargs)

        flat = [t.detach().requires_grad_() for t in (*arguments, *module.parameters())]
        assert torch.autograd.gradcheck(call, flat, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, flat, fast_mode=True)


def test_nn_module_is_ours_after_convert():
    theirs, ours = built(INFOS[-1], samples(INFOS[-1], torch.float32)[0], torch.float32)
    assert not any(isinstance(m, fastseq.MultiheadAttention) for m in theirs.modules())
    kinds = {type(m) for m in ours.modules() if isinstance(m, nn.MultiheadAttention)}
    assert kinds == {fastseq.MultiheadAttention}
