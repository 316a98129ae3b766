"""What the machine did during a timing: a GPU's readings from stand-ins of its tools, other programs, what follows for a row."""

from __future__ import annotations

import os
import queue
import signal
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from fastseq.benchmarks.measure import contention, gpu_clocks
from fastseq.benchmarks.measure.case import Case, Participant
from fastseq.benchmarks.measure.contention import Contention, Watch
from fastseq.benchmarks.measure.environment import Others
from fastseq.benchmarks.measure.gpu_clocks import Nvml, Reading
from fastseq.benchmarks.measure.runner import IN_VAIN, Runner
from fastseq.benchmarks.measure.timing import Effort
from fastseq.benchmarks.roofline.peaks import Peaks
from fastseq.benchmarks.workloads.base import Workload

NEW, OLD = gpu_clocks.FIELDS


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("1755, 1980, 0x0000000000000004", Reading(1755, 1980, 4)),
        ("345, 1410, 0x0000000000000001\r\n", Reading(345, 1410, 1)),
        ("[N/A], [N/A], [N/A]", Reading(None, None, None)),  # a GPU in MIG mode
        ("[N/A], 1980, [Insufficient Permissions]", Reading(None, 1980, None)),
        ("[Not Supported], [Not Supported], [GPU requires reset]", Reading(None, None, None)),
        ("No devices were found", None),
        (f'Field "{NEW}" is not a valid field to query.', None),
        ("Unable to determine the device handle for GPU0000:01:00.0: GPU is lost, reboot, now", None),
        ("", None),
    ],
)
def test_lines_of_nvidia_smi(line, found):
    assert Reading.parse(line) == found


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        (None, ()),
        (0x0, ()),
        (0x1 | 0x2 | 0x10 | 0x100, ()),  # idle, clocks that somebody set, other GPUs' clocks, a display
        (0x4, ("power",)),
        (0x8 | 0x40, ("hw slowdown", "hw thermal")),
        (0x1 | 0x20 | 0x80, ("sw thermal", "hw power brake")),
    ],
)
def test_idleness_is_no_throttling(mask, reasons):
    assert Reading(1000, 2000, mask).reasons == reasons


class Cuda:
    """What of torch.cuda names a device."""

    def __init__(self, **properties):
        self.properties = properties

    def get_device_properties(self, device):
        return SimpleNamespace(**self.properties)


BUS = {"pci_domain_id": 0, "pci_bus_id": 0x5D, "pci_device_id": 0}


def test_names_that_do_not_depend_on_which_gpus_are_visible():
    assert gpu_clocks.identity("cuda:1", Cuda(uuid="8f1c-42", **BUS)) == {
        "bus": "00000000:5d:00.0",
        "uuid": "GPU-8f1c-42",
        "index": "1",
    }
    assert gpu_clocks.identity("cuda", Cuda()) == {"index": "0"}


def program(folder, monkeypatch, *, field=NEW, line="1755, 1980, 0x0000000000000004", name="00000000:5d:00.0"):
    """An nvidia-smi that knows one GPU and one field, and notes its starts; in a loop it prints a line for each byte that comes
    through the pipe `ticks`, its clock sinking by 15 MHz a line, and does not mind that nobody listens."""
    text = f"""#!{sys.executable}
import os, sys, time
with open({str(folder / "pids")!r}, "a") as file:
    print(os.getpid(), file=file)
if "--id={name}" not in sys.argv:
    sys.exit("No devices were found")
query = next(a for a in sys.argv if a.startswith("--query-gpu="))
if not query.endswith(",{field}"):
    print(f'Field "{{query.split(",")[-1]}}" is not a valid field to query.')
    sys.exit(2)
assert "--format=csv,noheader,nounits" in sys.argv
clock, rest = {line!r}.split(",", 1)
if not any(a.startswith("--loop-ms=") for a in sys.argv):
    sys.exit(print(clock + "," + rest))
ticks = open({str(folder / "ticks")!r}, "rb", buffering=0)
while True:
    if not ticks.read(1):
        time.sleep(0.1)
        continue
    try:
        print(clock + "," + rest, flush=True)
    except OSError:
        pass
    clock = str(int(clock) - 15) if clock.isdigit() else clock
"""
    if not (folder / "ticks").exists():
        os.mkfifo(folder / "ticks")
    file = folder / "nvidia-smi"
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed


