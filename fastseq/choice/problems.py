"""Small problems that a backend's kernels are tried on: those that a call would run, at sizes where tiles have tails.

A `Problem` is one call of a backend's function, the same by the reference, and the same in fp64. ``problems_of`` makes those of a
family of a query: its cell or its features, its dtype, its sizes as far as kernels are chosen by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS
from ..ops.types import GRADIENTS, SCAN_CELLS, Backward, DecodeSpec, Forward, ScanSpec, Spec, state_dtype
from ..reference import attention, recurrent, scan
from ..testing import assert_all_close_to_truth, pooled_error

OF_BIASES = ("bias", "relative_bias", "relative_k")  # gradients with kernels of their own
_SEEDS = (0, 1, 2)  # of the inputs that the reference's own error is known from; the first is what a backend is tried on
_MOST_ROWS, _MOST_HIDDEN, _MOST_LANES = 256, 4096, 4
Results = dict[str, Tensor]


class Untried(RuntimeError):
    """The reference did not get through a problem, which says nothing of a backend."""


@dataclass(frozen=True)
class Problem:
    """Inputs by seed, and what a backend makes of them."""

    name: str
    query: Any  # of the call that it is
    make: Callable[[int], dict[str, Any]]  # in fp64, on the CPU
    run: Callable[[Any, dict[str, Any]], Results]
    dtype: torch.dtype
    device: torch.device
    coarse: bool = False  # products of fp32 in TF32

    def check(self, backend: ModuleType, reference: ModuleType) -> None:
        """Raise AssertionError, with the first wrong number, unless a backend is as close to the truth as the reference."""
        try:
            inputs, expected, truth, own = self._expected(reference)
        except RuntimeError as error:
            raise Untried(f"{self.name}, by the reference: {error}") from error
        actual = self.run(backend, inputs)
        for name, value in actual.items():
            if value.shape == expected[name].shape and value.dtype == expected[name].dtype and not value.isfinite().all():
                raise AssertionError(f"{self.name}, {name}: {int((~value.isfinite()).sum())} of {value.numel()} not finite")
        try:
            assert_all_close_to_truth(actual, expected, truth, own_error=own)
        except AssertionError as error:
            raise AssertionError(f"{self.name}, {error}") from None

    def _expected(self, reference: ModuleType) -> tuple[dict[str, Any], Results, Results, float]:
        """Inputs, the reference's results and the truth, and how large the reference's relative error gets."""
        own = 0.0
        for seed in reversed(_SEEDS):
            inputs = _cast(self.make(seed), self.dtype, self.device)
            truth = self.run(reference, _cast(inputs, torch.float64, self.device))
            expected = self.run(reference, inputs)
            own = max(own, _own_error(expected, truth))
            if self.coarse:  # fp16 has TF32's digits
                half = self.run(reference, _cast(inputs, torch.float16, self.device))
                own = max(own, _own_error(half, truth))
        return inputs, expected, truth, own


def _own_error(results: Results, truths: Results) -> float:
    return pooled_error({name: value.double() for name, value in results.items()}, truths)


_WIDE = frozenset(("c0", "dc_n", "dc", "c", "slopes", "lse", "dlse", "a", "vector", "initial", "reset_c"))


def _cast(inputs: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Floating tensors in a dtype, what is wide in the wide one; batch_sizes stay on the CPU."""
    wide = state_dtype(dtype)

    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name == "batch_sizes":
            return value
        if not value.is_floating_point():
            return value.to(device)
        return value.to(device, wide if name in _WIDE else dtype)

    return {name: moved(name, value) for name, value in inputs.items()}


def problems_of(query: Any, family: str, coarse: bool) -> Iterator[Problem]:
    """Those of a family of `families`, for a query that is one of its calls."""
    makers = {"recurrent": _recurrent, "attention": _attention, "attention_decode": _decode, "scan": _scan}
    dtype = query.dtype.to_real() if query.dtype.is_complex else query.dtype
    for name, changes, make, run in makers[query.op](query, family):
        yield Problem(name, _of_family(query, family)._replace(**changes), make, run, dtype, query.device, coarse)


def _of_family(query: Any, family: str) -> Any:
    """The call of a family that goes with a query."""
    if query.op == "recurrent":
        return query._replace(backward=family == "backward")
    if query.op == "attention_decode":
        return query
    if query.op == "scan":
        return query._replace(call=family)
    call = "backward" if family == "bias_gradient" else family
    wanted = OF_BIASES if family == "bias_gradient" else tuple("qkv") if family == "backward" else ()
    return query._replace(call=call, gradients=wanted)


