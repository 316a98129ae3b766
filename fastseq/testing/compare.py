"""Error bounds derived from the data: at most twice what PyTorch itself loses in the same dtype (FlashAttention's rule)."""

from __future__ import annotations

import torch
from torch import Tensor


def error_bound(torch_result: Tensor, truth: Tensor, factor: float = 2.0) -> float:
    """``factor`` times PyTorch's own error against an fp64 truth, plus two roundings of the largest value in the result's dtype."""
    truth = truth.double()
    if truth.numel() == 0:
        return 0.0
    own = (torch_result.double() - truth).abs().max().item()
    scale = max(1.0, truth.abs().max().item())
    return factor * own + 2 * torch.finfo(torch_result.dtype).eps * scale


def assert_close_to_truth(actual: Tensor, torch_result: Tensor, truth: Tensor, what: str = "result", factor: float = 2.0) -> None:
    """Raise AssertionError unless ``actual`` is as close to the fp64 ``truth`` as PyTorch's own result, within :func:`error_bound`.

    Args:
        actual: the result under test; shape and dtype must be ``torch_result``'s.
        torch_result: what PyTorch computes in the same dtype.
        truth: the same in fp64.
    """
    if actual.shape != torch_result.shape or actual.dtype != torch_result.dtype:
        raise AssertionError(
            f"{what}: {list(actual.shape)} {actual.dtype}, expected {list(torch_result.shape)} {torch_result.dtype}"
        )
    if actual.numel() == 0:
        return
    error = (actual.double() - truth.double()).abs()
    bound = error_bound(torch_result, truth, factor)
    worst = int(torch.nan_to_num(error, nan=torch.inf).argmax())
    found = error.flatten()[worst].item()
    if not found <= bound:
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{what}: error {found:.3e} at {place} exceeds the bound {bound:.3e} "
            f"(got {actual[place].item():.8g}, truth {truth[place].item():.8g}, torch {torch_result[place].item():.8g})"
        )
