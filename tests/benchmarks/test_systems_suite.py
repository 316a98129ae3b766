"""The suite systems: equal parameters, programs that agree, wrong ones refused, its gate, its figures, a run from end to end."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastseq
from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.providers.systems import SYSTEM_PROVIDERS, oracle_name, own_name, torch_name
from fastseq.benchmarks.report.plots import style
from fastseq.benchmarks.suites import systems as suite
from fastseq.benchmarks.workloads import systems, torch_models
from fastseq.benchmarks.workloads.oracles import ORACLES
from fastseq.benchmarks.workloads.systems import STEP, SYSTEMS, TOKEN, SystemWorkload, TextExperiment
from tools import pages

SMALL = SystemWorkload("GPT", 9, 2, 16, 16, "training", heads=2, vocabulary=11, span=4)
PLANS = [Options(device, "float32", (1,), quick=quick) for device in ("cpu", "cuda") for quick in (True, False)]
NAMES = [pytest.param(name, id=name) for name in SYSTEM_PROVIDERS if not name.startswith("transformers")]
needs_library = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stages(name):
    return [(STEP, "training"), (TOKEN, "inference")] if SYSTEMS[name].generates else [(STEP, "training")]


def assert_passes(provider, w):
    result = check_provider(lambda shape: (provider.build(shape), ""), w)
    assert result.ok, f"{provider.name}, {w.stage}: {result.reason}"
    assert 0 < result.error <= result.bound < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_every_program_passes_the_gate(name):
    """T beyond a window, a block and a chunk, and no multiple of them."""
    provider = SYSTEM_PROVIDERS[name]
    w = replace(SMALL, function=provider.function)
    for stage, mode in stages(w.function):
        assert_passes(provider, replace(w, stage=stage, mode=mode))
    call = w.call(provider.build(w), problem_of(w))
    assert bool(provider.chose(call)) is (name == own_name(w.function) and SYSTEMS[w.function].own_parts)


@needs_library
@pytest.mark.parametrize("name", ORACLES)
def test_transformers_models_pass_the_gate(name):
    provider = SYSTEM_PROVIDERS[oracle_name(name)]
    for stage, mode in stages(name):
        assert_passes(provider, replace(SMALL, function=name, stage=stage, mode=mode))


@needs_library
def test_a_token_of_transformers_leaves_its_cache_as_it_was():
    w = replace(SMALL, stage=TOKEN, mode="inference")
    call = w.call(SYSTEM_PROVIDERS[oracle_name("GPT")].build(w), problem_of(w))
    first, second = call.outputs()["output"], call.outputs()["output"]
    assert torch.equal(first, second) and call.kept[0].get_seq_length() == w.T


@pytest.mark.parametrize("options", PLANS, ids=lambda o: f"{o.device}{'-quick' * o.quick}")
def test_systems_have_as_many_parameters(options):
    cases = suite.plan(options)
    workloads = {p.workload.function: p.workload for case in cases if case.group == STEP for p in case.participants}
    assert workloads.keys() == SYSTEMS.keys()
    counts = {name: systems.parameters(w) for name, w in workloads.items()}
    budget = suite._sizes(options.device == "cuda", options.quick)[2]
    assert all(abs(count - budget) < (0.14 if options.device == "cpu" else 0.07) * budget for count in counts.values()), counts
    for case in cases:
        assert all(EVERY_PROVIDER[p.provider].function == p.workload.function for p in case.participants)
        name = case.participants[0].workload.function
        compared = case.group != suite.TEXT and SYSTEMS[name].own_parts
        assert dict(case.baseline).get(own_name(name)) == (torch_name(name) if compared else None)


def test_the_width_is_the_nearest():
    counts = {width: systems.parameters(replace(SMALL, function="LSTM", H=width)) for width in range(16, 400, 16)}
    for budget in (20_000, 123_456, 500_000, counts[64]):
        found = systems.at_budget(replace(SMALL, function="LSTM"), budget)
        assert found.H == found.I == min(counts, key=lambda width: abs(counts[width] - budget))
    with pytest.raises(ValueError, match="TCN has .* parameters at width 16; 100 are too few"):
        systems.at_budget(replace(SMALL, function="TCN"), 100)


def test_counted_parameters_are_those_that_are_built():
    for name in SYSTEMS:
        w = replace(SMALL, function=name, T=16)
        built = SYSTEM_PROVIDERS[own_name(name)].build(w)
        places = sum(p.numel() for n, p in built.named_parameters() if n.endswith(("places", "places.weight")))
        assert sum(p.numel() for p in built.parameters()) - places == systems.parameters(w)


def test_every_model_takes_part():
    """A new one of fastseq.models gets a row of SYSTEMS."""
    systems_of_ours = [SYSTEM_PROVIDERS[own_name(name)].build(replace(SMALL, function=name, T=16)) for name in SYSTEMS]
    built = {type(module) for system in systems_of_ours for module in system.modules()}
    exported = (getattr(fastseq.models, name) for name in fastseq.models.__all__)
    assert {model for model in exported if isinstance(model, type)} <= built


def test_copies_hold_nothing_of_fastseq():
    copies = torch_models.copies()
    assert copies.GPT is not fastseq.models.GPT and copies.hybrid.LSTM is not fastseq.LSTM
    for name in SYSTEMS:
        kinds = {type(module).__module__ for module in replace(SMALL, function=name).build().modules()}
        assert all(kind.startswith(("torch.", "fastseq.benchmarks.")) for kind in kinds), kinds
    left = {
        name
        for path, module in sys.modules.items()
        if path.startswith(torch_models.NAME)
        for name, value in vars(module).items()
        if callable(value)
        and str(getattr(value, "__module__", "")).startswith("fastseq.")
        and not value.__module__.startswith("fastseq.benchmarks.")
    }
    assert left == {"merge_attention", "sequence_places", "require_whole_sequence"}  # which are plain PyTorch
    assert copies.blocks.attention is torch_models.attention and fastseq.models.blocks.attention is fastseq.functional.attention
    assert fastseq.models.seq2seq.CELLS["gru"] is fastseq.GRU and copies.seq2seq.CELLS["gru"].__mro__[1] is nn.GRU


@pytest.mark.parametrize("lengths", [[4, 4], [4, 2]], ids=["one length", "two lengths"])
def test_torchs_parts_are_right_where_the_suite_does_not_look(lengths):
    """Rows that end early, a window without global tokens, several queries behind a cache: as fastseq has them."""
    torch.manual_seed(0)
    n = torch.tensor(lengths)
    for name in ("LSTM", "GRU"):
        own = getattr(fastseq, name)(3, 4, batch_first=True, bidirectional=True).double()
        other = torch_models.PARTS[getattr(fastseq, name)](3, 4, batch_first=True, bidirectional=True).double()
        other.load_state_dict(own.state_dict())
        x = torch.randn(2, 4, 3, dtype=torch.float64)
        torch.testing.assert_close(other(x, lengths=n)[0], own(x, lengths=n)[0])
    q, k, v = (torch.randn(2, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    given = {"layout": "bshd", "seqlens_k": n}
    expected = fastseq.functional.attention(q, k, v, **given)
    torch.testing.assert_close(torch_models.attention(q, k, v, **given), expected)
    of_both = []
    for functions in (fastseq.functional, torch_models):
        keys, values = k.clone(), v.clone()
        new = {"cache_seqlens": n, "k_new": q[:, :3].contiguous(), "v_new": v[:, :3].contiguous()}
        y = functions.attention_with_kv_cache(q[:, :3], keys, values, **new, layout="bshd", scale=None)
        of_both.append((y, *(t[row, : n[row] + 3] for t in (keys, values) for row in range(2))))
    torch.testing.assert_close(of_both[1], of_both[0])
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    valid = torch.arange(9) < n[:, None]
    expected = fastseq.functional.attention(*heads, window_size=(2, 2), seqlens_k=n)
    found = torch_models.attention(*heads, window_size=(2, 2), seqlens_k=n)
    seen = valid.unfold(1, 1, 1).any(-1)[:, None, :, None]
    torch.testing.assert_close(found * seen, expected * seen)


def test_minGRU_goes_on_from_a_state():
    """Step by step from a state as all at once from none."""
    torch.manual_seed(0)
    layer = torch_models.MinGRU(3, 4).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    whole, last = layer(x)
    first, state = layer(x[:, :2])
    rest, found = layer(x[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    torch.testing.assert_close(found, last)


class Forgets(nn.Module):
    """A right training step; a token that does not know its context."""

    def __init__(self, system):
        super().__init__()
        self.system = system

    def canonical_name(self, name):
        return name.removeprefix("system.")

    def forward(self, tokens):
        return self.system(tokens)

    def context(self, tokens):
        return self.system.context(tokens[:, -2:])

    def step(self, token, kept):
        return self.system.step(token, kept)


def test_wrong_programs_are_refused():
    w = replace(SMALL, function="hybrid")
    assert_passes(SYSTEM_PROVIDERS[own_name("hybrid")], w)
    own = SYSTEM_PROVIDERS[own_name("hybrid")].build
    token = replace(w, stage=TOKEN, mode="inference")
    result = check_provider(lambda shape: (Forgets(own(shape)), ""), token)
    assert not result.ok and "output is off by" in result.reason

    def shifted(shape):
        system = own(shape)
        system.body.blocks[0].heads //= 2
        return system, ""

    assert not check_provider(shifted, w).ok

    def cut(shape):
        system = own(shape)
        system.embedding.weight.register_hook(torch.zeros_like)
        return system, ""

    result = check_provider(cut, w)
    assert not result.ok and "grad embedding.weight is off by" in result.reason


def test_reformer_has_no_truth_in_16_bits():
    assert "rounding decides" in replace(SMALL, function="Reformer", dtype="bfloat16").missing()
    assert replace(SMALL, function="Reformer").missing() is None


def test_what_is_kept_of_a_context():
    """Of an LSTM its states, whatever the context; of GPT keys and values of each token."""

    def kept(name, T):
        w = replace(SMALL, function=name, T=T, stage=TOKEN, mode="inference")
        return w.call(SYSTEM_PROVIDERS[own_name(name)].build(w), problem_of(w)).state_bytes

    assert kept("LSTM", 4) == kept("LSTM", 8) == 2 * 2 * 2 * 16 * 4
    assert kept("GPT", 8) - kept("GPT", 4) == 4 * 2 * 2 * 2 * 16 * 4


@pytest.mark.skipif(not systems.TEXT.is_file(), reason="needs a checkout's examples/data")
def test_a_system_learns_of_the_text():
    w = TextExperiment("LSTM", 16, 8, 16, 16, budget=8, seeds=2, samples=4096, rate=1e-2)
    found = w.measure(SYSTEM_PROVIDERS[own_name("LSTM")])
    assert found.low < found.high < torch.tensor(256.0).log().item() - 0.3 and found.seeds == 2
    assert found == w.measure(SYSTEM_PROVIDERS[own_name("LSTM")])
    timed = replace(w, budget=0, seconds=0.05, seeds=1).measure(SYSTEM_PROVIDERS[own_name("LSTM")])
    assert timed.median < torch.tensor(256.0).log().item()


def rows(synthetic, ratio):
    """Rows of a run; `ratio(function, group, T)` over torch's parts."""
    found = []
    for case in suite.plan(Options("cpu", "float32", (1,), quick=True)):
        for p in case.participants:
            row = Row.of(suite.NAME, case.group, p.provider, p.workload)
            base = dict(case.baseline).get(p.provider)
            if case.group == suite.TEXT:
                row.metric = {"name": "", "unit": "", "median": 2.0, "low": 1.9, "high": 2.1, "seeds": 3}
            elif p.provider == own_name(p.workload.function):
                value = ratio(p.workload.function, case.group, p.workload.T)
                synthetic.timed(row, 1e-3 * p.workload.T / value, over=base, ratio=value)
            else:
                synthetic.timed(row, 1e-3 * p.workload.T, over=base)
            row.kept = 1024
            found.append(row)
    return Results({"device": "cpu"}, {}, found)


