"""Who runs a call, from the best source that knows: tuned on this device, shipped for its kind, else the default.

The default is torch's own kernel where torch has a fused one for the call, and ours where it falls back or has nothing. What is
decided is remembered: a warm call looks it up. A backend that is forced is no business of this file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from . import lengths, shipped, store
from .decision import MODES, SIZES, Call, Candidate, Decision, Point, Points, nearest, point_of, speed_of
from .device import Device, device_of, versions

# Octaves, in all sizes together, over which what was measured here tells of others; on a CPU fewer, as more is shipped for it.
REACH, CPU_OWN_REACH = 2.0, 1.0
# The same of what is shipped for a CPU: what is farther is ours. Of single steps the smallest and largest tell of all beyond.
CPU_REACH = {"attention": 3.0, "recurrent_cell": float("inf")}
OURS = (Candidate("cpu"), Candidate("torch"))
MET = 0.5  # octaves within which a call counts as met already
MOST = 4096  # decisions that are remembered
UNMEASURED = "no measurement for this device: torch's kernel; run python -m fastseq tune"
LACKING = "torch has no fused kernel for it"
_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # of the lengths

logger = logging.getLogger("fastseq")
# tunes a call that is met for the first time, and returns whether there is something new; None: nobody does
meet: Callable[[Call, torch.device], bool] | None = None

_rule: Callable[[Call], Candidate | None] | None = None
_tuned: dict[Device, dict[tuple[Any, ...], list[Point]]] | None = None
_layers: dict[tuple[Any, ...], bool] = {}
_may: dict[tuple[str, bool], bool] = {}
_forms: dict[tuple[Any, ...], str] = {}
_memories: list[dict[Any, Any]] = [_layers, _may, _forms]
_threads: int | None = None  # of torch's pool, for which what is remembered holds; None: for any number
_told: set[tuple[Any, ...]] = set()


def at_leisure() -> bool:
    """Whether a call can be met now; replaced together with `meet`."""
    return True


def remember(memory: dict[Any, Any], key: Any, value: Any) -> Any:
    """The value, from now on under the key, unless the call may be met at a better time."""
    if not at_leisure():
        return value
    if len(memory) >= MOST:
        memory.clear()
    memory[key] = value
    return value


def memory() -> dict[Any, Any]:
    """A dict that is emptied when decisions change."""
    made: dict[Any, Any] = {}
    _memories.append(made)
    return made


def forget() -> None:
    """Decide anew: the store or the rules have changed."""
    global _tuned, _threads
    _tuned, _threads = None, None
    for remembered in _memories:
        remembered.clear()


lengths._changed.append(forget)


@contextmanager
def instead(rule: Callable[[Call], Candidate | None]) -> Iterator[None]:
    """Within a ``with`` block ``rule`` decides the calls that it has an opinion on, in all threads: to measure."""
    global _rule
    before, _rule = _rule, rule
    forget()
    try:
        yield
    finally:
        _rule = before
        forget()


def decide(call: Call, device: torch.device, fused: bool, meeting: bool = True) -> Decision:
    """Who may run a call.

    Args:
        fused: torch has a kernel for it that does not fall back on several.
        meeting: this is where a call that was not met yet may be tuned.
    """
    if _rule is not None:
        candidate = _rule(call)
        if candidate is not None:
            return Decision((candidate,), "asked for", "asked for")
    here = device_of(device)
    found = _known(call, here, device, meeting)
    if found is None:
        if fused:
            found = Decision((Candidate("torch"),), "default", UNMEASURED)
        else:
            found = Decision((), "default", LACKING)
    kind = (*call.kin, device)
    if kind not in _told:
        _told.add(kind)
        logger.info("fastseq: %s on %s: %s (%s)", call, device, found.backend or "ours", found.about)
    return found


def is_tuned(call: Call, device: torch.device) -> bool:
    """Whether the very sizes of a call were measured here."""
    return any(point.sizes == call.sizes for point in tuned().get(device_of(device), {}).get(call.kin, ()))


def _known(call: Call, here: Device, device: torch.device, meeting: bool) -> Decision | None:
    """What was measured, here or elsewhere."""
    own, reach = tuned().get(here, {}), CPU_OWN_REACH if here.type == "cpu" else REACH
    point = nearest(own, call, reach)
    if meeting and meet is not None and nearest(own, call, MET) is None and meet(call, device):
        point = nearest(tuned().get(here, {}), call, reach)
    if point is not None:
        speed = speed_of(point.candidates)
        return Decision(point.candidates, "tuned", ", ".join(part for part in ("tuned here", speed, point.date) if part))
    if here.type == "cpu" and call.op == "recurrent" and call.kind in _CELLS and call.layout != "lengths" and call.lanes <= 2:
        return _by_length(call, here)
    points, words = shipped.points_for(here.type, here.name, here.level)
    if here.type != "cpu":
        point = nearest(points, call, reach)
    elif call.op not in CPU_REACH or not words:
        point = None
    else:
        likes = product((call.kind, lengths.LIKE.get(call.kind)), (call.dtype, lengths.LIKE.get(call.dtype)))
        calls = (call._replace(kind=kind, dtype=dtype) for kind, dtype in likes if kind and dtype)
        near = (nearest(points, other, CPU_REACH[call.op]) for other in calls)
        point = next((point for point in near if point is not None), Point(call.sizes, OURS, ""))
    return None if point is None else Decision(point.candidates, "shipped", f"shipped for {words}")


def _by_length(call: Call, here: Device) -> Decision | None:
    if here.level == "none":
        return None
    (batch, steps, hidden), gradients, table = call.sizes, call.mode == MODES[True], lengths.table()
    taken = table.steps(call.kind, getattr(torch, call.dtype), call.layout, call.lanes, batch, hidden, gradients)
    if taken.first <= steps <= taken.last:
        return Decision(
            (Candidate("torch"), Candidate("cpu")), "shipped", f"{lengths.words(taken, gradients)}, {_shipped(table.measured_on)}"
        )
    return Decision(OURS, "shipped", _shipped(table.measured_on))


def _shipped(words: str) -> str:
    return f"shipped for {words}" if words else "asked for"


def tuned() -> dict[Device, dict[tuple[Any, ...], list[Point]]]:
    """What was measured here with the programs of now, by device and `Call.kin`."""
    global _tuned, _threads
    if _tuned is None:
        found: dict[Device, dict[tuple[Any, ...], list[Point]]] = {}
        now = versions()
        for key, entry in store.read("tuned").items():
            try:
                device, of = Device(**entry["device"]), entry["versions"]
                call, point = point_of(entry)
            except (KeyError, TypeError, ValueError) as error:
                _warn(key, error)
                continue
            if of == now and point.candidates:
                found.setdefault(device, {}).setdefault(call.kin, []).append(point)
        _tuned = found
        if any(device.type == "cpu" for device in found) or meet is not None:
            _threads = torch.get_num_threads()
    return _tuned


def _warn(key: str, error: Exception) -> None:
    if ("entry", key) not in _told:
        _told.add(("entry", key))
        logger.warning("fastseq: entry %r of %s is ignored: %s", key, store.path("tuned"), error)


def layers_are_torchs(
    cell: str, dtype: torch.dtype, layout: str, lanes: int, batch: int, steps: int, hidden: int, gradients: bool
) -> bool:
    """Whether torch's LSTM, GRU or RNN of such layers is the one for a call on the CPU, whose library is loaded."""
    heed_threads()
    key = cell, dtype, layout, lanes, batch, steps, hidden, gradients
    known = _layers.get(key)
    if known is None:
        call = layers_call(cell, dtype, "", layout, lanes, batch, steps, hidden, gradients)
        return remember(_layers, key, decide(call, torch.device("cpu"), True).backend == "torch")
    return known


