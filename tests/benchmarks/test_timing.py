"""Clocks and the round-robin, on clocks that only the calls themselves advance."""

from __future__ import annotations

import pytest

from fastseq.benchmarks.measure.timing import Effort, Ratio, Timing, interleave
from fastseq.benchmarks.ops.timer import BenchmarkTimer
from fastseq.benchmarks.workloads.clocks import CudaClock, GraphClock, HostClock, IssueClock


class World:
    """A host and a device whose times advance only when something runs."""

    def __init__(self):
        self.host = 0.0
        self.device = 0.0
        self.log: list[str] = []

    def now(self) -> float:
        return self.host

    def work(self, name: str, host: float, device: float = 0.0):
        def run():
            self.log.append(name)
            self.host += host
            self.device += device

        return run


class FakeCuda:
    """The part of torch.cuda that the clocks use. Events take the device's time when recorded."""

    def __init__(self, world: World):
        self.world = world
        self.synchronized = 0
        cuda = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = cuda.world.device

            def elapsed_time(self, other):  # milliseconds
                assert cuda.synchronized
                return (other.at - self.at) * 1e3

        class Stream:
            def wait_stream(self, other):
                pass

        class Graph:
            calls: list = []

            def replay(self):
                for run in self.calls:
                    run()

        class Context:
            def __init__(self, graph=None):
                self.graph = graph

            def __enter__(self):
                cuda.capturing = self.graph
                return self

            def __exit__(self, *args):
                cuda.capturing = None

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, Graph
        self.stream = lambda stream: Context()
        self.graph = lambda graph: Context(graph)
        self.current_stream = Stream
        self.capturing = None

    def synchronize(self):
        self.synchronized += 1


def test_host_clock_is_the_mean_over_the_calls():
    world = World()
    clock = HostClock(world.now)
    assert clock.measure(world.work("a", 0.25), 4) == pytest.approx(0.25)
    assert world.log == ["a"] * 4


def test_cuda_clock_counts_device_time_between_its_events_only():
    world = World()
    cuda = FakeCuda(world)
    clock = CudaClock(cuda, flush_bytes=0)
    run = world.work("a", host=5.0, device=0.5)
    assert clock.measure(run, 3) == pytest.approx(0.5)
    assert cuda.synchronized == 1


def test_cuda_clock_flushes_before_each_call_outside_of_the_timing():
    world = World()
    clock = CudaClock(FakeCuda(world), flush_bytes=64, device="cpu")

    class Flushed:
        def zero_(self):
            world.log.append("flush")
            world.device += 7.0

    clock.flushed = Flushed()
    assert clock.measure(world.work("a", 0.0, 0.5), 2) == pytest.approx(0.5)
    assert world.log == ["flush", "a", "flush", "a"]


def test_graph_clock_captures_once_and_times_replays():
    world = World()
    cuda = FakeCuda(world)
    clock = GraphClock(cuda, flush_bytes=0)
    kernel = world.work("kernel", 0.0, 0.125)

    def run():  # in a capture the kernel is recorded, not executed
        cuda.capturing.calls.append(kernel) if cuda.capturing else kernel()

    replay = clock.prepare(run)
    warmed = len(world.log)
    assert clock.measure(replay, 4) == pytest.approx(0.125)
    assert len(world.log) == warmed + 4


def test_issue_clock_does_not_wait_for_the_device():
    world = World()
    cuda = FakeCuda(world)

    def slow_synchronize():
        world.host += 100.0

    cuda.synchronize = slow_synchronize
    assert IssueClock(cuda, world.now).measure(world.work("a", 0.5, 9.0), 2) == pytest.approx(0.5)


def test_rounds_take_turns_and_each_starts_with_another_provider():
    world = World()
    names = "abc"
    runs = {n: world.work(n, 1.0) for n in names}
    effort = Effort(seconds=1e9, min_rounds=3, max_rounds=3, sample_seconds=0.5)
    samples = interleave(runs, HostClock(world.now), effort)
    rounds = world.log[-9:]
    assert ["".join(rounds[i : i + 3]) for i in (0, 3, 6)] == ["abc", "bca", "cab"]
    assert {n: len(s.seconds) for n, s in samples.items()} == dict.fromkeys(names, 3)


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    world = World()
    runs = {"short": world.work("s", 0.001), "long": world.work("l", 1.0)}
    samples = interleave(runs, HostClock(world.now), Effort(max_rounds=5, sample_seconds=0.1))
    assert samples["short"].calls == 100
    assert samples["long"].calls == 1
    assert samples["short"].timing().median == pytest.approx(0.001)