def pids(folder):
    return [int(line) for line in (folder / "pids").read_text().split()]


def until(happened):
    """Waits as long as it takes, on a machine as busy as it may be; pytest's own timeout ends it."""
    while not happened():
        time.sleep(0.01)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def case(watch, ticks, count):
    """What is found of a case during which nvidia-smi prints `count` lines."""
    watch.begin()
    ticks.write(b"." * count)
    until(lambda: len(watch.gpu._collected) == count)
    return watch.end()


@pytest.mark.parametrize(("field", "starts"), [(NEW, 2), (OLD, 3)])
def test_one_nvidia_smi_for_a_run(tmp_path, monkeypatch, field, starts):
    """Under both names of the field; it ends with the run."""
    program(tmp_path, monkeypatch, field=field)
    watch = Watch("cuda", gpu=gpu_clocks.find("cuda", Cuda(**BUS)), others=Quiet)
    with (tmp_path / "ticks").open("wb", buffering=0) as ticks:
        first, second = case(watch, ticks, 3), case(watch, ticks, 1)
    assert first.throttled == second.throttled == 1 and first.reasons == "power" and first.allowed == 1980
    assert (first.clock, second.clock) == (1740, 1710) and first.highest == second.highest == 1755
    assert first.trouble == "the GPU was throttled (power) in 100% of the readings, at 1740 of 1980 MHz"
    assert len(pids(tmp_path)) == starts, "the questions which field it knows, and the loop"
    watch.close()
    until(lambda: gone(pids(tmp_path)[-1]))


def test_readings_outside_of_a_case_are_not_counted():
    given = queue.Queue()

    def readings():
        while True:
            yield given.get()
            given.task_done()  # the one who collects has come for the next

    def take(*clocks):
        for clock in clocks:
            given.put(Reading(clock, 2000, 0))
        given.join()

    gpu = gpu_clocks.Gpu(SimpleNamespace(readings=readings, read=None, close=lambda: None))
    take(1000)
    gpu.begin()
    take(1100, 1200)
    found = gpu.end()
    take(1300)
    assert [reading.clock for reading in found] == [1100, 1200]
    gpu.begin()
    take(1400)
    assert [reading.clock for reading in gpu.end()] == [1400] and gpu.end() == []


def test_a_gpu_that_tells_nothing(tmp_path, monkeypatch):
    """Under MIG."""
    program(tmp_path, monkeypatch, line="[N/A], [N/A], [N/A]")
    watch = Watch("cuda", gpu=gpu_clocks.find("cuda", Cuda(**BUS)), others=Quiet)
    with (tmp_path / "ticks").open("wb", buffering=0) as ticks:
        found = case(watch, ticks, 2)
    watch.close()
    assert (found.clock, found.highest, found.throttled, found.reasons, found.trouble) == (None,) * 5