def form_of(
    backend: str,
    device: torch.device,
    cell: str,
    dtype: torch.dtype,
    precision: str,
    layout: str,
    lanes: int,
    batch: int,
    steps: int,
    hidden: int,
    gradients: bool,
) -> str:
    """The form or plan that a backend takes for recurrent layers; "": the one that it chooses itself."""
    key = backend, device, cell, dtype, precision, layout, lanes, batch, steps, hidden, gradients
    known = _forms.get(key)
    if known is None:
        call = layers_call(cell, dtype, precision, layout, lanes, batch, steps, hidden, gradients)
        candidates = decide(call, device, False, False).candidates
        known = remember(_forms, key, next((c.form for c in candidates if c.backend == backend), ""))
    return known


def may_be_torchs(op: str, gradients: bool) -> bool:
    """Whether anything that was measured gives such a call on the CPU to torch: if nothing does, its sizes need no look."""
    if _threads is not None:
        heed_threads()
    known = _may.get((op, gradients))
    return remember(_may, (op, gradients), _look(op, MODES[gradients])) if known is None else known


def least_of_torchs(op: str, gradients: bool, name: str) -> int:
    """The least size of that name (of SIZES) of such a call on the CPU that what was measured gives to torch; 0: nothing does, 1:
    any size may."""
    if _threads is not None:
        heed_threads()
    if not may_be_torchs(op, gradients):
        return 0
    if _rule is not None or meet is not None:
        return 1
    place = SIZES[op].index(name)
    return min((max(1, int(point.sizes[place] / 2**reach)) for point, reach in _torchs(op, MODES[gradients])), default=0)


def _look(op: str, mode: str) -> bool:
    return _rule is not None or meet is not None or any(True for _ in _torchs(op, mode))


def _torchs(op: str, mode: str) -> Iterator[tuple[Point, float]]:
    """What was measured that torch's kernel was the faster for, and the octaves over which that tells of other calls."""
    here = device_of(torch.device("cpu"))
    measured: tuple[tuple[Points, float], ...] = (
        (tuned().get(here, {}), CPU_OWN_REACH),
        (shipped.points_for(here.type, here.name, here.level)[0], CPU_REACH.get(op, CPU_OWN_REACH)),
    )
    for points, reach in measured:
        for kin, own in points.items():
            if kin[:2] == (op, mode):
                yield from ((point, reach) for point in own if point.candidates[0].backend == "torch")


def heed_threads() -> None:
    """Forget what was decided for another number of threads, where that matters."""
    if _threads is not None and torch.get_num_threads() != _threads:
        forget()
        tuned()


def layers_call(
    cell: str, dtype: torch.dtype, precision: str, layout: str, lanes: int, batch: int, steps: int, hidden: int, gradients: bool
) -> Call:
    name = str(dtype).removeprefix("torch.")
    return Call("recurrent", MODES[gradients], cell, name, precision, layout, lanes, (batch, steps, hidden))
