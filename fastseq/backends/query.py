"""What a backend is asked about."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RecurrentQuery(NamedTuple):
    """One call of the recurrent op."""

    op: str
    device: torch.device
    dtype: torch.dtype
    cell: str
    steps: int
    lanes: int
    hidden: int
    projected: bool
    layout: str  # "padded", "lengths" or "packed"
    zoned: bool = False  # with zoneout
    batch: int = 1
    backward: bool = False
    saving: bool = False  # forward, for a backward pass
    solver: str = ""  # what solves all steps at once; "": they run one after another
    resets: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.op} {self.cell}, {dtype} on {self.device}, {self.layout}, T={self.steps} B={self.batch} D={self.lanes} "
            f"H={self.hidden}"
            + (", projected" if self.projected else "")
            + (", zoneout" if self.zoned else "")
            + (", resets" if self.resets else "")
        ) + (f", by {self.solver}'s method" if self.solver else "")


class AttentionQuery(NamedTuple):
    """One call of an attention op. Pairs are of queries and keys."""

    op: str
    call: str  # "forward", "backward", "weights", "weights_backward" or "decode"
    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: tuple[int, int]
    lengths: tuple[int, int]
    features: tuple[int, int]  # of q and k, of v
    layout: str  # "padded" or "packed"; of a cache "contiguous" or "paged"
    window: tuple[int, int]  # left and right, -1: unlimited
    offset: int
    block_size: int
    uses: tuple[str, ...]  # fields of `Spec` that are in use
    gradients: tuple[str, ...]  # backward: wanted

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        window = "causal" if self.window == (-1, 0) else "" if self.window == (-1, -1) else f"window={self.window}"
        return (
            f"{self.op} {self.call}, {dtype} on {self.device}, {self.layout}, B={self.batch} H={self.heads} T={self.lengths} "
            f"E={self.features}" + "".join(f", {use}" for use in (window, *self.uses) if use)
        )


class ScanQuery(NamedTuple):
    """One call of the scan op."""

    op: str
    call: str  # "forward" or "backward"
    device: torch.device
    dtype: torch.dtype
    kind: str  # "real", "complex" or "blocks"
    steps: int
    batch: int
    channels: int
    layout: str  # "padded", "lengths" or "packed"
    uses: tuple[str, ...]  # of "initial", "resets", "reverse", and the cell

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.op} {self.call}, {self.kind}, {dtype} on {self.device}, {self.layout}, T={self.steps} B={self.batch} "
            f"C={self.channels}" + "".join(f", {use}" for use in self.uses)
        )


Query = RecurrentQuery | AttentionQuery | ScanQuery
