"""The tables that the package ships: they follow from the committed results, and are found by device and level."""

from __future__ import annotations

import json

import pytest

from fastseq.benchmarks import tables
from fastseq.choice import shipped, store
from fastseq.choice.decision import Call, Candidate, entry_of
from fastseq.choice.device import LEVELS, Device

CALL = Call("attention", "inference", "plain", "float32", "", "padded", 1, (8, 1, 64, 64))
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", "9.0", 0)


def test_the_committed_tables_follow_from_the_committed_results():
    for file, text in tables.texts(tables.RESULTS).items():
        assert file.read_text() == text, f"{file.name}: run python -m fastseq.benchmarks.tables"


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_attention_and_single_steps(level):
    points, words = shipped.points_for("cpu", "some CPU", level)
    assert words
    assert {kin[0] for kin in points} == {"attention", "recurrent_cell"}
    assert {kin[1] for kin in points} == {"inference", "training"} and {"float32", "bfloat16"} <= {kin[3] for kin in points}
    assert shipped.points_for("cpu", "some CPU", "none") == ({}, "")


def export(tmp_path, name, *entries):
    file = tmp_path / name
    file.write_text(store.document("tuned", {str(i): entry for i, entry in enumerate(entries)}))
    return file


def entry(device, candidates, call=CALL, date="2026-01-02"):
    return entry_of(call, candidates, device._asdict(), {"torch": "2"}, date)


def test_an_export_of_a_gpu_becomes_a_table(tmp_path):
    slow, fast = Candidate("torch", us=2.0, error=1e-3), Candidate("triton", "whole", 1.0, 1e-3)
    wrong = Candidate("cuda", against="wrong: by much")
    file = export(tmp_path, "tuned.json", entry(H100, [slow, wrong, fast]))
    table = json.loads(tables.points_text([file]))
    points, words = shipped.found_in(table, *H100[:3])
    assert words == "NVIDIA H100 80GB HBM3"
    assert points[CALL.kin][0].candidates == (Candidate("triton", "whole", 1.0), Candidate("torch", "", 2.0))
    assert shipped.found_in(table, "cuda", "NVIDIA A100", "8.0") == ({}, "")
    assert shipped.found_in(table, "cpu", "any", "amx") == ({}, "")


@pytest.mark.parametrize(("ours", "first"), [(1.01, "cpu"), (1.03, "torch")])
def test_what_is_as_fast_within_a_margin_is_ours_on_a_cpu(tmp_path, ours, first):
    device = Device("cpu", "CPU", "avx2", 1)
    file = export(tmp_path, "tuned.json", entry(device, [Candidate("torch", us=1.0), Candidate("cpu", us=ours)]))
    points, words = shipped.found_in(json.loads(tables.points_text([file])), "cpu", "other", "avx512")
    assert points[CALL.kin][0].candidates[0].backend == first and words == "CPU, AVX2"


def test_of_two_files_about_a_device_the_last_holds(tmp_path):
    files = [
        export(tmp_path, f"{name}.json", entry(H100, [Candidate(backend, us=1.0)]))
        for name, backend in (("a", "torch"), ("b", "cuda"))
    ]
    points, _ = shipped.found_in(json.loads(tables.points_text(files)), *H100[:3])
    assert [point.candidates[0].backend for point in points[CALL.kin]] == ["cuda"]


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json is no export of `fastseq tune`: it is truncated"):
        tables.points_text([tmp_path / "bad.json"])
    with pytest.raises(SystemExit) as ended:
        tables.main(["measure", str(tmp_path), "--levels", "mmx"])
    assert ended.value.code == 2 and "--levels: 'mmx' is not one that this CPU has" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "first"), [("inference", "cpu"), ("training", "torch")])
def test_a_cells_training_step_is_ours_where_it_is_faster(tmp_path, mode, first):
    device, step = Device("cpu", "CPU", "avx2", 1), Call("recurrent_cell", mode, "gru", "float32", "", "padded", 1, (2, 1, 8))
    file = export(tmp_path, "tuned.json", entry(device, [Candidate("torch", us=1.0), Candidate("cpu", us=1.01)], step))
    points, _ = shipped.found_in(json.loads(tables.points_text([file])), "cpu", "other", "avx512")
    assert points[step.kin][0].candidates[0].backend == first


@pytest.mark.parametrize(
    "mode, ours, first",
    [("training", 140.0, "torch"), ("training", 20.0, "cpu"), ("inference", 140.0, "cpu")],
)
def test_a_training_call_of_attention_is_ours_where_it_gains_more_than_it_loses_in_models(tmp_path, mode, ours, first):
    device, call = Device("cpu", "CPU", "avx2", 1), Call("attention", mode, "plain", "float32", "", "padded", 1, (8, 16, 16, 64))
    file = export(tmp_path, "tuned.json", entry(device, [Candidate("torch", us=150.0), Candidate("cpu", us=ours)], call))
    points, _ = shipped.found_in(json.loads(tables.points_text([file])), "cpu", "other", "avx512")
    assert points[call.kin][0].candidates[0].backend == first
