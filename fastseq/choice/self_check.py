"""Whether a GPU's kernels compute on this very device what the reference computes: found out once, before they are trusted.

A family is what stands or falls together: a backend's kernels for one direction of an op, by cell or features, dtype, form and
widths. The first call of one runs small `problems` first, which takes seconds, and those of the passes that follow it, as a
backward pass on a GPU has a thread of its own. A family that is wrong is off on this device: one warning gives the first wrong
numbers, and the next backend serves. What was found is kept in the store, under the device, the driver, torch, Triton and this
very build of the kernels; the mark that a check began tells the next process of a kernel that took the last one down.

It never runs while a CUDA graph is captured, while torch.compile traces, or in a thread of autograd: until it has run, the next
backend serves. ``FASTSEQ_SELF_CHECK``: 0 trusts every kernel, 1 (the default) is this, force checks again in this process. A
backend that is forced is taken as it is.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .._version import __version__
from . import sources, store
from .decision import Candidate
from .problems import Untried, families, needed, problems_of

CHECKED: dict[str, tuple[str, ...]] = {"triton": ("cuda",), "cuda": ("cuda",)}  # backends, and the devices that are to be tried
MODES = ("0", "1", "force")
_PROCESS = f"{os.getpid()}-{time.time_ns()}"  # a container gives the same number again
_MOST_WORDS = 300  # letters
_MOST_KNOWN = 4096  # queries that are remembered as trusted
logger = logging.getLogger("fastseq")


class Verdict(NamedTuple):
    right: bool
    words: str = ""  # what was wrong: the problem, the first wrong number and its bound
    date: str = ""
    tried: bool = True  # False: it could not be, for want of memory, say; this process alone remembers that

    @property
    def sentence(self) -> str:
        """Why a family is off."""
        return f"{'was wrong' if self.tried else 'could not be tried'} in its self-check on this device: {self.words}"


_verdicts: dict[str, Verdict] = {}  # of this process, by `_key`
_trusted: set[tuple[str, Any]] = set()  # backends and queries that need no second look
_revision = 0  # of the store, when they did not
_running = threading.Lock()
_looking: ContextVar[bool] = ContextVar("fastseq_self_check_looking", default=False)


@contextmanager
def known_alone() -> Iterator[None]:
    """Within a ``with`` block nothing is tried: what has no verdict is taken as right."""
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)


def mode() -> str:
    """
    Raises:
        ValueError: if FASTSEQ_SELF_CHECK is none of `MODES`.
    """
    chosen = os.environ.get("FASTSEQ_SELF_CHECK") or "1"
    if chosen not in MODES:
        raise ValueError(f"FASTSEQ_SELF_CHECK={chosen} is none of {', '.join(MODES)}")
    return chosen


def against(backend: ModuleType, query: Any, reference: ModuleType) -> list[str]:
    """Why a backend that can run a call must not on this device; empty if it may. Checks it if that is still to be done.

    Args:
        backend, reference: modules with a function for each op and direction.
    """
    global _revision
    if (backend.name, query) in _trusted and store.revision() == _revision:
        return []
    if query.device.type not in CHECKED.get(backend.name, ()) or mode() == "0":
        return []
    wanted = [_key(backend, query, family) for family in needed(query)]
    if any(_known(key) is None for key in wanted):
        obstacle = _obstacle(query.device)
        if obstacle:
            return [f"its self-check on this device has not run yet, and does not {obstacle}"]
        if _looking.get():
            return []
        if not _running.acquire(blocking=False):
            return ["its self-check runs in another thread"]
        try:
            check(backend, query, reference)
        finally:
            _running.release()
    wrong = [verdict.sentence for key in wanted if (verdict := _known(key)) is not None and not verdict.right]
    if not wrong:
        if len(_trusted) >= _MOST_KNOWN or store.revision() != _revision:  # what was tuned meanwhile may take another form
            _trusted.clear()
            _revision = store.revision()
        _trusted.add((backend.name, query))
    return wrong


def check(backend: ModuleType, query: Any, reference: ModuleType) -> dict[str, Verdict]:
    """Try the families of a query that have no verdict; the verdicts of all of them, by name. What the backend cannot run is
    right, as nothing can be wrong with it."""
    found = {}
    for family in families(query):
        key = _key(backend, query, family)
        verdict = _known(key)
        if verdict is None:
            began = {"began": _now(), "process": _PROCESS, "pid": os.getpid(), "node": platform.node()}
            store.update("self_check", {key: began})
            try:
                verdict = _tried(backend, query, reference, family)
            except BaseException:
                store.update("self_check", {key: {"left": _now()}})  # whoever interrupts does not say that it is wrong
                raise
            if verdict.tried:
                _keep(key, verdict)
            else:
                _verdicts[key] = verdict
                store.update("self_check", {key: {"left": verdict.date}})
            if not verdict.right:
                _warn(key, verdict)
        found[family] = verdict
    return found


def known(device: torch.device) -> list[tuple[str, Verdict]]:
    """What this machine knows of a device: families in words and their verdicts, those that are wrong first."""
    place, found = _place(device) + " | ", []
    for key in store.read("self_check").keys() | _verdicts.keys():
        verdict = _known(key) if key.startswith(place) else None
        if verdict is not None:
            found.append((key.rpartition(" | ")[2], verdict))
    return sorted(found, key=lambda each: (each[1].right, each[0]))


def forget() -> None:
    """What this process remembers; the store stays."""
    _verdicts.clear()
    _trusted.clear()


def _tried(backend: ModuleType, query: Any, reference: ModuleType, family: str) -> Verdict:
    with _as_by_default(), _formed(backend, query, family):
        try:
            for problem in problems_of(query, family, _coarse(query)):
                if not backend.why_not(problem.query):
                    problem.check(backend, reference)
        except (Untried, torch.OutOfMemoryError) as error:
            return Verdict(False, _line_of(error), _now(), tried=False)
        except Exception as error:  # whatever a kernel that is not right does
            return Verdict(False, _line_of(error), _now())
    return Verdict(True, "", _now())


@contextmanager
def _as_by_default() -> Iterator[None]:
    """Whatever the caller has set: default devices, modes that look on, a demand for deterministic algorithms."""
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with torch.no_grad(), torch.device("cpu"), _disable_current_modes():
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)


def _formed(backend: ModuleType, query: Any, family: str) -> AbstractContextManager[None]:
    """Problems of few steps are run in the form that was measured to be the fastest for the query."""
    form = backend.form(query, family) if hasattr(backend, "form") else ""
    chosen = Candidate(backend.name, form)
    return sources.instead(lambda call: chosen if call.op == "recurrent" else None) if form else nullcontext()


def _line_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    said = isinstance(error, (AssertionError, Untried))
    return (lines[0] if said else f"{type(error).__name__}: {lines[-1]}")[:_MOST_WORDS]


def _warn(key: str, verdict: Verdict) -> None:
    place, _, family = key.rpartition(" | ")
    logger.warning(
        "fastseq: kernels are off on this device: %s %s. Others serve. Please report this, with the output of `python -m fastseq "
        "info` (%s). FASTSEQ_SELF_CHECK=force checks again.",
        family,
        verdict.sentence,
        place,
    )


def _obstacle(device: torch.device) -> str:
    """When it must not run: a clause after "does not"."""
    if torch.compiler.is_compiling():
        return "while torch.compile traces"
    if isinstance(threading.current_thread(), threading._DummyThread):
        return "in a thread of autograd"
    if _capturing(device):
        return "while a CUDA graph is captured"
    return ""


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _coarse(query: Any) -> bool:
    """Whether products of fp32 are TF32's, by torch's flags."""
    if query.dtype != torch.float32 or query.device.type != "cuda":
        return False
    flags = torch.backends.cudnn.rnn if query.op == "recurrent" else torch.backends.cuda.matmul
    return getattr(flags, "fp32_precision", "tf32") == "tf32"


# what a verdict is about


def family_of(backend: ModuleType, query: Any, family: str) -> str:
    """In words: what has a verdict of its own."""
    dtype = str(query.dtype).removeprefix("torch.") + (" in tf32" if _coarse(query) else "")
    variant = backend.variant(query, family) if hasattr(backend, "variant") else ""
    if query.op == "recurrent":
        facts = {"projected": query.projected, "zoneout": query.zoned, "resets": query.resets}
        used = [query.cell, *[name for name, given in facts.items() if given]]
    elif query.op == "scan":
        used = [query.kind, *([] if query.layout == "padded" else [query.layout]), *query.uses]
    else:
        window = {(-1, -1): [], (-1, 0): ["causal"]}.get(query.window, ["window"])
        layout = [] if query.layout in ("padded", "contiguous") else [query.layout]
        grouped = ["grouped"] if query.heads[0] != query.heads[1] else []
        used = [*layout, *window, *grouped, *sorted(query.uses)] or ["plain"]
    return f"{backend.name}: {query.op} {family}, {' '.join(used)}, {dtype}" + (f", {variant}" if variant else "")


def _key(backend: ModuleType, query: Any, family: str) -> str:
    return f"{_place(query.device)} | {_build(backend.name)} | {family_of(backend, query, family)}"


@cache
def _place(device: torch.device) -> str:
    name, capability = device.type, ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, capability = torch.cuda.get_device_name(device), f"sm_{major}{minor}"
    driver = re.search(r"Kernel Module[^\n]*?\s(\d+\.\d+(?:\.\d+)?)\s", _text("/proc/driver/nvidia/version"))
    return " | ".join(filter(None, (name, capability, f"driver {driver[1]}" if driver else "")))


@cache
def _build(backend: str) -> str:
    """Versions, and a mark of the files that the kernels come from: another build of the same version may be another kernel."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    package = Path(__file__).parents[1]
    kernels = package / "kernels" if (package / "kernels" / "recurrent").is_dir() else package.parent / "kernels"
    files = sorted(kernels.rglob("*.py")) if backend == "triton" else sorted((package / "lib").glob("*.so"))
    marks = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    mark = hashlib.sha256("\n".join(marks).encode()).hexdigest()[:12]
    return f"fastseq {__version__} {mark}, torch {torch.__version__}, triton {triton}"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


# what is known


def _known(key: str) -> Verdict | None:
    """The verdict of this process, else of the store. One that began in a process that is gone is wrong."""
    verdict = _verdicts.get(key)
    if verdict is not None or mode() == "force":
        return verdict
    entry = store.read("self_check").get(key)
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("right"), bool):
        verdict = Verdict(entry["right"], str(entry.get("words", "")), str(entry.get("date", "")))
    elif "began" in entry and entry.get("node") == platform.node() and not _runs(entry):
        verdict = Verdict(False, f"the process that checked it on {entry.get('began')} crashed or was ended", _now())
        _keep(key, verdict)
    else:
        return None
    _verdicts[key] = verdict
    if not verdict.right:
        _warn(key, verdict)
    return verdict


def _runs(entry: dict[str, Any]) -> bool:
    """Whether the process of a mark is there."""
    if entry.get("process") == _PROCESS:
        return True
    pid = entry.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _keep(key: str, verdict: Verdict) -> None:
    _verdicts[key] = verdict
    store.update("self_check", {key: {"right": verdict.right, "words": verdict.words, "date": verdict.date}})


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
