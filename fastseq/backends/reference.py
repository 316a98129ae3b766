"""The reference, as a backend: runs everything, everywhere, slowly."""

from __future__ import annotations

from torch import Tensor

from ..ops.types import (
    DecodeSpec,
    ScanSpec,
    Spec,
    empty_gradients,
    empty_rows,
    empty_scan,
    empty_scan_gradients,
    scan_kind,
)
from ..reference import attention, attention_decode, recurrent, scan
from .query import Query

name = "reference"
devices = ("any",)
ops = ("recurrent", "attention", "attention_decode", "scan")

recurrent_forward = recurrent.forward
recurrent_backward = recurrent.backward


def available() -> str | None:
    return None


def why_not(query: Query) -> list[str]:
    return []


def attention_forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    out, lse = attention.forward(q, k, v, spec)
    return empty_rows(q, v.shape[-1]).copy_(out), lse


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec, wanted: list[bool]
) -> tuple[Tensor, ...]:
    grads = attention.backward(dout, dlse, q, k, v, out, lse, spec, wanted)
    room = empty_gradients(q, k, v, spec, wanted)
    return tuple(place.copy_(grad) for place, grad in zip(room, grads, strict=True))


attention_weights = attention.weights


def attention_weights_backward(
    dw: Tensor, q: Tensor, k: Tensor, lse: Tensor, spec: Spec, average: bool, wanted: list[bool]
) -> tuple[Tensor, ...]:
    results = attention.weights_backward(dw, q, k, lse, spec, average, wanted)
    grads, delta = results[:-1], results[-1]
    room = empty_gradients(q, k, q, spec, [grad.dim() > 1 for grad in grads])
    return tuple([place.copy_(grad) for place, grad in zip(room, grads, strict=True)] + [delta])


def attention_decode_forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    out, lse = attention_decode.forward(q, k_cache, v_cache, spec)
    return empty_rows(q, v_cache.shape[-1]).copy_(out), lse


def scan_forward(
    b: Tensor, a: Tensor, gate: Tensor | None, vector: Tensor | None, initial: Tensor | None, spec: ScanSpec
) -> tuple[Tensor, Tensor]:
    h, final = scan.forward(b, a, gate, vector, initial, spec)
    room = empty_scan(b, scan_kind(b, a), spec)
    return room[0].copy_(h), room[1].copy_(final)


def scan_backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    b: Tensor | None,
    a: Tensor,
    gate: Tensor | None,
    vector: Tensor | None,
    h: Tensor,
    initial: Tensor | None,
    spec: ScanSpec,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = scan.backward(dh, dfinal, b, a, gate, vector, h, initial, spec)
    room = empty_scan_gradients(a, h, scan_kind(h, a), spec, wanted)
    for place, grad, want in zip(room, grads, [*wanted, True], strict=True):
        if want and grad is not None:
            place.copy_(grad)
    return room
