"""PyTorch's own samples for nn.RNN, nn.LSTM, nn.GRU and their cells, as its test_modules.py uses them."""

from __future__ import annotations

import itertools
import pickle
import re

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastseq
from support.modules import leaves, run

INFOS = [
    info
    for info in module_db
    if info.module_cls.__module__ == "torch.nn.modules.rnn" and hasattr(fastseq, info.module_cls.__name__)
]


def samples(info, dtype, requires_grad=False):
    keywords = dict(device="cpu", dtype=dtype, requires_grad=requires_grad, training=True)
    # Some samples exist with PackedSequence only on request.
    if info.module_cls.__name__ in ("RNN", "GRU"):
        keywords["with_packed_sequence"] = True
    torch.manual_seed(0)
    return list(info.module_inputs_func(info, **keywords))


def built(cls, sample, dtype):
    torch.manual_seed(5)
    given = sample.constructor_input
    return cls(*given.args, **given.kwargs).to(dtype)


WITH_DTYPES = [
    pytest.param(info, dtype, id=f"{info.name}-{dtype}")
    for info, dtype in itertools.product(INFOS, (torch.float32, torch.float64))
]


def test_all_six_are_there():
    assert sorted(info.module_cls.__name__ for info in INFOS) == sorted(
        fastseq.modules.recurrent.__all__ + fastseq.modules.recurrent_cells.__all__
    )


@pytest.mark.parametrize(("info", "dtype"), WITH_DTYPES)
def test_forward_and_gradients(info, dtype):
    """To the tolerances of PyTorch's own test; gradients are first divided by their largest value."""
    for sample in samples(info, dtype, requires_grad=True):
        theirs = built(info.module_cls, sample, dtype)
        ours = built(getattr(fastseq, info.module_cls.__name__), sample, dtype)
        arguments = sample.forward_input.args
        assert not sample.forward_input.kwargs
        expected, actual = run(theirs, *arguments), run(ours, *arguments)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            largest = value.abs().max().clamp(min=1)
            torch.testing.assert_close(actual[key] / largest, value / largest, msg=lambda m, k=key: f"{k}: {m}")
        if sample.reference_fn is not None and not isinstance(arguments[0], PackedSequence):
            # Torch's loop over a batch of one, against unbatched input.
            reference, actual = sample.reference_fn(ours, *arguments), ours(*arguments)
            for e, a in zip(leaves(reference), leaves(actual), strict=True):
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_gradcheck_and_gradgradcheck(info):
    every = samples(info, torch.float64, requires_grad=True)
    for sample in every[:: max(1, len(every) // 4)]:
        module = built(getattr(fastseq, info.module_cls.__name__), sample, torch.float64)
        given = list(sample.forward_input.args)
        packed = given[0] if isinstance(given[0], PackedSequence) else None
        names = [name for name, _ in module.named_parameters()]
        tensors = leaves(given)
        count = len(tensors)

        def call(*flat, packed=packed, given=given, module=module, names=names, count=count):
            arguments, parameters = list(flat[:count]), dict(zip(names, flat[count:], strict=True))
            if packed is not None:
                arguments[0] = PackedSequence(arguments[0], *packed[1:])
            elif len(given) > 1 and isinstance(given[1], tuple):
                arguments = [arguments[0], tuple(arguments[1:])]
            return tuple(leaves(torch.func.functional_call(module, parameters, tuple(arguments))))

        flat = [t.detach().requires_grad_() for t in (*tensors, *module.parameters())]
        assert torch.autograd.gradcheck(call, flat, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, flat, fast_mode=True)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_repr_and_pickle(info):
    for sample in samples(info, torch.float32):
        theirs = built(info.module_cls, sample, torch.float32)
        ours = built(getattr(fastseq, info.module_cls.__name__), sample, torch.float32)
        assert repr(ours) == f"fastseq.{theirs!r}"
        again = pickle.loads(pickle.dumps(ours))
        arguments = sample.forward_input.args
        for e, a in zip(leaves(ours(*arguments)), leaves(again(*arguments)), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize(("info", "dtype"), WITH_DTYPES)
def test_errors(info, dtype):
    keywords = dict(device="cpu", dtype=dtype, requires_grad=False, training=True)
    cls = getattr(fastseq, info.module_cls.__name__)
    cases = list(info.module_error_inputs_func(info, **keywords))
    assert cases
    for case in cases:
        sample = case.module_error_input
        given = sample.constructor_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex) as caught:
                cls(*given.args, **given.kwargs)
        else:
            module = cls(*given.args, **given.kwargs)
            if "dtype" not in given.kwargs:
                module = module.to(dtype)
            with pytest.raises(case.error_type, match=case.error_regex) as caught:
                module(*sample.forward_input.args, **sample.forward_input.kwargs)
        assert type(caught.value) is case.error_type, re.escape(str(caught.value))
