"""Triton's interpreter as the tests use it: with a bfloat16 that is right, and with every access held to its tensor.

The interpreter keeps bfloat16 as its bits in uint16 and calculates with these as if they were numbers, and what it makes of fp32
it cuts off instead of rounding. Within ``true_bfloat16`` an element is an fp32 number that bfloat16 has, rounded to the nearest
(even) after every operation; loads and stores are exact. docs/design/host-execution.md says what still differs from a device.

Within ``checked_bounds`` every address that an active mask lets through must be an element of the tensor that its pointer came
from: another tensor's memory does not do, nor a gap between the rows of a view. (triton-viz 3.0, the interpreter's sanitizer on
PyPI, knows neither arguments in tuples, as most of ours are, nor which pointer came from which tensor.)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_MOST_ELEMENTS = 1 << 20  # between the first and the last of a tensor, if its gaps are to be known
ON = os.environ.get("TRITON_INTERPRET") == "1"

if ON:
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    _OWN = (str(Path(triton.__file__).parent), __file__)


def rounded(x: Any) -> Any:
    """The nearest bfloat16 numbers, ties to even, in fp32."""
    x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    near = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), x, near)


def _packed(x: Any) -> Any:
    """The bits of bfloat16 numbers, in uint16."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    quiet = np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))  # a NaN's upper half alone could be infinity's
    return (quiet >> 16).astype(np.uint16)


def _unpacked(bits: Any) -> Any:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _as_bool(mask: Any) -> Any:
    """A scalar's comparison says of itself that it is of its operands' type, and is that once it is spread over a tile; from 3.9
    on Triton's interpreter refuses such masks."""
    if mask.data.dtype != np.bool_:
        mask = interpreter.TensorHandle(mask.data.astype(np.bool_), tl.int1)
    return mask


