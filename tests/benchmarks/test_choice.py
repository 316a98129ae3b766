"""The table of the lengths that torch's recurrent layers take on a CPU: measured, derived, and looked up."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fastseq import backends
from fastseq.benchmarks.cpu import choice, steps
from fastseq.choice import lengths
from fastseq.choice.decision import MODES

STEPS = (1, 4, 16, 64)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((2.0, 2.0, 2.0, 2.0), (1, 0)),  # ours at every length
        ((0.99, 1.0, 0.99, 1.0), (1, 0)),  # within the margin
        ((0.5, 0.5, 0.5, 0.5), (1, None)),
        ((0.5, 0.5, 2.0, 2.0), (1, 8)),  # half way in logarithms
        ((0.25, 0.5, 4.0, 4.0), (1, 6)),  # a third of the way
        ((2.0, 0.5, 0.5, 2.0), (3, 32)),
        ((1.5, 0.5, 0.5, 0.5), (2, None)),
        ((0.5, 1.02, 0.5, 0.5), (1, None)),  # one disturbed point
        ((2.0, 2.0, 0.9, 2.0), (14, 19)),
    ],
)
def test_the_stretch_that_torch_takes(ratios, expected):
    """Of torch / ours."""
    assert steps.interval(STEPS, [10 * r for r in ratios], [10.0] * 4) == expected


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([10.0, 21.0], (1, 4)),  # 4.75: a step takes torch 5, ours 3.7
        ([10.0, 24.0], (1, 16)),
        ([10.0, 25.1], (1, None)),
        ([10.0, 19.0], (1, 3)),  # ours is ahead at the longest
    ],
)
def test_beyond_the_longest_length_lines_meet(ours, expected):
    """A large layer is measured at few lengths: that torch starts faster is not that it stays so."""
    assert steps.interval((1, 4), [5.0, 20.0], ours) == expected
    assert steps.interval((1,), [5.0], ours[:1]) == (1, 1)


def row(level="avx2", B=1, H=64, ratio=2.0, mode="inference", **more):
    kind = {"level": level, "cell": "lstm", "dtype": "float32", "lanes": 1, "H": H, "layout": "padded", "mode": mode, "B": B}
    return kind | {"steps": [1, 4], "torch": [10 * ratio, 10 * ratio], "ours": [10.0, 10.0]} | more


def every(**given):
    """Rows of every kind that a table has."""
    return [row(**kind._asdict() | given) for kind in choice.points(choice.QUICK)]


def written(tmp_path, *parts):
    files = []
    for number, rows in enumerate(parts):
        file = tmp_path / f"{number}.json"
        environment = {"device name": f"CPU {number}"}
        choice.save(file, {"schema": choice.SCHEMA, "version": choice.VERSION, "environment": environment, "rows": rows})
        files.append(file)
    return files


def test_a_level_that_lacks_points_is_refused():
    rows = [row(B=B, H=H) for B in (1, 32) for H in (64, 256)]
    assert steps.table(rows)["avx2"] == {
        "batches": [5.7],
        "widths": [128.0],
        "rows": {"lstm float32 padded 1 inference": [(1, 0)] * 4},
    }
    with pytest.raises(ValueError, match="level avx2 lacks 1 points, the first: lstm float32 padded 1 inference B=32 H=64"):
        steps.table([*rows[:2], rows[3]])


def test_of_several_files_the_last_has_the_word(tmp_path):
    first = every(level="avx2", ratio=2.0) + every(level="amx", ratio=0.5)
    files = written(tmp_path, first, every(level="avx2", ratio=0.5))
    file = json.loads(choice.text_of(files))
    assert list(file["levels"]) == ["avx2", "amx"]
    assert [file["levels"][level]["device"] for level in ("avx2", "amx")] == ["CPU 1", "CPU 0"]
    found = lengths.table_of("avx2", file).steps("gru", torch.float16, "packed", 2, 1, 64, True)
    assert found == lengths.Steps(1, lengths.ENDLESS)


@pytest.mark.parametrize(("level", "taken"), [("default", "avx2"), ("avx2", "avx2"), ("avx512", "avx2"), ("amx", "amx")])
def test_a_level_without_measurements_is_as_its_neighbor(tmp_path, level, taken):
    ratios = {"avx2": 2.0, "amx": 0.5}
    file = json.loads(choice.text_of(written(tmp_path, [r for name in ratios for r in every(level=name, ratio=ratios[name])])))
    found = lengths.table_of(level, file).steps("lstm", torch.float32, "padded", 1, 8, 128, False)
    assert found == (lengths.OURS if taken == "avx2" else lengths.Steps(1, lengths.ENDLESS))


def test_a_call_finds_the_row_of_its_sizes(tmp_path):
    """The nearest measured batch and width, in logarithms."""
    rows = [r | {"torch": [10 * (0.5 if (r["B"], r["H"]) == (32, 64) else 2.0)] * 2} for r in every()]
    table = lengths.table_of("avx2", json.loads(choice.text_of(written(tmp_path, rows))))
    for *kind, gradients in table.rows:
        torchs = {(B, H) for B in (1, 5, 6, 32, 999) for H in (1, 64, 128, 129, 999) if table.steps(*kind, B, H, gradients).last}
        assert torchs == {(B, H) for B in (6, 32, 999) for H in (1, 64, 128)}


def test_least_is_the_least_of_interleaved_rounds():
    """On a clock on which the first call takes 5, 5, 1, 5, 5, 1, ... ms, the second always 2 ms; each after one of its own."""
    clock, calls = [0.0], []

    def call(name, times):
        def run():
            calls.append(name)
            clock[0] += times[calls.count(name) % len(times)]

        return run

    found = choice.least([call("a", (1e-3, 5e-3, 5e-3)), call("b", (2e-3,))], 0.02, lambda: clock[0])
    assert found == pytest.approx([1e-3, 2e-3])
    assert calls == ["a", "b", *["a", "a", "b", "b"] * (len(calls) // 4)] and len(calls) >= 18


def test_halves_that_disagree_get_more_rounds():
    clock, count = [0.0], [0]

    def run():
        count[0] += 1
        clock[0] += 1e-3 * (1.0 if count[0] > 16 else 2.0)  # the machine gets quiet

    (found,) = choice.least([run], 0.02, lambda: clock[0])
    assert found == pytest.approx(1e-3) and count[0] == 41


TINY = choice.Grid((1, 3), (8,), (1, 3), 7, ("float32", "bfloat16"), (1, 2), 1e-4)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(choice, "QUICK", TINY)
    monkeypatch.setattr(choice, "_times", lambda pair, point, grid: {"steps": [1, 3], "torch": [1.0, 1.0], "ours": [2.0, 2.0]})


def test_a_run_goes_on_where_it_was(tiny, tmp_path):
    file = tmp_path / "choice.json"
    command = ["measure", str(file), "--here", "--quick", "--levels", "default"]
    assert choice.main([*command, "--minutes", "1e-9"]) == 0 and choice.load(file)["rows"] == []
    assert choice.main(command) == 0
    whole = choice.load(file)
    assert len(whole["rows"]) == len(list(choice.points(TINY))) == 3 * 2 * 2 * 2 * 2 * 2
    choice.save(file, whole | {"rows": whole["rows"][3:]})
    assert choice.main(command) == 0
    assert choice.load(file)["rows"] == [*whole["rows"][3:], *whole["rows"][:3]]
    table = tmp_path / "steps.json"
    assert choice.main(["table", str(file), "--out", str(table)]) == 0
    found = json.loads(table.read_text())
    assert found["levels"]["default"]["rows"]["gru bfloat16 packed 2 training"] == [[1, None]] * 2


@pytest.mark.parametrize("layout", choice.LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", choice.CELLS)
def test_a_point_times_torchs_layer_and_ours(cell, layout, mode):
    point = choice.Point(cell, "float32", 2, 8, layout, mode, 3)
    ((pair, _),) = choice._built([point])
    assert type(pair[0]) is getattr(nn, cell.removesuffix("_tanh").upper()) and type(pair[1]).__module__.startswith("fastseq")
    chosen = set()
    with backends.watching(lambda query, backend: chosen.add((backend, query.steps))):
        found = choice._times(pair, point, TINY)
    assert chosen == {("cpu", steps) for steps in found["steps"]}
    assert found["steps"] in ([1, 3], [1, 3, 7]) and min(found["torch"] + found["ours"]) > 0


@pytest.mark.parametrize(
    ("mode", "ours", "seconds", "expected"),
    [
        ("training", 1.1, 1e-3, [1, 3, 7]),
        ("training", 0.99, 1e-3, [1, 3]),  # ours is ahead already
        ("training", 1.3, 1e-3, [1, 3]),  # it will not be
        ("training", 1.1, choice.LATEST / 6.8, [1]),  # it would take too long
        ("inference", 1.1, 1e-3, [1, 3]),
    ],
)
def test_a_later_length_where_torchs_is_a_little_faster(monkeypatch, mode, ours, seconds, expected):
    lengths = []
    monkeypatch.setattr(choice, "_call", lambda module, point, T: lengths.append(T) or (lambda: ()))
    monkeypatch.setattr(choice, "_check", lambda results, point: None)
    monkeypatch.setattr(choice, "least", lambda calls, budget: (seconds * lengths[-1], seconds * lengths[-1] * ours))
    point = choice.Point("gru", "float32", 1, 8, "padded", mode, 3)
    assert choice._times((nn.Identity(), nn.Identity()), point, TINY)["steps"] == expected


def test_what_computes_something_else_is_not_timed():
    point = choice.Point("gru", "float32", 1, 8, "padded", "training", 3)
    ((pair, _),) = choice._built([point])
    with torch.no_grad():
        pair[1].weight_hh_l0.mul_(1.01)
    with pytest.raises(RuntimeError, match=r"Point\(cell='gru', .* apart"):
        choice._times(pair, point, TINY)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["measure", "{}", "--levels", "amx,sse"], "--levels: 'sse' is not one that this CPU has"),
        (["measure", "{}", "--minutes", "0"], "--minutes: 0.0 is not above 0"),
        (["measure", "{}/other.json"], "other.json holds no measurements of this command"),
        (["table", "{}/none.json"], "cannot read .*none.json"),
    ],
)
def test_bad_arguments(argv, message, tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"schema": "fastseq-benchmark"}')
    with pytest.raises(SystemExit, match="2"):
        choice.main([word.format(tmp_path) for word in argv])
    assert capsys.readouterr().err.replace("\n", " ").count("error: ") == 1


def test_results_of_another_device_are_not_added_to(tiny, tmp_path, capsys):
    file = tmp_path / "choice.json"
    choice.save(file, choice.load(file) | {"environment": choice.load(file)["environment"] | {"device name": "Another CPU"}})
    with pytest.raises(SystemExit, match="2"):
        choice.main(["measure", str(file)])
    assert "was measured otherwise: device name was Another CPU" in " ".join(capsys.readouterr().err.split())
