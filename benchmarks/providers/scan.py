"""The programs that scan: fastseq's, a loop over the steps, torch's associative_scan.

The closed form in logarithms, cumsum and logcumsumexp, is none of them: in fp32 it fails the check from seven steps on.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..workloads.scan import Program, loop
from .base import Provider, fastseq_chose, fastseq_missing

OWN, LOOP, TREE = "fastseq.functional.scan", "eager loop", "torch's associative scan"


def _own(w: Any) -> Program:
    scan = importlib.import_module("fastseq.functional").scan
    return lambda b, a: scan(b, a)[0]


def _compose(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return one[0] * other[0], torch.addcmul(other[1], other[0], one[1])


def _tree(w: Any) -> Program:
    from torch._higher_order_ops.associative_scan import associative_scan

    return lambda b, a: associative_scan(_compose, (a, b), 0, combine_mode="generic")[1]


SCAN_PROVIDERS = {
    p.name: p
    for p in (
        Provider(LOOP, "scan", "", lambda w: loop, color="#7c889e"),
        Provider(TREE, "scan", "", _tree, color="#1e88e5", dashed=True),
        Provider(OWN, "scan", "", _own, fastseq_missing("functional.scan"), fastseq_chose, "#0f9a72"),
    )
}
