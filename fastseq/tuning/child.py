"""Measuring in a process of its own, which may hang or crash: the process, and whoever waits for it.

A request is a line of JSON on its standard input, an answer one or several on its standard output: ``{"at": what, "candidate":
name}`` as each part begins, last ``{"found": [candidates]}`` or ``{"failed": sentence}``.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import IO, Any

import torch

from fastseq.choice.decision import Call, Candidate

START_SECONDS = 120.0  # until the process is there
PART_SECONDS = 60.0  # that one part may take: Triton compiles within it


class Failed(RuntimeError):
    """A call could not be measured at all, for this reason."""


class Bench:
    """Measures calls in a process that is started anew when it hangs or crashes. A context manager.

    Args:
        threads: of torch's pool there.
        setup: "module:function" that the process calls first, for stand-ins.
        part_seconds: that one part of the work may take.
    """

    def __init__(self, threads: int, setup: str = "", part_seconds: float = PART_SECONDS) -> None:
        self.threads, self.setup, self.part_seconds = threads, setup, part_seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def measured(self, call: Call, device: torch.device, seconds: float) -> list[Candidate]:
        """As `measure.measured`; what hangs or crashes is tried once.

        Raises:
            Failed: if what hangs or crashes is no candidate.
        """
        without: dict[str, str] = {}
        by_name = False
        while True:
            request = {"call": call._asdict(), "device": str(device), "seconds": seconds, "without": without, "by_name": by_name}
            part, candidate, why, found = self._ask(request, seconds)
            if found is not None:
                return found
            if part == "time" and not by_name:
                by_name = True  # who of those in turn it was is told then
            elif not candidate or candidate in without:
                raise Failed(why)
            else:
                without[candidate] = why

    def _ask(self, request: dict[str, Any], seconds: float) -> tuple[str, str, str, list[Candidate] | None]:
        """The part and the candidate at which it ended, why, and what was found."""
        started = self._process is None
        if started:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        part, candidate = "starting", ""
        limit = START_SECONDS if started else self.part_seconds
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            return part, candidate, f"the process had ended ({self._end()})", None
        while True:
            try:
                line = self._lines.get(timeout=limit)
            except queue.Empty:
                self._end()
                return part, candidate, f"{part} took longer than {limit:.0f} s", None
            if line is None:
                return part, candidate, f"{part} ended the process ({self._end()})", None
            answer = json.loads(line)
            if "found" in answer:
                return "", "", "", [Candidate(**row) for row in answer["found"]]
            if "failed" in answer:
                return part, candidate, answer["failed"], None
            part, candidate = answer["at"], answer["candidate"]
            limit = self.part_seconds + 10 * seconds

    def _start(self) -> None:
        environment = os.environ | {"FASTSEQ_TUNE": "0", "FASTSEQ_BACKEND": "", "OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-m", "fastseq.tuning.child", str(self.threads), self.setup]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
        )
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()

    def _end(self) -> str:
        """End the process; how it had ended, in words."""
        process, self._process = self._process, None
        if process is None:
            return ""
        if process.poll() is None:
            try:
                process.wait(0.2)  # whose output has ended
            except subprocess.TimeoutExpired:
                process.kill()
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what was not written yet
                    pass
        return signal.Signals(-code).name if code < 0 else f"status {code}"


def _read(stream: IO[str] | None, lines: queue.SimpleQueue[str | None]) -> None:
    assert stream is not None
    try:
        for line in stream:
            lines.put(line)
    except ValueError:  # closed meanwhile
        pass
    lines.put(None)


def main(threads: str, setup: str) -> None:
    answers = os.fdopen(os.dup(1), "w")  # what kernels and libraries print goes elsewhere
    os.dup2(2, 1)
    if setup:
        module, _, function = setup.partition(":")
        getattr(importlib.import_module(module), function)()
    from . import measure

    torch.set_num_threads(int(threads))

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    for line in sys.stdin:
        request = json.loads(line)
        call = Call(**{**request["call"], "sizes": tuple(request["call"]["sizes"])})
        device, seconds, without = torch.device(request["device"]), request["seconds"], request["without"]
        try:
            found = measure.measured(
                call, device, seconds, without, lambda at, name: answer(at=at, candidate=name), request["by_name"]
            )
        except Exception as error:  # whatever a kernel raises, the next call may do better
            answer(failed=f"{type(error).__name__}: {error}")
        else:
            answer(found=[candidate._asdict() for candidate in found])


if __name__ == "__main__":
    main(*sys.argv[1:3])
