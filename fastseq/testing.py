"""Error bounds derived from the data: at most twice what PyTorch itself loses in the same dtype (FlashAttention's rule)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = 2.0  # times PyTorch's own error
ROUNDINGS = 2.0  # of the largest value, in the result's dtype


def _scale(truth: Tensor) -> float:
    return truth.abs().max().item() if truth.numel() else 0.0


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Largest error of a result, relative to the largest value of the truth.

    Args:
        result: in any dtype.
        truth: the same in fp64.
    """
    scale = _scale(truth)
    return (result.double() - truth.double()).abs().max().item() / scale if scale else 0.0


def pooled_error(results: Mapping[str, Tensor], truths: Mapping[str, Tensor]) -> float:
    """The largest relative error of all results of one computation.

    Args:
        results: by name.
        truths: the same in fp64, by the same names.
    """
    return max((relative_error(result, truths[name].double()) for name, result in results.items()), default=0.0)


def assert_close_to_truth(
    actual: Tensor, torch_result: Tensor, truth: Tensor, what: str = "result", factor: float = FACTOR, own_error: float = 0.0
) -> None:
    """Raise AssertionError unless ``actual`` is as close to the fp64 ``truth`` as PyTorch's own result.

    The bound is ``factor`` times PyTorch's largest error, plus ``ROUNDINGS`` roundings of the largest value (at least 1) in the
    dtype.

    Args:
        actual: the result under test; shape and dtype must be ``torch_result``'s.
        torch_result: what PyTorch computes in the same dtype.
        truth: the same in fp64.
        what: its name, for the message.
        factor: how many times PyTorch's error is allowed.
        own_error: PyTorch's relative error as known from elsewhere, if that is larger than what this result shows.
    """
    if actual.shape != torch_result.shape or actual.dtype != torch_result.dtype:
        raise AssertionError(
            f"{what}: {list(actual.shape)} {actual.dtype}, expected {list(torch_result.shape)} {torch_result.dtype}"
        )
    if actual.numel() == 0:
        return
    truth = truth.double()
    scale = _scale(truth)
    own = max(relative_error(torch_result, truth), own_error)
    bound = factor * own * scale + ROUNDINGS * torch.finfo(actual.dtype).eps * max(1.0, scale)
    error = (actual.double() - truth).abs()
    worst = int(torch.nan_to_num(error, nan=torch.inf).argmax())
    found = error.flatten()[worst].item()
    if not found <= bound:
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{what}: error {found:.3e} at {place} exceeds the bound {bound:.3e} "
            f"(got {actual[place].item():.8g}, truth {truth[place].item():.8g}, torch {torch_result[place].item():.8g})"
        )


def assert_all_close_to_truth(
    actual: Mapping[str, Tensor],
    torch_results: Mapping[str, Tensor],
    truths: Mapping[str, Tensor],
    factor: float = FACTOR,
    own_error: float = 0.0,
) -> None:
    """The same for results that come from one computation (outputs, gradients), by name.

    PyTorch's error is pooled: the largest relative error of any of its results bounds all of them, since the largest of a few
    elements says little about the error of the computation behind them.

    Args:
        actual: results under test, by name.
        torch_results: what PyTorch computes in the same dtype, by the same names.
        truths: the same in fp64.
        factor, own_error: as of :func:`assert_close_to_truth`.
    """
    assert actual.keys() == torch_results.keys() == truths.keys()
    own = max(own_error, pooled_error(torch_results, truths))
    for name, value in actual.items():
        assert_close_to_truth(value, torch_results[name], truths[name], name, factor, own)
