"""``FASTSEQ_TUNE=1``: a call is tuned when it is met first, unless somebody records, transforms or differentiates it."""

from __future__ import annotations

import atexit
import logging
import os
import threading

import torch
from torch import _C

from fastseq.choice import sources
from fastseq.choice.decision import Call
from fastseq.ops._dispatch import recorded, transforming

from . import problems
from .child import Bench
from .tuner import measured_and_stored

logger = logging.getLogger("fastseq")
_lock = threading.Lock()
_tried: set[tuple[Call, torch.device]] = set()
_said: set[str] = set()
_bench: Bench | None = None


def heed_environment() -> None:
    """
    Raises:
        ValueError: if ``FASTSEQ_TUNE`` is something else than 0 or 1.
    """
    value = os.environ.get("FASTSEQ_TUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTSEQ_TUNE must be 0 or 1, got {value!r}")
    if value == "1":
        sources.meet, sources.at_leisure = meet, at_leisure


def meet(call: Call, device: torch.device) -> bool:
    """Tune a call. Whether that was done; if not now, perhaps at the next meeting."""
    if (call, device) in _tried or problems.untunable(call) or not at_leisure():
        return False
    if not _lock.acquire(blocking=False):  # another thread measures, or what is measured asks
        return False
    try:
        _tried.add((call, device))
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            report = measured_and_stored([(call, device)], isolated=None, bench=_own_bench() if device.type != "cpu" else None)
        for row in report.rows:
            logger.info("fastseq: tuned %s: %s%s", call, row.new, "".join(f"; not {why}" for why in row.against))
        for _, why in report.skipped:
            logger.warning("fastseq: %s could not be tuned: %s", call, why)
        if report.unsaved and report.unsaved not in _said:
            _said.add(report.unsaved)
            logger.warning("fastseq: what was tuned holds for this process alone: %s", report.unsaved)
        return bool(report.rows)
    finally:
        _lock.release()


def at_leisure() -> bool:
    """Whether nobody compiles, traces, transforms, captures or differentiates what runs now."""
    if recorded() or transforming() or _C._len_torch_function_stack() or _C._current_graph_task_id() != -1:
        return False
    return not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing()


def _own_bench() -> Bench:
    global _bench
    if _bench is None:
        _bench = Bench(torch.get_num_threads())
        atexit.register(_bench.__exit__)
    return _bench