def _is_bfloat16(dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16


@contextmanager
def true_bfloat16() -> Iterator[None]:
    """bfloat16 as the head of this file says."""
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    np_dtype, convert = interpreter._get_np_dtype, interpreter._convert_float
    fits = getattr(interpreter, "_validate_np_data_size", None)  # Triton 3.4 has none
    create, fabs = handle.__init__, builder.create_fabs
    load, store = builder.create_masked_load, builder.create_masked_store

    def create_(self: Any, *given: Any, **named: Any) -> None:
        create(self, *given, **named)
        if self.data.dtype.kind == "f" and _is_bfloat16(self.dtype):
            self.data = rounded(self.data)

    def convert_(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 not in (source, target):
            return convert(data, source, target, rounding)
        assert {source, target} == {tl.bfloat16, tl.float32} and rounding is None, "no kernel of ours converts so"
        return data.astype(np.float32)

    def bitcast_(self: Any, source: Any, target: Any) -> Any:
        bits = _packed(source.data) if _is_bfloat16(source.dtype) else source.data
        data = _unpacked(bits.view(np.uint16)) if _is_bfloat16(target) else bits.view(np_dtype(target))
        return handle(data, target.scalar)

    def load_(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        if pointers.get_element_ty() != tl.bfloat16:
            return load(self, pointers, mask, other, *options)
        others = np.zeros(pointers.data.shape, np.uint16) if other is None else _packed(other.data)
        return handle(
            _unpacked(interpreter._interpreter.load(pointers.data, mask.data, others, np.dtype(np.uint16))), tl.bfloat16
        )

    def store_(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        if pointers.get_element_ty() != tl.bfloat16:
            return store(self, pointers, value, mask, *options)
        return interpreter._interpreter.store(pointers.data, _packed(value.data), mask.data)

    def no_atomics(self: Any, operation: Any, pointer: Any, *arguments: Any) -> Any:
        assert pointer.get_element_ty() != tl.bfloat16, "no kernel of ours does"
        return atomic(self, operation, pointer, *arguments)

    atomic = builder.create_atomic_rmw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_get_np_dtype", lambda t: np.dtype(np.float32) if _holds_bfloat16(t) else np_dtype(t))
        if fits is not None:
            patch.setattr(interpreter, "_validate_np_data_size", lambda x, t: x.itemsize <= 4 if _is_bfloat16(t) else fits(x, t))
        patch.setattr(interpreter, "_convert_float", convert_)
        patch.setattr(handle, "__init__", create_)
        patch.setattr(builder, "create_bitcast", bitcast_)
        patch.setattr(
            builder,
            "create_fabs",
            lambda self, x: handle(np.abs(x.data), tl.bfloat16) if _is_bfloat16(x.dtype) else fabs(self, x),
        )
        patch.setattr(builder, "create_masked_load", load_)
        patch.setattr(builder, "create_masked_store", store_)
        patch.setattr(builder, "create_atomic_rmw", no_atomics)
        patch.setattr(builder, "get_bf16", lambda self, value: handle(np.array([value], np.float32), tl.bfloat16), raising=False)
        yield


def _holds_bfloat16(dtype: Any) -> bool:
    """Of the elements, not of what pointers point to."""
    return (dtype.element_ty if isinstance(dtype, tl.block_type) else dtype) == tl.bfloat16


class OutOfBounds(IndexError):
    """An access beyond the tensor that its pointer came from; says kernel, line, tensor and offset."""


@dataclass(frozen=True)
class _Extent:
    """Where the elements of a tensor lie: addresses [begin, end), and which of them if there are gaps."""

    tensor: str
    begin: int
    end: int
    itemsize: int
    elements: Any  # bool, an entry for each itemsize bytes from `begin`; None: all

    def outside(self, addresses: Any, itemsize: int) -> Any:
        """Those that are no element; addresses as uint64."""
        beyond = (addresses < self.begin) | (addresses > self.end - itemsize) if self.end > self.begin else addresses >= 0
        if self.elements is not None:
            index = np.where(beyond, 0, addresses - np.uint64(self.begin)) // np.uint64(self.itemsize)
            beyond = beyond | ~self.elements[index.astype(np.int64)]
        return addresses[beyond]


def _extent(tensor: torch.Tensor) -> _Extent:
    begin, itemsize = tensor.data_ptr(), tensor.element_size()
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    elements = None
    if (0 < tensor.numel() < span or 0 in tensor.stride()) and span <= _MOST_ELEMENTS:
        elements = torch.zeros(span, dtype=torch.bool)
        index = torch.zeros(tensor.shape, dtype=torch.int64)
        for dim, (n, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            index += (torch.arange(n) * step).view(-1, *(1,) * (tensor.dim() - dim - 1))
        elements[index.flatten()] = True
    name = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides {list(tensor.stride())}"
    return _Extent(
        name, begin, begin + span * itemsize, itemsize, None if elements is None or elements.all() else elements.numpy()
    )


class Accesses:
    """What ``checked_bounds`` saw."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.count = 0


@contextmanager
def checked_bounds() -> Iterator[Accesses]:
    """Raises `OutOfBounds` (within Triton's InterpreterError) at the first access beyond a tensor."""
    builder = interpreter.InterpreterBuilder
    seen, running = Accesses(), [""]
    implicit, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def implicit_(argument: Any) -> Any:
        converted = implicit(argument)
        if hasattr(argument, "data_ptr"):
            converted.handle.attr["extent"] = _extent(interpreter._unwrap_tensor(argument))
        return converted

    def launch_(self: Any, *arguments: Any, **options: Any) -> Any:
        outer, running[0] = running[0], self.fn.__name__
        seen.kernels.add(self.fn.__name__)
        try:
            return launch(self, *arguments, **options)
        finally:
            running[0] = outer

    def check(pointers: Any, mask: Any, what: str) -> None:
        seen.count += 1
        extent = pointers.attr.get("extent")
        addresses = pointers.data if mask is None else np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if extent is None:
            raise OutOfBounds(f"{running[0]}, {_line()}: {what} by a pointer that came from no tensor of the launch")
        wrong = extent.outside(addresses, itemsize)
        if wrong.size:
            offset = (int(wrong.flat[0]) - extent.begin) // extent.itemsize
            raise OutOfBounds(
                f"{running[0]}, {_line()}: {what} of {wrong.size} of {addresses.size} elements beyond {extent.tensor}, "
                f"the first at offset {offset} of {(extent.end - extent.begin) // extent.itemsize} elements"
            )

    def keeping(name: str) -> Callable[..., Any]:
        method = getattr(builder, name)

        def keep(self: Any, *arguments: Any) -> Any:
            result = method(self, *arguments)
            for argument in arguments:
                if isinstance(argument, interpreter.TensorHandle) and "extent" in argument.attr:
                    result.attr["extent"] = argument.attr["extent"]
            return result

        return keep

    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw

    def load_(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "load")
        return load(self, pointers, _as_bool(mask), *rest)

    def store_(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "store")
        return store(self, pointers, value, _as_bool(mask), *rest)

    def atomic_(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "atomic")
        return atomic(self, operation, pointers, value, _as_bool(mask), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", implicit_)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_)
        for name in ("addptr", "splat", "broadcast", "expand_dims", "reshape", "trans", "bitcast"):
            patch.setattr(builder, f"create_{name}", keeping(f"create_{name}"))
        patch.setattr(builder, "create_masked_load", load_)
        patch.setattr(builder, "create_masked_store", store_)
        patch.setattr(builder, "create_atomic_rmw", atomic_)
        yield seen


@contextmanager
def remapped_once() -> Iterator[None]:
    """The interpreter maps Triton's language to its own for a launch, and once more at every call of a device function: slow."""
    remap, mapped = interpreter._patch_lang, set[str]()

    def remap_(function: Any) -> Any:
        names = _languages(function)
        if names <= mapped:
            return interpreter._LangPatchScope()  # nothing to undo: the launch's own mapping is there
        outermost, scope = not mapped, remap(function)
        mapped.update(names)
        if outermost:
            undo = scope.restore

            def restore() -> None:
                undo()
                mapped.clear()

            scope.restore = restore
        return scope

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(interpreter, "_LangPatchScope"):  # where a launch says when it is over
            patch.setattr(interpreter, "_patch_lang", remap_)
        yield


@cache
def _languages(function: Any) -> frozenset[str]:
    return frozenset(value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core)


def _line() -> str:
    """Where the kernel is: the innermost frame that is not the interpreter's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (frame.f_code.co_filename.startswith(_OWN) or "<" in frame.f_code.co_filename):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
