"""The candidates of one call: each checked against the truth, then all timed in turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastseq.backends import watching
from fastseq.choice import sources
from fastseq.choice.decision import FIRST, Call, Candidate, ranked
from fastseq.testing import assert_all_close_to_truth, pooled_error

from . import problems

FEWEST_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 3, 7, 60  # the fewest of calls that take long
# Times the fastest's, in rounds, of which one in so many may be disturbed: then nothing is left to be decided.
CLEAR, CLEAR_ROUNDS, DISTURBED_OF = 1.15, 5, 8
SAMPLE = 3e-4  # seconds that a sample lasts at least
DISTURBED = 1.05  # times the least of the pilot's times: a round that a throttled clock or a busy neighbor slowed down
REPEATS = 3  # times as many rounds as wanted, at most, if some are disturbed
WARM = 0.05  # seconds of work after which a GPU's clock is up
LONG = 0.02  # seconds of a call that does not notice what others have left in the caches
OTHERS = 16 << 20  # bytes that other layers read between two calls which take a sample each

Said = Callable[[str, str], None]  # what is being done, and with which candidate


class Clock(NamedTuple):
    """Seconds of ``count`` calls in a row."""

    sample: Callable[[Callable[[], Any], int], float]
    pilot: Callable[[], Any] | None  # work that always takes as long, unless something slows the device down
    others: Callable[[], Any] | None = None  # fills the caches with what is no program's


class Time(NamedTuple):
    """Seconds of a call at the median, and the ``doubt`` of a `Candidate`."""

    seconds: float
    doubt: float = 0.0


def clock_of(device: torch.device) -> Clock:
    if device.type == "cuda":
        a = torch.randn(1024, 1024, device=device, dtype=torch.float16)
        return Clock(lambda run, count: _by_events(run, count, device), lambda: a @ a)
    # one thread's time is not a neighbor's; that of several is none of the calling thread alone
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def sample(run: Callable[[], Any], count: int) -> float:
        start = now()
        for _ in range(count):
            run()
        return now() - start

    return Clock(sample, None, torch.ones(OTHERS // 4).sum)


def _by_events(run: Callable[[], Any], count: int, device: torch.device) -> float:
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measured(
    call: Call, device: torch.device, seconds: float, without: Mapping[str, str], say: Said, by_name: bool = False
) -> list[Candidate]:
    """Every candidate of a call, with its time and error or with what is against it; the fastest first.

    Args:
        seconds: for the rounds.
        without: candidates that are not to be tried, and why.
        say: is told what begins, so that whoever waits knows what does not end.
        by_name: also which candidate begins, in every round, which takes some time itself.
    """
    found = [Candidate(**{**c._asdict(), "against": without.get(c.name, "")}) for c in _listed(call, device)]
    say("inputs", "")
    problem = problems.problem(call, device)
    truth, plain = _named(problem.truth()), _named(problem.torchs())
    programs: dict[str, Callable[[], Any]] = {}
    for place, candidate in enumerate(found):
        if candidate.against:
            continue
        say("check", candidate.name)
        with _taking(call, candidate):
            against = _ran_another(problem, candidate) or ""
            results = {} if against else _named(problem.ours())
        if not against:
            try:
                assert_all_close_to_truth(results, plain, truth)
            except AssertionError as error:
                against = f"wrong: {error}"
        found[place] = candidate._replace(against=against, error=None if against else pooled_error(results, truth))
        if not against:
            programs[candidate.name] = problem.ours
    say("time", "")
    times = in_turn(call, found, programs, clock_of(device), seconds, (lambda name: say("time", name)) if by_name else None)
    for place, candidate in enumerate(found):
        time = times.get(candidate.name)
        if time is not None:
            found[place] = candidate._replace(us=round(1e6 * time.seconds, 3), doubt=round(time.doubt, 4))
    return [*ranked(found), *(c for c in found if c.against)]


def _listed(call: Call, device: torch.device) -> list[Candidate]:
    return problems.candidates(problems.problem(call, device).query)


def _taking(call: Call, candidate: Candidate) -> Any:
    return sources.instead(lambda other: candidate if other.op in (call.op, "recurrent") else None)


def _ran_another(problem: problems.Problem, candidate: Candidate) -> str | None:
    ran: set[str] = set()
    with watching(lambda query, name: ran.add(name)):
        problem.ours()
    return None if candidate.backend in ran else f"{', '.join(sorted(ran)) or 'nothing'} ran in its place"


def _named(results: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {("output" if i == 0 else f"gradient {i}"): result.detach() for i, result in enumerate(results)}


def in_turn(
    call: Call,
    found: Sequence[Candidate],
    programs: Mapping[str, Callable[[], Any]],
    clock: Clock,
    seconds: float,
    begins: Callable[[str], None] | None = None,
) -> dict[str, Time]:
    """Of a call of each, over rounds in which every program has a turn, each round starting with another one."""
    of_name = {c.name: c for c in found}
    counts, before = {}, {}
    for name, run in programs.items():
        if begins is not None:
            begins(name)
        with _taking(call, of_name[name]):
            clock.sample(run, 1)
            once = clock.sample(run, 1)
            while clock.pilot is not None and clock.sample(run, 1) < WARM / 10 and once < WARM:
                once += clock.sample(run, max(1, round(WARM / 10 / max(once, 1e-6))))
            if once < LONG:
                once = min(once, clock.sample(run, 1))
        before[name] = once
        counts[name] = max(1, min(1000, math.ceil(SAMPLE / max(once, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in programs}
    pilots: list[float] = []
    with _no_garbage_collection():
        for turn in _turns(taken, counts, pilots, seconds):
            names = list(programs)
            first = turn % len(names)
            if clock.pilot is not None:
                pilots.append(clock.sample(clock.pilot, 4))
            for name in names[first:] + names[:first]:
                with _taking(call, of_name[name]):
                    if begins is not None:
                        begins(name)
                    # What is decided anew is no part of the time. A loop finds the caches as its last call left them; a call that
                    # takes a sample finds what is as large as its own there, which other layers read.
                    if before[name] < LONG:
                        programs[name]()
                        if counts[name] == 1 and clock.others is not None:
                            clock.others()
                    taken[name].append(clock.sample(programs[name], counts[name]) / counts[name])
    calm = _calm(pilots, len(next(iter(taken.values()), [])))
    quiet = {name: [sample for sample, own in zip(samples, calm, strict=True) if own] for name, samples in taken.items()}
    theirs = next((quiet[name] for name in quiet if of_name[name].backend == FIRST), None)
    return {
        name: Time(statistics.median(own), 0.0 if theirs is None or theirs is own else _doubt(own, theirs))
        for name, own in quiet.items()
    }


def _doubt(own: Sequence[float], theirs: Sequence[float]) -> float:
    """The third quartile of the ratios of both, round by round, over the median."""
    ratios = [a / b for a, b in zip(own, theirs, strict=True)]
    if len(ratios) < 2:
        return 0.0
    _, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return third / median - 1


def _turns(taken: Mapping[str, list[float]], counts: Mapping[str, int], pilots: Sequence[float], seconds: float) -> Iterator[int]:
    """Rounds, until those that count have taken as long as there is time for."""
    for turn in range(REPEATS * MOST_ROUNDS if taken else 0):
        calm = _calm(pilots, turn)
        spent = sum(sample * counts[name] for name, samples in taken.items() for sample in samples)
        enough = spent >= seconds or sum(calm) >= MOST_ROUNDS
        if _is_clear(list(taken.values()), calm):
            return
        long = spent >= REPEATS * seconds
        if (sum(calm) >= LEAST_ROUNDS and enough) or (long and (sum(calm) >= FEWEST_ROUNDS or turn >= REPEATS * LEAST_ROUNDS)):
            return
        yield turn


def _is_clear(samples: Sequence[Sequence[float]], calm: Sequence[bool]) -> bool:
    """Whether the same one was the fastest by far in nearly every round that nothing slowed down."""
    rounds = [row for row, quiet in zip(zip(*samples, strict=True), calm, strict=True) if quiet]
    if len(rounds) < CLEAR_ROUNDS or len(samples) < 2:
        return False
    best = min(range(len(samples)), key=lambda place: statistics.median(row[place] for row in rounds))
    others = [min(row[:best] + row[best + 1 :]) for row in rounds]
    doubtful = sum(CLEAR * row[best] > other for row, other in zip(rounds, others, strict=True))
    return doubtful <= len(rounds) // DISTURBED_OF


def _calm(pilots: Sequence[float], rounds: int) -> list[bool]:
    """Which rounds nothing slowed down; all of them if that cannot be told."""
    if not pilots:
        return [True] * rounds
    least = min(pilots)
    return [pilot <= DISTURBED * least for pilot in pilots]


class _no_garbage_collection:
    def __enter__(self) -> None:
        self.enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            gc.enable()
