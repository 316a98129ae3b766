"""A GPU's clock and its reasons to slow down, read a few times a second while something is timed.

Readings come from NVML, if the package nvidia-ml-py is installed, or from nvidia-smi, or from nowhere.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

PERIOD = 0.2  # seconds between readings
# Bits of NVML's mask that slow a GPU down against what it could do; idleness, clocks that somebody set and the like do not.
REASONS = {0x04: "power", 0x08: "hw slowdown", 0x20: "sw thermal", 0x40: "hw thermal", 0x80: "hw power brake"}
_BRACKETS = re.compile(r"\[.*\]")  # what nvidia-smi prints for a value that it cannot tell
FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the name since driver 535, and before


@dataclass(frozen=True)
class Reading:
    """MHz of the multiprocessors, now and at most, and the mask of reasons; None: the driver does not tell, as under MIG."""

    clock: float | None
    allowed: float | None
    mask: int | None

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(name for bit, name in REASONS.items() if (self.mask or 0) & bit)

    @classmethod
    def parse(cls, line: str) -> Reading | None:
        """A line of nvidia-smi such as "1755, 1980, 0x0000000000000004" or "[N/A], 1980, [N/A]"; None if it is no such line."""
        parts = [part.strip() for part in line.split(",")]
        try:
            clock, allowed, mask = (None if _BRACKETS.fullmatch(part) else part for part in parts)
            return cls(
                None if clock is None else float(clock),
                None if allowed is None else float(allowed),
                None if mask is None else int(mask, 16),
            )
        except ValueError:
            return None


class Nvml:
    """Reads through NVML: some 0.1 ms each."""

    def __init__(self, module: Any, names: dict[str, str]) -> None:
        """Raises `module.NVMLError` if there is no driver or no such GPU."""
        self.module = module
        module.nvmlInit()
        by = {
            "bus": module.nvmlDeviceGetHandleByPciBusId,
            "uuid": module.nvmlDeviceGetHandleByUUID,
            "index": lambda index: module.nvmlDeviceGetHandleByIndex(int(index)),
        }
        kind, name = next(iter(names.items()))
        self.handle = by[kind](name)
        newer = getattr(module, "nvmlDeviceGetCurrentClocksEventReasons", None)
        self.mask = newer or module.nvmlDeviceGetCurrentClocksThrottleReasons

    def read(self) -> Reading:
        sm = self.module.NVML_CLOCK_SM
        return Reading(
            self._told(self.module.nvmlDeviceGetClockInfo, sm),
            self._told(self.module.nvmlDeviceGetMaxClockInfo, sm),
            self._told(self.mask),
        )

    def _told(self, ask: Callable[..., Any], *more: Any) -> Any:
        try:
            return ask(self.handle, *more)
        except self.module.NVMLError:
            return None

    def readings(self) -> Iterator[Reading]:
        while True:
            yield self.read()
            time.sleep(PERIOD)

    def close(self) -> None:
        with suppress(self.module.NVMLError):
            self.module.nvmlShutdown()


class Smi:
    """One nvidia-smi for the whole run, which prints a line every PERIOD: starting it takes longer than many a case.

    Its output is a pseudo-terminal, since into a pipe it writes in blocks of many lines. As its controlling terminal it ends it
    with a hang-up however this process ends.
    """

    def __init__(self, names: dict[str, str]) -> None:
        """Raises OSError if there is no nvidia-smi, or none that knows the GPU and a field of FIELDS, or no pseudo-terminal."""
        if not hasattr(os, "openpty"):
            raise OSError("this system has no pseudo-terminals")
        import fcntl
        import termios

        def take_terminal() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which long runs go on, leaves it ignored
            fcntl.ioctl(1, termios.TIOCSCTTY, 0)

        command = ("nvidia-smi", f"--id={next(iter(names.values()))}", "--format=csv,noheader,nounits")
        for reasons in FIELDS:
            query = f"--query-gpu=clocks.sm,clocks.max.sm,{reasons}"
            try:
                once = subprocess.run((*command, query), capture_output=True, text=True, timeout=10)
            except subprocess.TimeoutExpired as error:
                raise OSError("nvidia-smi does not answer") from error
            if once.returncode == 0 and Reading.parse(once.stdout):
                break
        else:
            raise OSError("nvidia-smi does not tell the clocks of this GPU")
        self.terminal, theirs = os.openpty()
        try:
            self.process = subprocess.Popen(
                (*command, query, f"--loop-ms={1000 * PERIOD:.0f}"),
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=take_terminal,
            )
        finally:
            os.close(theirs)

    read = None  # nothing that could be asked at once

    def readings(self) -> Iterator[Reading]:
        with suppress(OSError), open(self.terminal, encoding="ascii", errors="replace") as lines:  # it ends with an OSError
            for line in lines:
                found = Reading.parse(line)
                if found:
                    yield found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Gpu:
    """Collects readings between `begin` and `end`.

    A thread takes them, five in a second: a GPU has a clock only while it works, so that a look before and after would see an
    idle one. Reading leaves the GPU alone. It holds Python's lock for some 50 us each, which delays one sample of a timing in
    many, and so no median; an nvidia-smi that prints has a process of its own.
    """

    def __init__(self, source: Nvml | Smi) -> None:
        self.source = source
        self._collected: list[Reading] | None = None
        self._closed = False
        threading.Thread(target=self._collect, daemon=True, name="clocks of the GPU").start()

    def _collect(self) -> None:
        for reading in self.source.readings():
            if self._closed:
                return
            collected = self._collected
            if collected is not None:
                collected.append(reading)

    def begin(self) -> None:
        self._collected = []

    def end(self) -> list[Reading]:
        """At least one reading if the source can be asked at once; clocks do not sink within a millisecond."""
        found, self._collected = self._collected or [], None
        return found or ([self.source.read()] if self.source.read else [])

    def close(self) -> None:
        self._closed = True
        self.source.close()


def find(device: str, cuda: Any = None) -> Gpu | None:
    """Of a CUDA device; None where neither NVML nor nvidia-smi can be asked about it."""
    try:
        names = identity(device, torch.cuda if cuda is None else cuda)
    except (AssertionError, RuntimeError):  # torch sees no such device
        return None
    try:
        module = importlib.import_module("pynvml")
    except ImportError:
        module = None
    if module is not None:
        with suppress(module.NVMLError):
            return Gpu(Nvml(module, names))
    with suppress(OSError):
        return Gpu(Smi(names))
    return None


def identity(device: str, cuda: Any) -> dict[str, str]:
    """What the driver's tools call it, the surest name first: they number all GPUs, CUDA_VISIBLE_DEVICES renumbers some."""
    p, names = cuda.get_device_properties(device), {}
    if hasattr(p, "pci_bus_id"):  # of the whole GPU, where a slice of it has a uuid of its own
        names["bus"] = f"{getattr(p, 'pci_domain_id', 0):08x}:{p.pci_bus_id:02x}:{getattr(p, 'pci_device_id', 0):02x}.0"
    if hasattr(p, "uuid"):
        names["uuid"] = f"GPU-{p.uuid}"
    names["index"] = str(torch.device(device).index or 0)
    return names