def families(query: Any) -> tuple[str, ...]:
    """What is tried together, since kernels of one call are followed by those of the next: each gets a verdict of its own."""
    if query.op in ("recurrent", "scan"):
        return "forward", "backward"
    if query.op == "attention_decode":
        return ("decode",)
    if query.call in ("weights", "weights_backward"):
        return "weights", "weights_backward"
    return ("forward", "backward", *(("bias_gradient",) if set(OF_BIASES) & {*_fields(query)} else ()))


def needed(query: Any) -> tuple[str, ...]:
    """The families of `families` that a call itself runs."""
    if query.op == "recurrent":
        return ("backward" if query.backward else "forward",)
    if query.op == "attention" and query.call == "backward" and set(OF_BIASES) & set(query.gradients):
        return "backward", "bias_gradient"
    return (query.call,)


# names, what of the query is another, what makes the inputs, what runs
Made = Iterator[tuple[str, dict[str, Any], Callable[[int], dict[str, Any]], Callable[[Any, dict[str, Any]], Results]]]


# recurrence

OUTPUTS = ("y", "h_n", "c_n", "c", "gates")
GRADIENTS_OF_STEPS = ("dgates", "drecurrent", "doutput", "dh0", "dc0", "dreset_h", "dreset_c")


def _recurrent(query: Any, family: str) -> Made:
    """The call's own units and rows, but few steps; then units and rows that fill no tile, of every layout."""
    one = query.steps == 1
    hidden, rows = min(query.hidden, _MOST_HIDDEN), min(query.batch, _MOST_ROWS)
    odd = hidden - 3 if hidden > 4 else hidden
    for layout, hidden_, rows_, steps, zeros in (
        (query.layout, hidden, rows, 1 if one else 3, False),
        ("lengths" if not one else "padded", odd, min(rows, 7), 1 if one else 5, True),
        *(() if one else (("packed", odd, 3, 4, False),)),
    ):

        def make(seed: int, sizes: tuple[Any, ...] = (layout, hidden_, rows_, steps, zeros)) -> dict[str, Any]:
            return _sequence(query, seed, *sizes)

        changes = {"layout": layout, "steps": steps, "batch": rows_, "hidden": hidden_, "lanes": min(query.lanes, _MOST_LANES)}
        run = _forward_of_steps if family == "forward" else _backward_of_steps
        yield f"{layout} T={steps} B={rows_} H={hidden_}", changes, make, run


def _sequence(query: Any, seed: int, layout: str, hidden: int, batch: int, steps: int, zeros: bool) -> dict[str, Any]:
    """Arguments of `Forward`, in fp64. ``zeros``: what resets put in place of a state."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    row, lanes = CELLS[query.cell], min(query.lanes, _MOST_LANES)
    gates, width, inputs = len(row.gates) * hidden, max(1, hidden // 2) if query.projected else hidden, 10
    lengths = torch.tensor([steps - b % steps for b in range(batch)]).sort(descending=True)[0]
    sizes = (lengths[None] > torch.arange(steps)[:, None]).sum(1)
    rows = (int(sizes.sum()),) if layout == "packed" else (steps, batch)
    drawn = query.zoned and layout != "packed"  # else states are mixed
    zoned_c = query.zoned and row.wide_states == 1
    anew = query.resets and not zeros

    def held() -> Tensor:
        return torch.rand(*rows, lanes, width, generator=generator) < 0.4

    return {
        "x": random(*rows, inputs),
        "w_ih": random(lanes * gates, inputs) / inputs**0.5,
        "b_ih": random(lanes * gates),
        "weight": random(lanes, gates, width) / hidden**0.5,
        "vectors": random(lanes, len(row.vectors) * hidden) if row.vectors else None,
        "projection": random(lanes, width, hidden) / hidden**0.5 if query.projected else None,
        "h0": random(lanes, batch, width),
        "c0": random(lanes, batch, row.wide_states * hidden).abs() if row.has_c else None,  # as an sLSTM's normalizer is
        "lengths": lengths if layout == "lengths" else None,
        "batch_sizes": sizes if layout == "packed" else None,
        "hold_h": held() if drawn else None,
        "hold_c": torch.rand(*rows, lanes, hidden, generator=generator) < 0.4 if drawn and zoned_c else None,
        "cell": query.cell,
        "reverse": [lane % 2 for lane in range(lanes)],
        "zoneout_h": 0.3 if query.zoned and not drawn else 0.0,
        "zoneout_c": 0.4 if zoned_c and not drawn else 0.0,
        "save_c": True,
        "save_gates": True,
        "resets": torch.rand(*rows, generator=generator) < 0.3 if query.resets else None,
        "reset_h": random(lanes, batch, width) if anew else None,
        "reset_c": random(lanes, batch, row.wide_states * hidden).abs() if anew and row.has_c else None,
    }


def _forward_of_steps(backend: Any, inputs: dict[str, Any]) -> Results:
    return dict(zip(OUTPUTS, backend.recurrent_forward(Forward(**inputs)), strict=True))


def _backward_of_steps(backend: Any, inputs: dict[str, Any]) -> Results:
    """From what the reference's forward saved."""
    call = Forward(**inputs)
    outputs = dict(zip(OUTPUTS, recurrent.forward(call), strict=True))
    given: dict[str, Any] = {f.name: inputs[f.name] for f in fields(Backward) if f.init and f.name in inputs}
    for name in ("y", "h_n", "c_n", "c"):
        given[f"d{name}"] = _like(outputs[name], 1) if outputs[name].numel() else None
    backward = Backward(**given | {name: outputs[name] for name in ("y", "c", "gates")})
    return dict(zip(GRADIENTS_OF_STEPS, backend.recurrent_backward(backward), strict=True))


