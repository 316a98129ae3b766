from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastseq.backends import library
from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import _plain, check_provider
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.providers.limits import LIMIT_PROVIDERS, no_fma
from fastseq.benchmarks.report.model import Cell
from fastseq.benchmarks.roofline import model, peaks
from fastseq.benchmarks.suites import SUITES
from fastseq.benchmarks.suites import limits as suite
from fastseq.benchmarks.workloads import limits
from fastseq.benchmarks.workloads.limits import EXCHANGES, FMA_DTYPES, TORCH, LimitWorkload

SMALL = {
    "read": LimitWorkload("read", 6, 2, 64, 64, threads=2),
    "copy": LimitWorkload("copy", 3, 1, 64, 64),
    "product": LimitWorkload("product", 1, 1, 96, 96),
    "launch": limits.launch("cpu", 1),
}
PEAKS = peaks.Peaks("cpu", 1, "float32", {16: 1e11, 65536: 1e11}, {256: 4e10, 65536: 2e10}, 1e11, {"operator": 1e-6})
RATES = {"read": 1e11, "copy": 2e10, "product": 1e11, "fma": 4e11, "launch": 1e6}
FMA = replace(limits.fma("cpu", 2), T=1000)
needs_library = pytest.mark.skipif(library.reason() is not None, reason=f"make library: {library.reason()}")


def text(cell):
    return cell.text if isinstance(cell, Cell) else cell


