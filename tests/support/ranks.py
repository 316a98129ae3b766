"""Gloo processes on this machine that run functions of a test and stay for the next: a start costs seconds."""

from __future__ import annotations

import datetime
import faulthandler
import functools
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .poison import poison

MOST = 4
_START = 200.0  # seconds, on a machine that is busy with other tests
_PATIENCE = 5.0  # seconds that ranks get after one of them failed, and to write their stacks


class RankError(AssertionError):
    """What went wrong on the ranks, with their tracebacks."""


class Pool:
    """``run(function, *args, size=n)`` calls ``function(group, *args)`` on n processes and returns what each of them returned.

    The function is a plain one at the top of its file, its arguments and results can be pickled. Groups are of the first n
    processes; the world has ``MOST``. After an error the processes are started anew.
    """

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, size: int = 2, seconds: float = 120.0) -> list[Any]:
        """
        Raises:
            RankError: if a rank raised, died, or was not done in time; then with a stack of every rank.
        """
        if not self._processes:
            self._start()
        task = (function.__code__.co_filename, function.__qualname__, args, size)
        for pipe in self._pipes[:size]:
            pipe.send(task)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        while len(results) + len(failures) < size:
            waiting = {pipe: r for r, pipe in enumerate(self._pipes[:size]) if r not in results and r not in failures}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = self._stacks(list(waiting.values()))
                late = [f"rank {r} is not done\n{stack}" for r, stack in stacks.items()]
                early = [f"rank {r} raised\n{text}" for r, text in failures.items()]
                self.close()
                raise RankError("\n".join([*early, *late]))
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    failed, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failed, value = True, f"the process ended (exit code {self._code(rank)})"
                if failed:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + _PATIENCE)
                else:
                    results[rank] = value
        if failures:
            self.close()
            raise RankError("\n".join(f"rank {r} raised\n{text}" for r, text in sorted(failures.items())))
        return [results[r] for r in range(size)]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.device_mesh", "fastseq.distributed"])  # imported once for all
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_START):
                self.close()
                raise RankError(f"rank {rank} did not start within {_START} s")
            pipe.recv()

    def _code(self, rank: int) -> int | None:
        self._processes[rank].join(_PATIENCE)
        return self._processes[rank].exitcode

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        """Of every thread of these ranks, written by them when they get a signal."""
        assert self._folder is not None
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        paths = {rank: Path(self._folder.name, f"stack{rank}") for rank in ranks}
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and not all(p.exists() and p.stat().st_size for p in paths.values()):
            time.sleep(0.05)
        time.sleep(0.1)  # the last lines
        return {rank: path.read_text() if path.exists() else "" for rank, path in paths.items()}

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None


def _serve(rank: int, folder: str, pipe: Connection) -> None:
    """A process of the pool: it ends with the pipe."""
    torch.set_num_threads(1)
    poison(setattr)
    warnings.filterwarnings("error", module="fastseq")
    stacks = open(Path(folder, f"stack{rank}"), "w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=MOST,
        timeout=datetime.timedelta(seconds=120),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST + 1)}
    pipe.send("ready")
    while True:
        try:
            path, name, args, size = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, getattr(_module(path), name)(groups[size], *args)))
        except Exception:
            pipe.send((True, traceback.format_exc()))


@functools.cache
def _module(path: str) -> Any:
    """A test's file, which need not have a name that can be imported."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == path:
            return module
    spec = importlib.util.spec_from_file_location(f"ranks_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
