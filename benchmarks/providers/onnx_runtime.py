"""ONNX Runtime's LSTM, GRU and RNN and their single steps: what people move a recurrent model to for inference on a CPU.

Its best settings: every optimization, as many threads as torch has, which rest between calls; inputs are read where torch has
them, results are written where torch reads them, and both are bound once for each set of places. A result lasts until the call
after the next one.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..workloads.base import Workload
from ..workloads.cells import CELLS, torch_cell
from .base import RECURRENT, Provider

PACKAGES = ("onnxruntime", "onnx")
OPSET, IR = 17, 9  # which every ONNX Runtime of the last years reads
# Where ONNX has the gates that torch keeps in this order: i f g o, r z n.
GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def layer_name(cell: str) -> str:
    return f"ONNX Runtime {cell}"


def not_installed() -> str | None:
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} {'are' if len(absent) > 1 else 'is'} not installed: pip install {' '.join(absent)}"


def missing(w: Workload) -> str | None:
    absent = not_installed()
    if absent:
        return absent
    if w.mode != "inference":
        return "ONNX Runtime has inference only"
    if w.dtype != "float32":
        return f"ONNX Runtime's recurrent layers on a CPU have no {w.dtype}"
    if w.packed:
        return "ONNX Runtime has no packed sequences"
    return None if w.device == "cpu" else "is compared on a CPU"


def model_of(function: str, parameters: Sequence[Tensor]) -> bytes:
    """A graph of one node, from weight_ih [G*H, I], weight_hh [G*H, H], bias_ih and bias_hh [G*H], in torch's order."""
    onnx = importlib.import_module("onnx")
    make, numpy_helper = onnx.helper, importlib.import_module("onnx.numpy_helper")
    gates, hidden = GATES[function], parameters[1].shape[1]

    def ordered(t: Tensor) -> np.ndarray:
        return torch.cat([t.detach().split(hidden)[gate] for gate in gates]).numpy()

    w_ih, w_hh, b_ih, b_hh = map(ordered, parameters)
    weights = {"W": w_ih[None], "R": w_hh[None], "B": np.concatenate((b_ih, b_hh))[None]}
    states = ["h", "c"] if function == "lstm" else ["h"]
    inputs, outputs = ["X", "W", "R", "B", "", *states], ["Y", *(f"{state}_n" for state in states)]
    more = {"linear_before_reset": 1} if function == "gru" else {}
    node = make.make_node(function.upper(), inputs, outputs, hidden_size=hidden, **more)

    def told(name: str, *shape: Any) -> Any:
        return make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = make.make_graph(
        [node],
        function,
        [told("X", "T", "batch", w_ih.shape[1]), *(told(state, 1, "batch", hidden) for state in states)],
        [told("Y", "T", 1, "batch", hidden), *(told(f"{state}_n", 1, "batch", hidden) for state in states)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", OPSET)], ir_version=IR)
    return model.SerializeToString()


def session_of(model: bytes, threads: int) -> Any:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads do not wait in the others' time
    options.log_severity_level = 3
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxLayer(nn.Module):
    """A layer, of whose parameters a session is made at the first call: [T, B, I] -> [T, B, H] and the states."""

    def __init__(self, module: nn.Module, function: str, threads: int) -> None:
        super().__init__()
        self.module, self.function, self.threads = module, function, threads
        self.session: Any = None
        self.bound: dict[tuple[int, ...], tuple[Any, Any]] = {}  # by the places of the inputs: a binding, and what is returned
        self.places: list[list[Tensor]] = []  # of results
        self.kept: list[Tensor] = []  # inputs, whose places must stay theirs

    def canonical_name(self, name: str) -> str:
        return name.removeprefix("module.")

    def forward(self, x: Tensor, state: Any = None) -> Any:
        states = state if isinstance(state, tuple) else () if state is None else (state,)
        key = tuple(t.data_ptr() for t in (x, *states))
        if key not in self.bound:
            self.bound[key] = self._bind(x, states)
        binding, results = self.bound[key]
        self.session.run_with_iobinding(binding)
        return results

    def shaped(self, t: Tensor) -> Tensor:
        """Input or states as the graph has them."""
        return t

    def returned(self, y: Tensor, states: tuple[Tensor, ...]) -> Any:
        """What is returned, of Y [T, 1, B, H] and states [1, B, H]."""
        return y.squeeze(1), states if len(states) > 1 else states[0]

    def _bind(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Any, Any]:
        parameters = list(self.parameters())
        if self.session is None:
            self.session = session_of(model_of(self.function, parameters), self.threads)
        x, names, hidden = self.shaped(x), ("h", "c") if self.function == "lstm" else ("h",), parameters[1].shape[1]
        T, B, _ = x.shape
        given = [self.shaped(t) for t in states] or [torch.zeros(1, B, hidden) for _ in names]
        inputs = dict(zip(("X", *names), (x, *given), strict=True))
        if not all(t.is_contiguous() for t in inputs.values()):
            raise ValueError("ONNX Runtime reads contiguous tensors")
        shapes: list[tuple[int, ...]] = [(T, 1, B, hidden), *((1, B, hidden) for _ in names)]
        outputs = dict(zip(("Y", *(f"{name}_n" for name in names)), self._free(shapes, list(inputs.values())), strict=True))
        self.kept += inputs.values()
        binding = self.session.io_binding()
        for way, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, t in tensors.items():
                way(name, "cpu", 0, np.float32, tuple(t.shape), t.data_ptr())
        y, *after = outputs.values()
        return binding, self.returned(y, tuple(after))

    def _free(self, shapes: list[tuple[int, ...]], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Some of these shapes that are not read by the call."""
        read = {t.untyped_storage().data_ptr() for t in inputs}
        for own in self.places:
            if [tuple(t.shape) for t in own] == shapes and not read & {t.untyped_storage().data_ptr() for t in own}:
                return own
        self.places.append([torch.empty(shape) for shape in shapes])
        return self.places[-1]


class OnnxCell(OnnxLayer):
    """A step: [B, I] and states [B, H] -> the new states."""

    def shaped(self, t: Tensor) -> Tensor:
        return t[None]

    def returned(self, y: Tensor, states: tuple[Tensor, ...]) -> Any:
        return tuple(t[0] for t in states) if len(states) > 1 else states[0][0]


def _layer(cell: str) -> Provider:
    module = getattr(nn, cell)
    return Provider(
        layer_name(cell),
        cell.lower(),
        "time",
        lambda w: OnnxLayer(module(w.I, w.H), w.function, w.threads),
        missing,
        color="#7c889e",
    )


def _step(cell: str) -> Provider:
    function = cell.removesuffix("Cell").lower()
    return Provider(
        layer_name(cell),
        cell.lower(),
        "",
        lambda w: OnnxCell(torch_cell(w), function, w.threads),
        missing,
        color="#7c889e",
    )


ONNX_PROVIDERS = {p.name: p for p in (*map(_layer, RECURRENT), *map(_step, CELLS))}
