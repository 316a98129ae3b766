"""Layers whose inputs follow from their outputs (Gomez et al. 2017, arXiv 1707.04585): training keeps the last ones alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastseq.functional import require_whole_sequence

__all__ = ["ReversibleBlock", "reversible"]


class ReversibleBlock(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1): its inputs follow from its outputs. Neither part may draw random numbers.

    Args:
        f: called with x2 and what else the block is given.
        g: called with y1.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x1: Tensor, x2: Tensor, *of_f: Any) -> tuple[Tensor, Tensor]:
        """y1 and y2, of x1 and x2."""
        y1 = x1 + self.f(x2, *of_f)
        return y1, x2 + self.g(y1)


def reversible(blocks: Iterable[nn.Module], x1: Tensor, x2: Tensor, of_f: list[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
    """Outputs of `ReversibleBlock` after `ReversibleBlock`; nothing in between is kept, the way back computes it anew.

    Compiled, and without gradients, it is the plain loop.

    Args:
        blocks: one after the other.
        x1, x2: both halves of the input.
        of_f: for each block what its f gets beside x2, without gradient.
    """
    require_whole_sequence("a reversible stack, which computes its blocks once more on the way back,")
    blocks = list(blocks)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        for block, more in zip(blocks, of_f, strict=True):
            x1, x2 = block(x1, x2, *more)
        return x1, x2
    parameters = [p for block in blocks for part in (block.f, block.g) for p in trained(part)]
    return cast(tuple[Tensor, Tensor], _Reversible.apply(blocks, of_f, x1, x2, *parameters))


def trained(part: Any) -> list[Tensor]:
    return [p for p in part.parameters() if p.requires_grad]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: list[Any], of_f: list[tuple[Any, ...]], x1: Tensor, x2: Tensor, *parameters: Tensor) -> Any:
        kind = x1.device.type
        ctx.blocks, ctx.of_f = blocks, of_f
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        for block, more in zip(blocks, of_f, strict=True):
            x1, x2 = block(x1, x2, *more)
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> Any:
        x1, x2 = ctx.saved_tensors
        grads: list[Tensor | None] = []
        for block, more in zip(reversed(ctx.blocks), reversed(ctx.of_f), strict=True):
            x2, d1, of_g = undone(ctx.autocast, block.g, x1, x2, d1, d2)
            x1, d2, of_f = undone(ctx.autocast, block.f, x2, x1, d2, d1, *more)
            grads = [*of_f, *of_g, *grads]
        return None, None, d1, d2, *grads


def undone(autocast: Any, part: nn.Module, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, *more: Any) -> Any:
    """Of y = before + part(x): before, the gradient of x with what comes through part added, those of part's parameters."""
    with torch.enable_grad(), torch.autocast(autocast[0], dtype=autocast[1], enabled=autocast[2]):
        x = x.detach().requires_grad_()
        out = part(x, *more)
        own, *grads = torch.autograd.grad(out, [x, *trained(part)], dy.to(out.dtype), allow_unused=True)
    return y - out.detach(), dx if own is None else dx + own, grads