def test_no_nvidia_smi(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch)
    assert gpu_clocks.find("cuda", Cuda(pci_bus_id=7)) is None, "another GPU"
    program(tmp_path, monkeypatch, field="clocks.of.tomorrow")
    assert gpu_clocks.find("cuda", Cuda(**BUS)) is None
    (tmp_path / "nvidia-smi").unlink()
    assert gpu_clocks.find("cuda", Cuda(**BUS)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_no_gpu():
    assert gpu_clocks.find("cuda") is None and Watch("cpu").gpu is None


@pytest.mark.parametrize("hang_up", ["SIG_DFL", "SIG_IGN"])  # ignored under nohup
def test_nvidia_smi_ends_when_the_run_is_killed(tmp_path, monkeypatch, hang_up):
    program(tmp_path, monkeypatch)
    code = (
        f"import signal; signal.signal(signal.SIGHUP, signal.{hang_up})\n"
        "from fastseq.benchmarks.measure.gpu_clocks import Smi; import os, signal, time\n"
        "Smi({'bus': '00000000:5d:00.0'})\n"
        f"while len(open({str(tmp_path / 'pids')!r}).readlines()) < 2: time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -signal.SIGKILL
    until(lambda: gone(pids(tmp_path)[-1]))


class Fake:
    """A module like pynvml, of one GPU; `mask` and `supported` can change."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1

    def __init__(self, mask=0, supported=True):
        self.mask, self.supported, self.open = mask, supported, 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, name):
        if name != "00000000:5d:00.0":
            raise self.NVMLError("Not Found")
        return "handle"

    nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByIndex = nvmlDeviceGetHandleByPciBusId

    def _told(self, value, handle):
        assert handle == "handle"
        if not self.supported:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._told(1500, handle)

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return self._told(2000, handle)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._told(self.mask, handle)


def test_nvml_is_asked_where_it_is_installed(tmp_path, monkeypatch):
    program(tmp_path, monkeypatch)
    fake = Fake(mask=0x60)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    gpu = gpu_clocks.find("cuda", Cuda(**BUS))
    assert isinstance(gpu.source, Nvml) and fake.open == 1
    gpu.begin()
    found = gpu.end()  # sooner than the thread reads again
    assert found and set(found) == {Reading(1500, 2000, 0x60)} and found[0].reasons == ("sw thermal", "hw thermal")
    fake.supported = False
    assert gpu.source.read() == Reading(None, None, None)
    gpu.close()
    assert fake.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", Fake())
    other = gpu_clocks.find("cuda", Cuda(uuid="x"))
    assert other is None, "neither NVML nor this nvidia-smi knows that GPU"
    fake.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x4  # the newer name is preferred
    fake.supported = True
    assert Nvml(fake, {"bus": "00000000:5d:00.0"}).read().reasons == ("power",)


class Quiet:
    """In place of Others, with a share that is given."""

    def __init__(self, share=0.0):
        self.share = lambda: share


class Time:
    """In place of a clock: it stands still until somebody passes it on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Source:
    """In place of what reads a GPU: these readings, over and over."""

    def __init__(self, *readings):
        self.given = readings
        self.gpu = SimpleNamespace(begin=lambda: None, end=lambda: list(self.given), close=lambda: None)


def watched(seconds=1.0, others=0.0, readings=(), clocks=(2000.0, 3000.0)):
    passed, clock = Time(), iter(clocks)
    watch = Watch(
        "cpu",
        others=lambda: Quiet(others),
        cpu_clock=lambda: next(clock),
        gpu=Source(*readings).gpu if readings else None,
        now=passed,
    )
    watch.begin()
    passed.now += seconds
    return watch.end()


def test_other_programs_disturb_beyond_a_bound():
    assert watched(others=contention.OTHERS).trouble is None
    found = watched(others=0.234)
    assert found.trouble == "other programs used 23% of the CPU" and found.others == 0.234 and found.cpu_clock == 2500
    assert watched(others=0.9, seconds=contention.SHORTEST / 2).others is None, "the system's clock ticks are too coarse"
    assert watched(clocks=(None, None)).cpu_clock is None


def test_a_tenth_of_the_readings_may_be_throttled():
    good, bad, silent = Reading(1800, 1980, 1), Reading(1200, 1980, 0x24), Reading(None, None, None)
    found = watched(readings=[good] * 9 + [bad])
    assert found.throttled == 0.1 and found.trouble is None and found.reasons == "power, sw thermal"
    found = watched(readings=[good] * 3 + [bad] + [silent] * 50)
    assert (found.clock, found.highest, found.allowed, found.throttled) == (1800, 1800, 1980, 0.25)
    assert found.trouble == "the GPU was throttled (power, sw thermal) in 25% of the readings, at 1800 of 1980 MHz"
    both = watched(others=0.5, readings=[bad])
    assert " and the GPU was throttled" in both.trouble and both.severity == pytest.approx(10)


def test_a_cpu_that_is_slow_to_tell_its_clock_is_asked_once():
    for takes, times in ((2 * contention.DEAREST, 1), (contention.DEAREST / 2, 6)):
        asked, passed = [], Time()

        def clock(asked=asked, passed=passed, takes=takes):
            asked.append(True)
            passed.now += takes
            return 1000.0

        watch = Watch("cpu", cpu_clock=clock, others=Quiet, now=passed)
        for _ in range(3):
            watch.begin()
            watch.end()
        assert len(asked) == times


def test_watching_costs_little():
    """In time of this process's own, however busy the machine is."""
    watch, taken = Watch("cpu"), []
    for _ in range(5):
        start = time.thread_time()
        watch.begin()
        watch.end()
        taken.append(time.thread_time() - start)
    assert sorted(taken)[2] < 0.05


def test_programs_that_a_run_started_are_not_others():
    before = Others._times()[2]
    subprocess.run([sys.executable, "-S", "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    assert Others._times()[2] - before >= 0.25


class Machine:
    """In place of a Watch: shares of other programs, one for each timing."""

    def __init__(self, *shares):
        self.shares, self.begun = list(shares), 0

    def begin(self):
        self.begun += 1

    def end(self):
        return Contention(others=self.shares[self.begun - 1])

    def close(self):
        pass


def run(machine, monkeypatch, cases=1):
    """The rows of cases whose n-th timing takes n seconds, and what is said meanwhile."""
    w = Workload("lstm", 2, 1, 4, 4, "inference")
    case = Case("s", "g", (Participant("torch.nn.LSTM", w), Participant("fastseq.LSTM", w)), Effort(), check=False)
    runner = Runner("cpu", watch=machine)
    runner.peaks[w.threads, w.precision] = Peaks("cpu", 1, "float32", {1: 1e9, 9: 1e9}, {1: 1e9, 9: 1e9}, 1e9, {"operator": 1e-6})
    monkeypatch.setattr(
        runner, "_figures", lambda case, runs: {name: {"time": {"median": float(machine.begun)}} for name in runs}
    )
    said = []
    return [runner.run(case, said.append) for _ in range(cases)], said


def test_a_quiet_case_is_timed_once(monkeypatch):
    machine = Machine(0.05)
    ((one, other),), said = run(machine, monkeypatch)
    assert machine.begun == 1 and one.contended is None and one.contention["redone"] is None and one.contention["others"] == 0.05
    assert one.contention == other.contention and not any("once more" in step for step in said)


@pytest.mark.parametrize(
    ("shares", "kept", "contended"),
    [
        ((0.30, 0.02), 2, None),
        ((0.30, 0.20), 2, "other programs used 20% of the CPU"),
        ((0.30, 0.40), 1, "other programs used 30% of the CPU"),
    ],
)
def test_a_contended_case_is_timed_once_more_and_the_quieter_time_stays(shares, kept, contended, monkeypatch):
    machine = Machine(*shares)
    (rows,), said = run(machine, monkeypatch)
    assert machine.begun == 2 and any("timing once more, other programs used 30% of the CPU" in step for step in said)
    for row in rows:
        assert row.time == {"median": kept} and row.contended == contended
        assert row.contention["redone"] == "other programs used 30% of the CPU" and row.contention["others"] == shares[kept - 1]


def test_a_machine_that_is_never_quiet_does_not_double_a_run(monkeypatch):
    machine = Machine(*[0.5] * (2 * IN_VAIN + 2), 0.0, 0.5, 0.0)
    cases, _ = run(machine, monkeypatch, IN_VAIN + 4)
    redone = [rows[0].contention["redone"] is not None for rows in cases]
    assert redone == [True] * IN_VAIN + [False, False, False, True]  # the quiet one gives hope
    assert [bool(rows[0].contended) for rows in cases] == [True] * (IN_VAIN + 2) + [False, False]
