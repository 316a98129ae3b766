"""ONNX Runtime's attention: the operator Attention of ONNX, with its best settings, on torch's tensors in place.

The result lies where the call before it put its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from ..workloads.attention import AttentionWorkload, Bound, Tensors
from ..workloads.attention_textbook import CAP, visible
from .base import Provider
from .onnx_runtime import not_installed, session_of

ONNX = "ONNX Runtime Attention"
OPSET, IR = 23, 11  # the first that have the operator
FIRST = (1, 23)  # of ONNX Runtime
FUNCTIONS = ("dense", "window", "band", "blocks", "bias", "softcap", "decode")
TYPES = {"float32": "FLOAT", "float16": "FLOAT16"}


def missing(w: Any) -> str | None:
    if not isinstance(w, AttentionWorkload) or w.function not in FUNCTIONS:
        return f"has nothing for {w.function}"
    if w.mode != "inference":
        return "ONNX Runtime has inference only"
    if w.dtype not in TYPES:
        return f"ONNX Runtime's attention on a CPU has no {w.dtype}"
    if w.device != "cpu":
        return "is compared on a CPU"
    absent = not_installed()
    if absent:
        return absent
    found = importlib.metadata.version("onnxruntime")
    return None if tuple(map(int, found.split(".")[:2])) >= FIRST else f"ONNX Runtime {found} has no operator Attention"


def model_of(w: AttentionWorkload, mask: Tensor | None) -> bytes:
    """A graph of one node on q [B, H, T, E], k and v [B, G, S, E] and a mask over [1 or B, 1 or H, T, S], bool or added."""
    onnx = importlib.import_module("onnx")
    make, number = onnx.helper, getattr(onnx.TensorProto, TYPES[w.dtype])

    def told(name: str, kind: Any, *shape: int) -> Any:
        return make.make_tensor_value_info(name, kind, shape)

    causal = int(w.causal and w.function == "dense")
    names = ["q", "k", "v"] + ["mask"] * (mask is not None)
    node = make.make_node("Attention", names, ["y"], is_causal=causal, scale=w.E**-0.5, softcap=_cap(w))
    inputs = [
        told(name, number, w.B, heads, T, w.E) for name, heads, T in (("q", w.heads, w.T), ("k", w.G, w.S), ("v", w.G, w.S))
    ]
    if mask is not None:
        inputs.append(told("mask", onnx.TensorProto.BOOL if mask.dtype == torch.bool else number, *mask.shape))
    graph = make.make_graph([node], w.function, inputs, [told("y", number, w.B, w.heads, w.T, w.E)])
    return make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR).SerializeToString()


def _cap(w: AttentionWorkload) -> float:
    return CAP if w.function == "softcap" else 0.0


def attention(w: AttentionWorkload, tensors: Tensors) -> Bound:
    """Masks are prepared, as for every other program."""
    seen = None if w.function in ("dense", "decode", "softcap") else visible(w, "cpu")
    mask = tensors["bias"] if w.function == "bias" else seen
    session = session_of(model_of(w, mask), w.threads)
    given = {name: tensors[name].detach().contiguous() for name in "qkv"} | ({} if mask is None else {"mask": mask.contiguous()})
    result = torch.empty(w.B, w.heads, w.T, w.E, dtype=w.torch_dtype)
    binding = session.io_binding()
    for way, bound in ((binding.bind_input, given), (binding.bind_output, {"y": result})):
        for name, t in bound.items():
            way(name, "cpu", 0, t.numpy().dtype.type, tuple(t.shape), t.data_ptr())

    def run(kept: Any = given) -> Tensor:  # whose places must stay theirs
        session.run_with_iobinding(binding)
        return result

    return Bound(run, {})


ONNX_ATTENTION_PROVIDERS = {ONNX: Provider(ONNX, "attention alone", "", lambda w: attention, missing, color="#7c889e")}
