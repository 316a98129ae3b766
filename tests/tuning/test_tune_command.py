"""``python -m fastseq tune``: what it measures, stores, shows, exports, imports; bad input ends with a sentence and status 2."""

from __future__ import annotations

import json
import os

import pytest
import torch

from fastseq.__main__ import main
from fastseq.backends import library
from fastseq.choice import sources, store
from fastseq.choice.decision import Call, Candidate, entry_of
from fastseq.choice.device import device_of, versions
from fastseq.tuning import command, grids, measure

CALL = Call("recurrent_cell", "inference", "gru", "float32", "", "padded", 1, (4, 1, 8))


@pytest.fixture(autouse=True)
def own_store(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSEQ_CACHE", str(tmp_path / "cache"))
    store.clear("tuned")  # what a store that could not be written left in this process
    library.load()  # whose level of instructions is the device's
    sources.forget()
    yield tmp_path
    monkeypatch.undo()
    sources.forget()


@pytest.fixture
def small(monkeypatch):
    """Two calls, measured in this process."""
    calls = [CALL, CALL._replace(mode="training")]
    monkeypatch.setattr(grids, "mixed", lambda suites, kind: calls)

    def measured(self, call, device, seconds):
        return measure.measured(call, device, seconds, {}, lambda at, name: None)

    monkeypatch.setattr(command.Bench, "measured", measured)
    return calls


def entry(call=CALL, us=1.0, **of):
    candidates = [Candidate("torch", us=us), Candidate("cpu", us=2.0)]
    return entry_of(call, candidates, device_of(torch.device("cpu"))._asdict(), versions() | of, "2026-11-29")


def test_it_measures_stores_and_goes_on(small, capsys):
    assert main(["tune", "--seconds", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("fastseq.tune: 2 calls measured") and str(CALL) in printed
    assert len(store.read("tuned")) == 2
    assert main(["tune", "--seconds", "0.001", "--quiet"]) == 0
    said = "fastseq.tune: 0 calls measured, 0 run by another kernel from now on; there was nothing to measure\n"
    assert capsys.readouterr().out == said
    assert main(["tune", "--seconds", "0.001", "--quiet", "--again"]) == 0
    assert capsys.readouterr().out.startswith("fastseq.tune: 2 calls measured")


def test_it_ends_when_the_time_is_up(small, capsys):
    assert main(["tune", "--seconds", "0.001", "--minutes", "1e-9"]) == 0
    assert "2 calls were left when the time was up; run it again and it goes on" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_measured(small, monkeypatch):
    own = command.Bench.measured

    def measured(self, call, device, seconds):
        if call.mode == "training":
            raise KeyboardInterrupt
        return own(self, call, device, seconds)

    monkeypatch.setattr(command.Bench, "measured", measured)
    assert main(["tune", "--seconds", "0.001"]) == 130
    assert len(store.read("tuned")) == 1


def test_show_export_import_clear(own_store, capsys):
    assert main(["tune", "--show"]) == 0 and capsys.readouterr().out.startswith("0 calls in ")
    store.update("tuned", {"a": entry(), "b": entry(CALL._replace(kind="lstm"), torch="1.0"), "c": {"call": 7}})
    assert main(["tune", "--show"]) == 0
    printed = capsys.readouterr().out
    assert f"  {CALL}: torch, 2.00x cpu, 2026-11-29" in printed and printed.count("other versions than now, not used") == 1
    assert "entries that cannot be read" in printed
    store.clear("tuned")
    store.update("tuned", {"a": entry()})
    file = own_store / "export.json"
    assert main(["tune", "--export", str(file)]) == 0 and os.listdir(own_store) == ["cache", "export.json"]
    assert main(["tune", "--clear"]) == 0 and store.read("tuned") == {}
    assert main(["tune", "--import", str(file)]) == 0
    assert store.read("tuned") == {"a": json.loads(json.dumps(entry()))} and sources.is_tuned(CALL, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--minutes", "soon"], "invalid float value: 'soon'"),
        (["--seconds", "-1"], "--seconds must be above 0, got -1.0"),
        (["--suite", "cell"], r"unknown suite 'cell'; accepted: recurrent, attention, cells (did you mean 'cells'?)"),
        (["--device", "gpu"], "--device: 'gpu' is no device of torch's"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["--device", "cuda:99"], "--device: there is no cuda:99"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--show", "--clear"], "not allowed with"),
        (["--import", "/nowhere/file"], "cannot read /nowhere/file: No such file"),
        (["--export", "/nowhere/file"], "cannot write /nowhere/file: No such file"),
    ],
)
def test_bad_input(given, words, capsys):
    try:
        status = main(["tune", *given])
    except SystemExit as ended:  # argparse's own
        status = ended.code
    assert status == 2 and words in capsys.readouterr().err and store.read("tuned") == {}


def test_a_file_that_is_no_export(own_store, capsys):
    file = own_store / "file"
    good = store.document("tuned", {"good": entry(), "bad": {"call": 7}})
    for text, words in (
        ("{", "it is truncated"),
        ("{}", "not fastseq's"),
        (good, "entry 'bad' is damaged, nothing was imported"),
    ):
        file.write_text(text)
        assert main(["tune", "--import", str(file)]) == 2
        assert words in capsys.readouterr().err and store.read("tuned") == {}


def test_a_store_that_cannot_be_written(monkeypatch, small, capsys, own_store):
    file = own_store / "file"
    file.write_text("")
    for chosen, words in (
        ("off", "FASTSEQ_CACHE=off"),
        (str(file), "cannot be written"),
        (str(file / "below"), "Not a directory"),
    ):
        monkeypatch.setenv("FASTSEQ_CACHE", chosen)
        assert main(["tune", "--seconds", "0.001"]) == 2
        assert words in capsys.readouterr().err
    assert file.read_text() == ""


def test_grids():
    for kind in ("cpu", "cuda"):
        for suite in grids.SUITES:
            calls = grids.calls(suite, kind)
            assert len(set(calls)) == len(calls) > 100
        mixed = grids.mixed(grids.SUITES, kind)
        assert {call.op for call in mixed[:3]} == {"recurrent", "attention", "recurrent_cell"}
        assert len(mixed) == sum(len(grids.calls(suite, kind)) for suite in grids.SUITES)