# attention


def _fields(query: Any) -> list[str]:
    """Tensors of `Spec` that are in use, by name, and numbers that are not zero."""
    return [*query.uses, *(("relative_k",) if "relative_q" in query.uses else ())]


def _attention(query: Any, family: str) -> Made:
    """Several tiles of queries and keys and a tail of each, and one query; of the interpreter, whose tiles are small, fewer."""
    long = ((197, 331), (65, 3), (1, 70)) if query.device.type == "cuda" else ((33, 19), (1, 7))
    run = {
        "forward": _attended,
        "backward": _attention_gradients,
        "bias_gradient": _attention_gradients,
        "weights": _attention_weights,
        "weights_backward": _attention_weights_gradients,
    }[family]
    given = {*"qkv", *_fields(query)}
    wanted = [name in given and (name in OF_BIASES) == (family == "bias_gradient") for name in GRADIENTS]
    for lengths in [long] if query.layout == "packed" else [(pair,) for pair in long]:

        def make(seed: int, lengths: tuple[tuple[int, int], ...] = lengths) -> dict[str, Any]:
            return _pairs(query, seed, lengths) | {"wanted": wanted}

        yield f"T={' '.join(f'{q}:{k}' for q, k in lengths)} E={query.features[0]}:{query.features[1]}", {}, make, run