def table(results, title):
    (section,) = suite.present(results)
    return next((t for t in section.tables if t.title.startswith(title)), None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("function", TORCH)
def test_every_program_passes_the_gate(function, dtype):
    w = replace(SMALL[function], dtype=dtype)
    (provider,) = (p for p in LIMIT_PROVIDERS.values() if p.function == function)
    result = check_provider(lambda shape: (provider.build(shape), ""), w)
    assert result.ok, result.reason


@pytest.mark.parametrize(
    ("function", "program"),
    [
        ("read", lambda w, a: lambda: a[1:].expand(w.T, len(a) - 1).sum(1)),  # not every byte
        ("copy", lambda w, a: lambda: a.clone().index_fill_(0, torch.tensor(len(a) // 2), 0.0)),
        ("product", lambda w, a: lambda: torch.mm(a, a.T)),
        ("launch", lambda w, a: lambda: torch.full_like(a, torch.nan)),
    ],
)
def test_a_program_that_does_less_is_refused(function, program):
    assert not check_provider(lambda shape: (program, ""), SMALL[function]).ok


@needs_library
def test_the_library_has_the_multiply_adds():
    assert no_fma(FMA) == ""


@needs_library
@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", FMA_DTYPES)
def test_multiply_adds_are_counted_by_their_result(level, dtype, monkeypatch):
    monkeypatch.setenv("FASTSEQ_CPU_LEVEL", level)
    if torch.ops.fastseq_native.cpu_level() != level:
        pytest.skip(f"this processor has no {level}")
    provider = LIMIT_PROVIDERS["fastseq fma"]
    for w in (replace(FMA, dtype=dtype), replace(FMA, dtype=dtype, B=5, T=limits.FMA_STEPS)):
        result = check_provider(lambda shape: (provider.build(shape), ""), w)
        assert result.ok and result.error == 0, result.reason
    start = torch.randn(3, 384, dtype=torch.float64).to(getattr(torch, dtype))
    found = torch.empty_like(start)
    torch.ops.fastseq_native.fma(start, 0.5, -3.0, 2, found)
    torch.testing.assert_close(found, start / 4 - 4.5)


@pytest.mark.parametrize(
    "program",
    [
        lambda w, a: lambda: a + (w.T - 1),
        lambda w, a: lambda: (a + w.T).index_copy_(1, torch.tensor([w.H - 1]), a[:, -1:]),
        lambda w, a: lambda: (a + w.T).index_fill_(0, torch.tensor([w.B - 1]), torch.nan),
    ],
    ids=["a step less", "one chain removed", "one thread less"],
)
def test_fewer_multiply_adds_are_refused(program):
    w = limits.fma("cpu", 2)
    right = check_provider(lambda shape: (lambda w, a: lambda: a + w.T, ""), w)
    assert right.ok and not check_provider(lambda shape: (program, ""), w).ok


@needs_library
def test_the_raw_op_refuses_what_does_not_fit():
    right = torch.zeros(2, 384)

    def call(start=right, results=right, steps=1):
        torch.ops.fastseq_native.fma(start, 1.0, 1.0, steps, results)

    call()
    for wrong, message in (
        ({"start": torch.zeros(2, 384, dtype=torch.bfloat16)}, "must be float32 or float64"),
        ({"results": torch.zeros(2, 384, dtype=torch.float64)}, "of one shape and dtype"),
        ({"results": torch.zeros(384, 2).T}, "must be contiguous"),
        ({"start": torch.zeros(384), "results": torch.zeros(384)}, r"\[parts, count\]"),
        ({"start": torch.zeros(2, 380), "results": torch.zeros(2, 380)}, "a part must be a multiple of [0-9]+ bytes, got 1520"),
        ({"steps": -1}, "steps must not be negative, got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


def test_multiply_adds_that_cannot_be_measured_say_why(monkeypatch):
    assert "float32 and float64" in no_fma(replace(FMA, dtype="bfloat16"))
    assert "on a CPU" in no_fma(replace(FMA, device="cuda"))
    monkeypatch.setattr(library, "reason", lambda: "there is no library (`make library`)")
    assert "make library" in LIMIT_PROVIDERS["fastseq fma"].unavailable(FMA)


def test_what_a_call_does_is_counted():
    assert limits.read("cpu", 1024, 2).amount == limits.READ_TOTAL["cpu"] * 2 // 2
    assert SMALL["read"].amount == 6 * 32 * 1024  # every output is a sum over one thread's share
    assert SMALL["copy"].amount == 2 * 3 * 64 * 1024
    assert [SMALL[name].launches for name in ("read", "copy", "product")] == [1, 3, 1]
    assert model.roofline_of(SMALL["read"], PEAKS).bound == "memory"  # one launch of 1 µs, and bytes for 2 µs
    assert SMALL["product"].amount == 2 * 96**3
    assert FMA.amount == 2 * 1000 * 2 * 384 and limits.fma("cpu", 2).amount == 2 * limits.FMA_STEPS * 2 * 384
    assert SMALL["launch"].amount == SMALL["launch"].launches == limits.LAUNCHES
    assert limits.copy("cuda", 524288, 1).amount == 2 << 30
    assert limits.read("cuda:1", 1024, 8).amount == limits.READ_TOTAL["cuda"]


@pytest.mark.parametrize("function", TORCH)
def test_a_limit_is_its_own_roofline(function):
    w = limits.launch("cpu", 1) if function == "launch" else replace(SMALL[function], H=65536 if function != "product" else 512)
    roofline = model.roofline_of(w, PEAKS)
    assert roofline.seconds == pytest.approx(w.amount / RATES[function])
    assert roofline.bound == {"product": "arithmetic", "launch": "launch"}.get(function, "memory")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device):
    cases = suite.plan(Options(device, "float32", (1, 2) if device == "cpu" else (), quick=False))
    found = [c.participants[0].workload for c in cases]
    assert len(found) == len(set(found)) == len({key for case in cases for key in case.keys()})
    assert {w.device for w in found} == {device} and {p.provider for c in cases for p in c.participants} <= set(LIMIT_PROVIDERS)
    products = {w.precision for w in found if w.function == "product"}
    assert products == set(suite.PRECISIONS[device])
    if device == "cpu":
        assert {w.threads for w in found} == {1, 2} and not set(EXCHANGES) & {w.function for w in found}
        multiply_adds = {(w.dtype, w.threads, w.B) for w in found if w.function == "fma"}
        assert multiply_adds == {(dtype, n, n) for dtype in FMA_DTYPES for n in (1, 2)}
    else:
        assert {"tf32", "bfloat16"} <= products and set(EXCHANGES) <= {w.function for w in found}
        assert "fma" not in {w.function for w in found}
    for w in found:
        reference = _plain(w)  # a reference is shared by all thread counts
        assert reference.shape == w.shape and reference.amount == w.amount
    quick = suite.plan(Options(device, "float32", (), quick=True))
    assert len(quick) < len(cases) and sum(c.effort.seconds for c in quick) < 5
    only = suite.plan(Options(device, "float64", (1,), quick=True))
    assert {c.participants[0].workload.dtype for c in only if c.group == "product"} == {"float64"}


def test_peaks_of_another_precision_keep_what_does_not_depend_on_it(monkeypatch):
    measured = []
    monkeypatch.setattr(peaks, "_rate", lambda w, *a, **k: measured.append(w.function) or 1e9)
    runner = Runner("cpu", quick=True)
    first = runner.peaks_for(SMALL["product"])
    arithmetic = {"product"} if no_fma(FMA) else {"product", "fma"}
    assert {"read", "copy", "launch", *arithmetic} == set(measured)
    measured.clear()
    other = runner.peaks_for(replace(SMALL["product"], dtype="bfloat16"))
    assert set(measured) == {"product"} and (other.dtype, other.read, other.fma) == ("bfloat16", first.read, 0.0)
    assert list(runner.peaks.values()) == [first, other] and first.dtype == "float32"
    runner.peaks_for(replace(SMALL["product"], threads=2))
    assert "read" in measured


def test_rates_and_what_was_not_found_again(synthetic):
    def amounts(w):
        if w.function in ("product", "fma"):
            return RATES[w.function] * w.threads / (1 + (w.H == 512))
        return 1e10 if w.function == "copy" and w.H == 256 else RATES[w.function]

    results = synthetic.machine(amounts)
    derived = suite.derive(results)
    assert derived["products"] == pytest.approx({"float32": 2e11, "bfloat16": 2e11, "float64": 2e11})
    assert derived["multiply-adds"] == pytest.approx({"float32": 8e11, "float64": 8e11})
    shares = {(of["precision"], of["threads"]): of["share"] for of in derived["products of multiply-adds"]}
    assert shares == pytest.approx({(dtype, n): 0.25 for dtype in FMA_DTYPES for n in (1, 2)})
    assert [found["eager"] for found in derived["launches"]] == pytest.approx([1e-6, 1e-6]) and not derived["exchanges"]
    assert "copy 256 KiB, 1 thread" in derived["disagreeing"] and "copy 128 MiB, 1 thread" not in derived["disagreeing"]
    # The peaks are those of one thread; of the orders only the fastest is looked for again.
    assert [name for name in derived["disagreeing"] if "product float32" in name] == ["product float32 2048, 2 threads"]
    shown = table(results, "Bytes in a second")
    assert shown.columns == ["buffer", "read, 1 thread", "read, 2 threads", "copy, 1 thread", "copy, 2 threads"]
    assert [text(c) for c in next(r for r in shown.rows if r[0] == "256 KiB")] == ["256 KiB", *["100 GB/s"] * 2, *["10 GB/s"] * 2]
    products = {(line[0], line[1]): line for line in table(results, "Matrix products").rows}
    assert [text(c) for c in products["float64", "2"][-2:]] == ["800 GFLOP/s", "25%"]
    assert [text(c) for c in products["bfloat16", "2"][-2:]] == ["", "–"]
    results.rows = [row for row in results.rows if row.function != "fma"]  # as an older file has them
    assert table(results, "Matrix products").columns[-1] == "order 2048" and not suite.derive(results)["multiply-adds"]
    assert table(results, "Exchange") is None and text(table(results, "Launches").rows[0][1]) == "1.00 µs"


def test_exchanges_between_multiprocessors(synthetic):
    """A time of one step, or why there is none."""
    results = synthetic.machine(lambda w: 1e12, "cuda")
    rows = {row.function: row for row in results.rows if row.function in EXCHANGES}
    assert list(rows) == list(EXCHANGES)
    for row in rows.values():
        row.status, row.reason, row.time = "unavailable", "no CUDA device is visible to torch", None
    hand_off = rows["grid hand-off"]
    hand_off.status, hand_off.reason, hand_off.time = "ok", None, {"median": hand_off.T * 1.5e-6}
    for row in results.rows:
        if row.function == "launch":
            row.graph = {"median": row.time["median"] / 4}
    derived = suite.derive(results)
    assert derived["exchanges"] == pytest.approx({"grid hand-off": 1.5e-6})
    lines = {line[0]: line for line in table(results, "Exchange").rows}
    assert lines["grid hand-off"][1] == "1.50 µs"
    assert text(lines["cluster barrier"][1]) == "unavailable" and "no CUDA device" in lines["cluster barrier"][2]
    (launch,) = derived["launches"]
    assert launch["graph"] == pytest.approx(launch["eager"] / 4)


def test_a_wrong_row_has_no_rate(synthetic):
    results = synthetic.machine(lambda w: 1e10)
    row = next(r for r in results.rows if r.function == "product")
    row.status, row.reason, row.time = "wrong", "result is off by 1", None
    assert suite.rate(row) is None
    cells = [cell for line in table(results, "Matrix products").rows for cell in line if isinstance(cell, Cell)]
    assert [(c.text, c.hint) for c in cells if c.tone == "bad"] == [("wrong", "result is off by 1")]


@pytest.mark.parametrize("name", list(SUITES))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_timed_row_of_every_suite_has_a_roofline(name, device):
    """What binds it, and a time that is not nothing."""
    peaks = replace(PEAKS, device=device)
    for case in SUITES[name].plan(Options(device, "float32", (2,), quick=True)):
        for participant in case.participants:
            w = participant.workload
            if not case.timed:
                continue
            roofline = model.roofline_of(w, peaks)
            assert roofline.seconds > 0 and roofline.bound and roofline.note, (participant.provider, w)


def test_a_run_from_end_to_end(tmp_path, capsys):
    only = "cell=product,launch,read,fma H=512,1,64,384"
    argv = ["--suite", "limits", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert {r["function"] for r in found["rows"]} == {"product", "launch", "read", "fma"}
    rows = [row for row in found["rows"] if row["function"] != "fma" or library.reason() is None]
    for row in rows:
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"]["median"] > 0 and row["roofline"]["bound"]
    assert "What limits this machine" in (tmp_path / "report.html").read_text()
    assert found["derived"]["suites"]["limits"]["products"]["float32"] > 0
    assert "torch.mm" in capsys.readouterr().out