def test_the_gate_is_missed_by_one_slow_point(synthetic):
    even = suite.derive(rows(synthetic, lambda function, group, T: 0.98))["gates"]
    assert [g["reached"] for g in even] == [True, True] and {g["must"] for g in even} == {0.97}
    slow = suite.derive(rows(synthetic, lambda function, group, T: 0.9 if (function, group) == ("T5", TOKEN) else 1.5))["gates"]
    assert [g["reached"] for g in slow] == [True, False] and slow[1]["worst"]["point"].startswith("T5")
    missing = rows(synthetic, lambda function, group, T: 1.0)
    lost = next(r for r in missing.rows if r.provider == own_name("GPT"))
    lost.status, lost.time, lost.ratio = "wrong", None, None
    assert not suite.derive(missing)["gates"][0]["reached"]


def test_figures_have_a_line_for_each_system(synthetic):
    results = rows(synthetic, lambda function, group, T: 1.2)
    (section,) = suite.present(results)
    assert section.tables[0].title == "Gates"
    assert [f.title.split(" against")[0] for f in section.figures] == [
        "Time",
        "Tokens per second",
        "Peak memory",
        "Kept of the context",
    ]
    drawn = style.svg(suite.picture(results))
    assert all(f">{own_name(name)}<" in drawn for name in SYSTEMS) and "torch GPT" not in drawn
    text = next(t for t in section.tables if t.title.startswith("Test loss"))
    assert [line[0] for line in text.rows] == [own_name(name) for name in suite.FAMILY]


