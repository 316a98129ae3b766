"""What every op does before a backend is chosen."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils._device import DeviceContext

from .. import backends
from ..backends import notes, wish
from . import flops


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device. Which types have it, Dynamo cannot ask in torch 2.10; in 2.13 it can."""
    has_it = device_type != "meta" if is_compiling() else _C._is_autocast_available(device_type)
    return has_it and torch.is_autocast_enabled(device_type)


def outside_dynamo(run: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps out of an implementation what is meant for its caller: autocast, in backward passes as well, and Dynamo, which goes
    on compiling what it meets after a graph break."""
    disabled: Callable[..., Any] | None = None

    def implementation(*args: Any) -> Any:
        nonlocal disabled
        if _C._is_any_autocast_enabled():
            device = next(arg for arg in args if isinstance(arg, Tensor)).device.type  # the first argument may be None
            if autocasts(device):
                with torch.autocast(device, enabled=False):
                    return implementation(*args)
        if "torch._dynamo" not in sys.modules:  # nothing is being compiled, and importing it would take a second
            return run(*args)
        disabled = disabled or torch.compiler.disable(run)
        return disabled(*args)

    return implementation


def traced() -> bool:
    """Whether torch.jit.trace or make_fx records what runs now, or a mode looks on."""
    return _C._is_tracing() or _C._len_torch_dispatch_stack() > 0


def recorded() -> bool:
    """Whether a program is made of what runs now: ``traced``, or torch.compile or torch.export."""
    return torch.compiler.is_compiling() or traced()


def transforming() -> bool:
    """Whether vmap, jvp, torch.func.grad or forward-mode AD is active, whatever it is applied to."""
    return _C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# The block of fastseq.distributed in which a call runs on this rank's part of a sequence, or None.
sequence_context: ContextVar[Any] = ContextVar("fastseq_sequence_context", default=None)

PLAIN = frozenset((Tensor, torch.nn.Parameter))  # a subclass has a say in what is called on it
_OF_CPU = (None, "cpu")


# of calls that take microseconds, looking a name up twice is a part
_is_tracing, _transforming, _lowering = _C._is_tracing, _C._are_functorch_transforms_active, _C._is_any_autocast_enabled
_dispatch_modes, _function_modes = _C._len_torch_dispatch_stack, _C._len_torch_function_stack
_sequence, _wish, _watchers, _nothing = sequence_context.get, wish.context.get, notes.watchers.get, wish.NOTHING


def plain_call(unseen: bool = False) -> bool:
    """Whether nobody compiles, traces, transforms, lowers or shares what runs now, nor forces another backend than the CPU's;
    ``unseen``: nor wants to know who runs it."""
    return not (
        is_dynamo_compiling()  # what else compiles has a dispatch mode on
        or _is_tracing()
        or _dispatch_modes()
        or (_function_modes() and not _of_default_device())
        or _transforming()
        or _lowering()
        or forward_ad._current_level >= 0
        or _sequence() is not None
        or ((wish._process if (own := _wish()) is _nothing else own) not in _OF_CPU)  # as `backends.forced` has it
        or (unseen and _watchers())
    )


def _of_default_device() -> bool:
    """Whether the only function mode is that of a default device which is the CPU (``torch.set_default_device``): it names the
    device of what is made without one, and has no part in a call on tensors of the CPU."""
    mode = _C._get_function_stack_at(0)
    return _function_modes() == 1 and type(mode) is DeviceContext and mode.device.type == "cpu"


# whether a tensor is what is_grads_batched=True makes of many: its type is Tensor's, and no mode or transform tells of it
is_batched = _C._functorch.is_legacy_batchedtensor

Node = TypeVar("Node", bound=type)


def heeds_forward(function: Node) -> Node:
    """An autograd function whose backward pass, whichever thread runs it, is forced to the backend that its forward pass was."""
    forward, backward = function.forward, function.backward  # type: ignore[attr-defined]

    def remembering(ctx: Any, *args: Any) -> Any:
        ctx.wish = backends.forced()
        return forward(ctx, *args)

    def heeding(ctx: Any, *grads: Any) -> Any:
        if backends.forced() == ctx.wish:
            return backward(ctx, *grads)
        with backends.heeding(ctx.wish):
            return backward(ctx, *grads)

    function.forward, function.backward = staticmethod(remembering), staticmethod(heeding)  # type: ignore[attr-defined]
    return function


def lean(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for plain calls (``plain_call``), without what torch asks around it, at either pass as long as the rest.

    It does not look for transforms, and a node of the graph calls ``backward`` itself.
    """
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def needs_plain_torch(tensors: Sequence[Tensor]) -> bool:
    """Whether a transform is active that an opaque op cannot follow: vmap, jvp, torch.func.grad, forward-mode AD.

    Asked while compiling as well: Dynamo knows the answer, but of an autograd function under a transform it keeps only the
    forward (pytorch#193279).
    """
    if _C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any([forward_ad.unpack_dual(t).tangent is not None for t in tensors])


def wants_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any([t.requires_grad for t in tensors])


def register_autograd(library: torch.library.Library, name: str, run: Callable[..., Any]) -> None:
    """What an op of a recorded program does where autograd or a transform has to see through it: ``run``, with its arguments."""
    op = getattr(torch.ops.fastseq, name).default

    def kernel(keyset: Any, *args: Any) -> Any:
        flops.announce()
        given = [t for arg in args for t in (arg if isinstance(arg, list) else (arg,)) if isinstance(t, Tensor)]
        if needs_plain_torch(given) or wants_gradient(given):
            return run(*args)
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _C._after_autograd_keyset, *args)

    library.impl(name, kernel, "Autograd", with_keyset=True)


_sharing = 0  # blocks that are entered, which what is compiled can see


def shared_sequence() -> Any:
    """The block of fastseq.distributed in which a call runs on this rank's part of a sequence, or None."""
    if not is_compiling():
        return sequence_context.get()
    if _sharing:
        raise RuntimeError("what shares a sequence with other ranks cannot be compiled: leave it out by torch.compiler.disable")
    return None


@contextmanager
def share(block: Any) -> Iterator[None]:
    """Within it ``block`` runs what takes a sequence; None: sequences are whole."""
    global _sharing
    token, before, _sharing = sequence_context.set(block), _sharing, int(block is not None)
    try:
        yield
    finally:
        sequence_context.reset(token)
        _sharing = before


def unshared() -> AbstractContextManager[None]:
    """A block in which sequences are whole: single steps, and what a rank computes of its part."""
    return nullcontext() if is_compiling() or sequence_context.get() is None else share(None)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. The first one brings the ops' sharding rules with it."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not isinstance(tensor, tensors.DTensor):
        return False
    sharding()
    return True


def sharding() -> Any:
    """What knows DTensors, which stands above the ops and is imported when it is needed."""
    _register_sharding()
    return sys.modules[_SHARDING]


_SHARDING = "fastseq.distributed.dtensor"


def _register_sharding() -> bool:
    importlib.import_module(_SHARDING).register()
    return True


# Dynamo calls it as it comes there: what torch.compiler.assume_constant_result says, which would import all of Dynamo
_register_sharding._dynamo_marked_constant = True  # type: ignore[attr-defined]