def _pairs(query: Any, seed: int, lengths: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """q, k, v and the fields of `Spec` that the query uses, in fp64; of packed rows a sequence for each pair of lengths."""
    generator = torch.Generator().manual_seed(seed)
    packed, uses = query.layout == "packed", set(_fields(query))
    batch, (e, ev), group = len(lengths) if packed else 2, query.features, max(1, query.heads[0] // max(1, query.heads[1]))
    hkv = 2 if group <= 2 else 1
    hq = hkv * min(group, 4)
    tq, tk = (max(pair[i] for pair in lengths) for i in (0, 1))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def rows(heads: int, which: int, features: int) -> Tensor:
        if packed:
            return random(sum(pair[which] for pair in lengths), heads, features).transpose(0, 1)
        return random(batch, lengths[0][which], heads, features).transpose(1, 2)

    def seen(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < 0.7

    left, right = query.window
    given: dict[str, Any] = {"q": rows(hq, 0, e), "k": rows(hkv, 1, e), "v": rows(hkv, 1, ev)}
    made: dict[str, Callable[[], Any]] = {
        "mask": lambda: seen(batch, 1, 1, tk) if seed % 2 else seen(batch, hq, tq, tk),
        "bias": lambda: random(1, hq, tq, tk) if seed % 2 else random(batch, hq, tq, tk),
        "relative_bias": lambda: random(hq, tq + 3),
        "relative_q": lambda: rows(hq, 0, e),
        "relative_k": lambda: random(hq, tq + 3, e),
        "slopes": lambda: random(batch, hq).abs(),
        "sinks": lambda: random(hq),
        "q_lengths": lambda: torch.tensor([tq, max(1, tq - 5)], dtype=torch.int32),
        "k_lengths": lambda: torch.tensor([max(1, tk - 9), tk], dtype=torch.int32),
        "blocks": lambda: seen(1, hq, math.ceil(tq / query.block_size), math.ceil(tk / query.block_size)),
    }
    given |= {name: make() for name, make in made.items() if name in uses}
    if packed:
        for i, name in enumerate(("cu_q", "cu_k")):
            given[name] = torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).to(torch.int32)
        given |= {"max_q": tq, "max_k": tk}
    if "dropout" in uses:
        place = [21, 7 - seed % 4, 5, hq + 2] if "dropout of a part" in uses else []
        given |= {"seed": torch.tensor([0x1234567890ABCDEF - seed, *place]), "dropout": 0.3}
    return given | {
        "scale": e**-0.5,
        "softcap": 2.0 if "softcap" in uses else 0.0,
        "left": 40 if left >= 0 else -1,
        "right": min(right, 9) if right >= 0 else -1,
        "bottom_right": "bottom_right" in uses,
        "offset": 3 if query.offset else 0,
        "relative_bias_zero": tq // 2 if "relative_bias" in uses else 0,
        "relative_k_zero": tq // 2 if "relative_q" in uses else 0,
        "block_size": query.block_size if "blocks" in uses else 0,
    }


def _spec(inputs: dict[str, Any]) -> Spec:
    return Spec(**{name: inputs[name] for name in Spec._fields if name in inputs})


def _like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, dtype=torch.float64, generator=generator).to(tensor)


def _attended(backend: Any, inputs: dict[str, Any]) -> Results:
    out, lse = backend.attention_forward(*(inputs[name] for name in "qkv"), _spec(inputs))
    return {"out": out, "lse": torch.where(lse == -torch.inf, 3.0, lse)}


def _attention_gradients(backend: Any, inputs: dict[str, Any]) -> Results:
    """From the reference's out and lse."""
    spec, (q, k, v) = _spec(inputs), (inputs[name] for name in "qkv")
    out, lse = attention.forward(q, k, v, spec)
    grads = backend.attention_backward(_like(out, 1), _like(lse, 2), q, k, v, out, lse, spec, inputs["wanted"])
    return {f"d{name}": grad for name, grad in zip(GRADIENTS, grads, strict=True) if grad.dim() > 1}


def _attention_weights(backend: Any, inputs: dict[str, Any]) -> Results:
    spec, (q, k, v) = _spec(inputs), (inputs[name] for name in "qkv")
    lse = attention.forward(q, k, v, spec)[1]
    return {
        "weights": backend.attention_weights(q, k, lse, spec, False),
        "average weights": backend.attention_weights(q, k, lse, spec, True),
    }


def _attention_weights_gradients(backend: Any, inputs: dict[str, Any]) -> Results:
    spec, (q, k, v) = _spec(inputs), (inputs[name] for name in "qkv")
    lse = attention.forward(q, k, v, spec)[1]
    dw = _like(q.new_empty(*q.shape[:3], k.shape[2]), 1)
    wanted = [name in inputs and name != "v" for name in GRADIENTS]
    *grads, delta = backend.attention_weights_backward(dw, q, k, lse, spec, False, wanted)
    named = {f"d{name}": grad for name, grad in zip(GRADIENTS, grads, strict=True) if grad.dim() > 1}
    return named | {"delta": delta}


# attention against a cache


def _decode(query: Any, family: str) -> Made:
    """The call's own queries; sequences that end within a tile, an empty one, keys in one part and in several."""
    for lengths, splits in (((137, 0, 61), 1), ((300, 41, 1), 3)):

        def make(seed: int, given: tuple[tuple[int, ...], int] = (lengths, splits)) -> dict[str, Any]:
            return _cache(query, seed, *given)

        yield f"keys={' '.join(map(str, lengths))} parts={splits} E={query.features[0]}:{query.features[1]}", {}, make, _decoded


def _cache(query: Any, seed: int, lengths: tuple[int, ...], splits: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    (e, ev), page, batch = query.features, query.block_size, len(lengths)
    queries = min(query.lengths[0], 8)
    lengths = tuple(0 if not length else max(length, queries) for length in lengths)
    hkv, group = 2, min(max(1, query.heads[0] // max(1, query.heads[1])), 8)
    capacity = max(lengths) + 3
    left, right = query.window
    given: dict[str, Any] = {"q": random(batch, queries, hkv * group, e).transpose(1, 2)}
    if query.layout == "paged":
        pages = math.ceil(capacity / page)
        shape, order = (batch * pages, page, hkv), torch.randperm(batch * pages, generator=generator)
        given["block_table"] = order.view(batch, pages).to(torch.int32)
    else:
        shape = (batch, capacity, hkv)
    given |= {"k_cache": random(*shape, e).transpose(1, 2), "v_cache": random(*shape, ev).transpose(1, 2)}
    if "slopes" in query.uses:
        given["slopes"] = random(batch, hkv * group).abs()
    if "sinks" in query.uses:
        given["sinks"] = random(hkv * group)
    return given | {
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "scale": e**-0.5,
        "softcap": 2.0 if "softcap" in query.uses else 0.0,
        "left": 40 if left >= 0 else -1,
        "right": right,
        "num_splits": splits,
    }


def _decoded(backend: Any, inputs: dict[str, Any]) -> Results:
    spec = DecodeSpec(**{name: inputs[name] for name in DecodeSpec._fields if name in inputs})
    out, lse = backend.attention_decode_forward(*(inputs[name] for name in ("q", "k_cache", "v_cache")), spec)
    return {"out": out, "lse": torch.where(lse == -torch.inf, 3.0, lse)}


# linear recurrence


def _scan(query: Any, family: str) -> Made:
    """Rows that are cut into chunks, with tails of channels; so many that each goes in one, and with a constant a."""
    cuda = query.device.type == "cuda"
    for steps, batch, channels, constant in (
        (300 if cuda else 23, 3, 37, False),
        (9, 300 if cuda else 3, 128 if cuda else 5, True),
    ):
        if constant and set(SCAN_CELLS) & set(query.uses):
            continue  # they have an a for each step

        def make(seed: int, sizes: tuple[int, int, int, bool] = (steps, batch, channels, constant)) -> dict[str, Any]:
            return _recurrence(query, seed, *sizes)

        run = _scanned if family == "forward" else _scan_gradients
        changes = {"steps": steps, "batch": batch, "channels": channels}
        yield f"T={steps} B={batch} C={channels}" + (" constant" if constant else ""), changes, make, run


def _recurrence(query: Any, seed: int, steps: int, batch: int, channels: int, constant: bool) -> dict[str, Any]:
    """Complex numbers as pairs."""
    generator = torch.Generator().manual_seed(seed)
    packed, numbers = query.layout == "packed", [] if query.kind == "real" else [2]
    of_a = [2, 2] if query.kind == "blocks" else numbers

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    lengths = torch.tensor([steps - b % steps for b in range(batch)], dtype=torch.int32)
    total = int(lengths.sum()) if packed else steps
    rows = 1 if packed else batch
    a = (random(1, 1, channels, *of_a) if constant else random(total, rows, channels, *of_a)).tanh() * (0.45 if numbers else 0.9)
    name = next((use for use in query.uses if use in SCAN_CELLS), "given")
    cell = SCAN_CELLS[name]
    return {
        "b": random(total, rows, channels, *numbers),
        "logits" if cell.reads_b else "a": -a.abs() if "log" in query.uses else a,  # logits have the dtype of b
        "gate": random(total, rows, channels) if cell.gate else None,
        "vector": random(channels).sigmoid() if cell.vector else None,
        "initial": random(batch, channels, *numbers) if "initial" in query.uses else None,
        "resets": torch.rand(total, rows, generator=generator) < 0.1 if "resets" in query.uses else None,
        "lengths": lengths if query.layout == "lengths" else None,
        "cu_seqlens": torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int() if packed else None,
        "cell": name,
        "reverse": "reverse" in query.uses,
        "kind": query.kind,
    }


def _numbers(inputs: dict[str, Any]) -> list[Any]:
    """b, a, gate, vector, initial as the op takes them, and the rest of it."""
    given = [inputs[name] for name in ("b", "logits" if "logits" in inputs else "a", "gate", "vector", "initial")]
    if inputs["kind"] == "complex":
        given = [tensor if tensor is None else torch.view_as_complex(tensor) for tensor in given]
    return [*given, ScanSpec(**{name: inputs[name] for name in ScanSpec._fields})]


def _apart(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _scanned(backend: Any, inputs: dict[str, Any]) -> Results:
    h, final = backend.scan_forward(*_numbers(inputs))
    return {"h": _apart(h), "final": _apart(final)}


def _scan_gradients(backend: Any, inputs: dict[str, Any]) -> Results:
    """From the reference's h."""
    b, a, gate, vector, initial, spec = _numbers(inputs)
    h, final = scan.forward(b, a, gate, vector, initial, spec)
    dh, dfinal = _like(_apart(h), 1), _like(_apart(final), 2)
    if h.is_complex():
        dh, dfinal = torch.view_as_complex(dh), torch.view_as_complex(dfinal)
    read = b if SCAN_CELLS[spec.cell].reads_b else None
    grads = backend.scan_backward(dh, dfinal, read, a, gate, vector, h, initial, spec, [True] * 4)
    names = ("db", "da", "dgate", "dvector", "dinitial")
    return {
        name: _apart(grad)
        for name, grad, given in zip(names, grads, (b, a, gate, vector, initial), strict=True)
        if given is not None
    }