def test_their_picture_and_table_in_the_documentation(synthetic, monkeypatch):
    timed = rows(synthetic, lambda function, group, T: 1.2)
    monkeypatch.setattr(pages, "system_costs", lambda: timed)
    assert "gallery/systems.svg" in pages.gallery() and pages.GALLERY / "systems.svg" in pages.pictures()
    table = pages.costs().splitlines()
    assert table[0] == ("| system | training step, T=16 | training step, T=64 | token, T=16 | token, T=64 | kept, T=64 |")
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2 : 2 + len(SYSTEMS)]] == list(SYSTEMS)
    assert "| GPT | 13.3 ms (1.20×) | 53.3 ms (1.20×) | 13.3 ms (1.20×) | 53.3 ms (1.20×) | 1.00 KiB |" in table
    assert "| ViT | 13.3 ms (1.20×) | 53.3 ms (1.20×) | – | – | – |" in table
    assert "no system slower, a generated token (at least 0.97 at each of 26 points): reached, lowest 1.20" in table[-1]
    figure = pages.systems()
    assert ">fastseq hybrid<" in pages.drawn(figure) and figure.title.startswith("The systems that articles name")
    assert "A training step at T = 64: LSTM " in figure.alt and "A generated token at T = 64: " in figure.alt


def test_a_run_from_end_to_end(tmp_path):
    argv = [
        "--suite",
        "systems",
        "--quick",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--only",
        "T=16 provider=torch_LSTM,fastseq_LSTM",
    ]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(r["group"], r["provider"]) for r in found] == [
        (group, name("LSTM")) for group in (STEP, TOKEN) for name in (torch_name, own_name)
    ]
    for row in found:
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"]["median"] > 0 and row["kept"] > 0
    assert "The systems that articles name" in (tmp_path / "report.html").read_text()
