"""Whether a call is being written down as a graph of torch's own operators, for which torch's own functions run."""

from __future__ import annotations

import sys

import torch

TRACE, ONNX = "torch.jit.trace", "ONNX export"


def recorder() -> str | None:
    """``TRACE`` (TorchScript by tracing), ``ONNX`` (either exporter), or None: neither.

    A trace may hold our ops, and then needs ``import fastseq`` where it is loaded; ONNX has no operator for them.
    """
    if torch.jit.is_tracing():
        return ONNX if torch.onnx.is_in_onnx_export() else TRACE
    if torch.compiler.is_compiling():
        # What torch.onnx.is_in_onnx_export reads; of a call of it Dynamo makes one in the graph.
        exporter = sys.modules.get("torch.onnx._internal.exporter._flags")
        if exporter is not None and exporter._is_onnx_exporting:
            return ONNX
    return None


def refuse_onnx(what: str, remedy: str) -> None:
    """
    Raises:
        NotImplementedError: while a model is exported to ONNX.
    """
    if recorder() == ONNX:
        raise NotImplementedError(f"ONNX export: {what} is no function of torch's, and ONNX has no operator for it; {remedy}")