def test_what_a_long_call_leaves_behind_is_not_charged_to_the_next():
    """Short calls that take longer after a long one, whose data are in the caches then."""
    world = World()

    def short(name: str):
        def run():
            world.host += 0.1 if world.log and world.log[-1].startswith("short") else 0.15
            world.log.append(name)

        return run

    runs = {"long": world.work("long", 10.0), "short one": short("short one"), "short other": short("short other")}
    samples = interleave(runs, HostClock(world.now), Effort(seconds=1e9, max_rounds=6, sample_seconds=0.01, precision=0.0))
    for name in ("short one", "short other"):
        assert samples[name].seconds[1:] == pytest.approx([0.1] * 5)


def test_it_stops_when_the_budget_is_spent_but_not_before_the_least_rounds():
    world = World()
    jitter = iter(range(10**6))

    def noisy():
        world.host += 1.0 + next(jitter) % 7

    samples = interleave({"n": noisy}, HostClock(world.now), Effort(seconds=4, min_rounds=4, max_rounds=50))
    assert len(samples["n"].seconds) == 4


def test_the_least_rounds_give_way_when_a_round_takes_far_too_long():
    world = World()
    effort = Effort(seconds=1.0, min_rounds=7, max_rounds=50, patience=5.0)
    samples = interleave({"slow": world.work("s", 3.0)}, HostClock(world.now), effort)
    assert len(samples["slow"].seconds) == 2


def test_it_stops_when_the_medians_are_known():
    world = World()
    samples = interleave(
        {"steady": world.work("s", 1.0)},
        HostClock(world.now),
        Effort(seconds=1e9, min_rounds=5, max_rounds=100),
    )
    assert len(samples["steady"].seconds) == 5


def test_a_drifting_clock_hits_both_alike():
    """Everything gets slower on the way; the ratio stays, since both are measured all along."""
    world = World()

    def drifting(cost: float):
        def run():
            world.host += cost * (1 + world.host / 100)

        return run

    samples = interleave(
        {"slow": drifting(2.0), "fast": drifting(1.0)},
        HostClock(world.now),
        Effort(seconds=150.0, min_rounds=5, max_rounds=1000, sample_seconds=0.1, precision=0.0),
    )
    slow, fast = samples["slow"].seconds, samples["fast"].seconds
    assert slow[-1] > 1.5 * slow[0]
    assert Ratio.of("slow", slow, fast).median == pytest.approx(2.0, rel=0.1)


def test_quantiles():
    timing = Timing.of([float(n) for n in range(1, 12)], calls=2)
    assert (timing.low, timing.median, timing.high, timing.fastest) == (3.0, 6.0, 9.0, 1.0)
    assert (timing.rounds, timing.calls) == (11, 2)


def test_benchmark_timer_moves_by_what_its_target_measured():
    world = World()
    timer = BenchmarkTimer(CudaClock(FakeCuda(world), flush_bytes=0))
    target = timer.target(world.work("a", host=3.0, device=0.25))
    before = timer()
    target()
    target()
    assert timer() - before == pytest.approx(0.5)


def test_benchmark_timer_without_a_clock_says_so():
    with pytest.raises(RuntimeError, match="no clock"):
        BenchmarkTimer().target(lambda: None)


def test_pytest_benchmark_takes_the_timer():
    """What pytest-benchmark does with a timer: read it, call the target, read it again."""
    fixture = pytest.importorskip("pytest_benchmark.fixture")
    assert hasattr(fixture.BenchmarkFixture, "pedantic")
    world = World()
    timer = BenchmarkTimer(HostClock(world.now))
    target, durations = timer.target(world.work("a", 2.0)), []
    for _ in range(3):
        start = timer()
        target()
        durations.append(timer() - start)
    assert durations == pytest.approx([2.0] * 3)
