"""The recurrent op for the battery: inputs of a case, the op's public functions, and the same by PyTorch itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq import backends
from fastseq import functional as F
from fastseq.cells import CELLS
from fastseq.ops.types import state_dtype

from . import recurrent_equations
from .battery import OpBattery
from .cases import (
    RECURRENT_CASES,
    SMALL_RECURRENT_CASES,
    SMALL_RESET_CASES,
    SMALL_VARIANT_CASES,
    VARIANTS,
    RecurrentCase,
)

SEED = 11  # of what zoneout draws
FUNCTIONS: dict[str, Any] = {"lstm": F.lstm, "gru": F.gru, "rnn_tanh": F.rnn, "rnn_relu": F.rnn}
# of a cell, whose family is the module's name in lower case
MODULES = {
    cell.name: next((name for name in fastseq.__all__ if name.lower() == cell.family.replace("_", "")), f"no {cell.family}")
    for cell in CELLS.values()
}
MODULES_OF_VARIANTS = tuple(MODULES[name] for name in VARIANTS)
EVERY_MODULE = tuple(dict.fromkeys(MODULES.values()))


def module_of(library: Any, case: RecurrentCase, dtype: torch.dtype, **options: Any) -> nn.RNNBase:
    options |= dict(num_layers=case.layers, bias=case.bias, bidirectional=case.bidirectional, dtype=dtype)
    if case.projection:
        options["proj_size"] = case.projection
    if case.cell.startswith("rnn"):
        options["nonlinearity"] = case.cell.removeprefix("rnn_")
    return getattr(library, MODULES[case.cell])(case.input, case.hidden, **options)


def is_torchs(case: RecurrentCase) -> bool:
    return case.cell in FUNCTIONS and case.heads == 1 and not any(case.zoneout) and not case.resets


class RecurrentBattery(OpBattery):
    """Layers of every cell, as ``fastseq.functional`` and ``torch.nn`` have them, or by the equations where torch has none."""

    OP = "recurrent"
    CASES = RECURRENT_CASES
    SMALL_CASES = (*SMALL_RECURRENT_CASES, *SMALL_VARIANT_CASES, *SMALL_RESET_CASES)
    COMPILED_CASES = (
        *SMALL_RECURRENT_CASES[::3][:2],
        *SMALL_RECURRENT_CASES[1::3][1:],
        *SMALL_RECURRENT_CASES[2::3][:1],
        *(case for case in SMALL_VARIANT_CASES if case.cell in ("peephole_lstm", "layer_norm_gru")),
        *SMALL_RESET_CASES[:2],
    )

    def make(self, case, dtype, device="cpu", seed=0):
        torch.manual_seed(seed)
        module = module_of(fastseq, case, torch.float64, num_heads=case.heads)
        lanes = case.layers * (2 if case.bidirectional else 1)
        lengths = torch.randint(1, case.steps + 1, (case.batch,))
        lengths[0] = case.steps
        x = torch.randn(case.steps, case.batch, case.input, dtype=torch.float64)
        inputs: dict[str, Any] = {"case": case}
        if case.layout == "packed":
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.sort(descending=True)[0])
            inputs["x"], inputs["batch_sizes"] = packed.data, packed.batch_sizes
        else:
            inputs["x"] = x
            if case.layout == "lengths":
                inputs["lengths"] = lengths
        if case.state:
            inputs["h0"] = torch.randn(lanes, case.batch, case.projection or case.hidden, dtype=torch.float64)
            for name in CELLS[case.cell].states[1:]:
                inputs[f"{name}0"] = torch.randn(lanes, case.batch, case.hidden, dtype=torch.float64)
        if case.resets:
            inputs["resets"] = torch.rand(inputs["x"].shape[:-1]) < 0.3
        if case.resets.startswith("state"):
            for name in CELLS[case.cell].states:
                width = (case.projection or case.hidden) if name == "h" else case.hidden
                inputs[f"reset_{name}"] = torch.randn(
                    lanes, case.batch if case.resets == "states" else 1, width, dtype=torch.float64
                )
        for name in ("n0", "reset_n"):
            if name in inputs:
                inputs[name] = inputs[name].abs() + 1  # a normalizer is positive
        inputs |= {name: getattr(module, name).detach() for name in module._flat_weights_names}
        for name in (name for name in inputs if "_ln_" in name):
            inputs[name] += torch.randn_like(inputs[name]) / 4  # scales of 1 and shifts of 0 would hide that they are not used
        return {
            name: value.to(device, dtype).requires_grad_()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value.to(device)
            if isinstance(value, Tensor) and name != "batch_sizes"
            else value
            for name, value in inputs.items()
        }

    def against(self, inputs, backend, backward):
        case, x = inputs["case"], inputs["x"]
        query = backends.RecurrentQuery(
            "recurrent", x.device, x.dtype, case.cell, case.steps, 1, case.hidden, case.projection > 0, case.layout,
            any(case.zoneout), resets=bool(case.resets),
        )  # fmt: skip
        with backends.use_backend(backend):
            return backends.obstacles(backend, query)

    def widest(self, backend):
        """fp64, or fp32 on a backend that has none."""
        case = self.SMALL_CASES[0]
        return torch.float64 if self.supports(case, torch.float64, backend) else torch.float32

    def resized(self, case):
        return replace(case, steps=case.steps + 2, batch=case.batch + 3)

    def run(self, inputs):
        case = inputs["case"]
        states = [inputs[name] for name in (f"{state}0" for state in CELLS[case.cell].states) if name in inputs]
        params = [value for name, value in inputs.items() if name.startswith(("weight", "bias"))]
        options: dict[str, Any] = dict(
            has_biases=case.bias,
            num_layers=case.layers,
            bidirectional=case.bidirectional,
            lengths=inputs.get("lengths"),
            batch_sizes=inputs.get("batch_sizes"),
            recompute=case.recompute,
        )
        if not is_torchs(case):
            if case.training:
                torch.manual_seed(SEED)
            zoneout = case.zoneout if case.zoneout[1] else case.zoneout[0]
            options |= dict(proj_size=case.projection, num_heads=case.heads, zoneout=zoneout, training=case.training)
            anew = [inputs[name] for name in (f"reset_{state}" for state in CELLS[case.cell].states) if name in inputs]
            options |= dict(resets=inputs.get("resets"), reset_to=anew or None)
            y, finals, _ = F.recurrent(case.cell, inputs["x"], states or None, params, **options)
            return y, *finals
        if case.cell == "lstm":
            options["proj_size"] = case.projection
        elif case.cell.startswith("rnn"):
            options["nonlinearity"] = case.cell.removeprefix("rnn_")
        hx = None if not states else tuple(states) if len(states) > 1 else states[0]
        return FUNCTIONS[case.cell](inputs["x"], hx, params, **options)

    def run_torch(self, inputs):
        case = inputs["case"]
        if not is_torchs(case):
            return recurrent_equations.layers(inputs, SEED)
        module = module_of(nn, case, inputs["x"].dtype)
        state = (inputs["h0"], inputs["c0"]) if "c0" in inputs else inputs.get("h0")
        x = inputs["x"]
        if "batch_sizes" in inputs:
            x = nn.utils.rnn.PackedSequence(x, inputs["batch_sizes"])
        elif "lengths" in inputs:
            x = nn.utils.rnn.pack_padded_sequence(x, inputs["lengths"].cpu(), enforce_sorted=False)
        parameters = {name: inputs[name] for name, _ in module.named_parameters()}
        y, states = torch.func.functional_call(module, parameters, (x, state))
        if "batch_sizes" in inputs:
            y = y.data
        elif "lengths" in inputs:
            y, _ = nn.utils.rnn.pad_packed_sequence(y, total_length=case.steps)
        return (y, *states) if isinstance(states, tuple) else (y, states)

    def op_samples(self, case, dtype):
        cell, lanes = CELLS[case.cell], 2 if case.bidirectional else 1
        inputs = self.make(case, dtype)
        lengths, batch_sizes = inputs.get("lengths"), inputs.get("batch_sizes")
        width = case.projection or case.hidden
        wide = state_dtype(dtype)
        weight = torch.randn(lanes, len(cell.gates) * case.hidden, width, dtype=dtype)
        vectors = torch.randn(lanes, len(cell.vectors) * case.hidden, dtype=dtype) if cell.vectors else None
        projection = torch.randn(lanes, width, case.hidden, dtype=dtype) if case.projection else None
        # packed: without a state the fake kernel would have to invent the batch's size, which opcheck cannot compare
        h0 = torch.randn(lanes, case.batch, width, dtype=dtype)
        c0 = torch.rand(lanes, case.batch, cell.wide_states * case.hidden, dtype=wide) if cell.has_c else None
        reverse = [0, 1][:lanes]
        w_ih = torch.randn(lanes * len(cell.gates) * case.hidden, case.input, dtype=dtype)
        b_ih = torch.randn(w_ih.shape[0], dtype=dtype) if case.bias else None
        resets: tuple[Any, ...] = ()
        if case.resets:
            anew = (h0, c0) if case.resets == "states" else (h0[:, :1], None if c0 is None else c0[:, :1])
            resets = inputs["resets"], *(anew if case.resets.startswith("state") else (None, None))
        forward = (
            inputs["x"].detach(), w_ih, b_ih, weight, vectors, projection, h0, c0, lengths, batch_sizes, None, None, case.cell,
            reverse, 0.0, 0.0, True, True, *resets,
        )  # fmt: skip
        y, h_n, c_n, c, gates = torch.ops.fastseq.recurrent_forward(*forward)
        backward = (
            torch.randn_like(y), torch.randn_like(h_n), torch.randn_like(c_n) if cell.has_c else None, None, weight, vectors,
            projection, h0, c0, lengths, batch_sizes, None, None, y, c, gates, case.cell, reverse, 0.0, 0.0, *resets,
        )  # fmt: skip
        return [(torch.ops.fastseq.recurrent_forward.default, forward), (torch.ops.fastseq.recurrent_backward.default, backward)]

    def magnifies(self, case):
        return CELLS[case.cell].normalized  # a norm over few units magnifies that of some rows a lot

    def gradients_jump(self, case, dtype):
        # test_relu_gradients_in_bfloat16 instead; of an sLSTM, which of i and f is the larger decides
        return dtype.itemsize == 2 and case.cell == "rnn_relu" or dtype == torch.float16 and case.cell == "slstm"
