from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastseq.benchmarks import cli
from fastseq.benchmarks.measure.case import Case, Options, Participant
from fastseq.benchmarks.measure.check import check_provider, problem_of
from fastseq.benchmarks.measure.results import Results, Row
from fastseq.benchmarks.measure.runner import Runner
from fastseq.benchmarks.measure.timing import Effort
from fastseq.benchmarks.providers.models import AFTER, BEFORE, EAGER, MODEL_PROVIDERS, OWN, SDPA
from fastseq.benchmarks.suites import before_and_after, stand_ins
from fastseq.benchmarks.suites import models as suite
from fastseq.benchmarks.workloads import attention_stand_ins as attention_models
from fastseq.benchmarks.workloads import models
from fastseq.benchmarks.workloads import stand_ins as stand_ins_models
from fastseq.benchmarks.workloads.attention_stand_ins import ATTENTION_STAND_INS, AttentionStandInWorkload
from fastseq.benchmarks.workloads.models import MODELS, LanguageModel, ModelWorkload
from fastseq.benchmarks.workloads.stand_ins import STAND_INS, StandInWorkload

SMALL = ModelWorkload("lstm-lm", 9, 2, 24, 24, "training", vocabulary=40)
WITHOUT = importlib.util.find_spec("transformers") is None
PAIRS = [
    pytest.param(
        function,
        name,
        marks=pytest.mark.skipif(bool(model.package) and WITHOUT, reason="needs transformers"),
    )
    for function, model in MODELS.items()
    for name in ((EAGER, SDPA, OWN) if model.package else (BEFORE, AFTER))
]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(("function", "name"), PAIRS)
def test_every_provider_passes_the_gate(function, name, mode):
    provider, w = MODEL_PROVIDERS[name], replace(SMALL, function=function, mode=mode)
    result = check_provider(lambda shape: (provider.build(shape), ""), w)
    assert result.ok, result.reason
    assert 0 < result.error <= result.bound < 1e-4
    call = w.call(provider.build(w), problem_of(w))
    assert call.forward().shape == (2, 9, 40)
    with call.context():
        chose = provider.chose(call)
    assert bool(chose) is (name in (AFTER, OWN)) and all(c.startswith("backend: ") for c in chose)


def test_converted_is_converted():
    model = MODEL_PROVIDERS[AFTER].build(SMALL)
    assert type(model.layers).__module__.startswith("fastseq") and isinstance(
        MODEL_PROVIDERS[BEFORE].build(SMALL).layers, nn.LSTM
    )


class Sharper(LanguageModel):
    def forward(self, tokens):
        return 1.0001 * super().forward(tokens)


class Cut(LanguageModel):
    """Right logits; the embedding learns nothing."""

    def forward(self, tokens):
        return self.readout(self.layers(self.embedding(tokens).detach())[0]) + 0 * self.embedding.weight.sum()


@pytest.mark.parametrize(("cls", "reason"), [(Sharper, "output is off by"), (Cut, "grad embedding.weight is off by")])
def test_a_wrong_model_is_refused(cls, reason):
    result = check_provider(lambda w: (cls(w), ""), SMALL)
    assert not result.ok and reason in result.reason


def test_gradients_are_those_of_the_next_token():
    call = SMALL.call(LanguageModel(SMALL), problem_of(SMALL))
    logits = call.model(call.input)
    chances = logits[:, :-1].log_softmax(-1).gather(2, call.input[:, 1:, None])
    want = torch.autograd.grad(-chances.mean(), call.model.readout.bias)[0]
    torch.testing.assert_close(call.gradients()["readout.bias"], want)
    assert list(call.gradients()) == [name for name, _ in call.model.named_parameters()]


@pytest.mark.skipif(WITHOUT, reason="needs transformers")
def test_a_gradient_that_is_rounding_alone_is_not_compared():
    """Of BERT's key biases: in fp64 they are sixteen digits below those of the query biases."""
    w = replace(SMALL, function="bert")
    call = models.ModelCall(MODELS["bert"].build(w), problem_of(w), dtype=torch.float64)
    every = dict(zip(call.leaves, call._both(), strict=True))
    assert not [name for name in call.gradients() if name.endswith("key.bias")]
    hidden = {name: grad for name, grad in every.items() if name not in call.gradients()}
    assert len(hidden) == w.layers
    for name, grad in hidden.items():
        assert grad.abs().max() < 1e-12 * every[name.replace("key", "query")].abs().max()


@pytest.mark.parametrize("function", MODELS)
def test_the_roofline_counts_every_matrix(function, monkeypatch):
    """Elements of the weights that a token goes through: all matrices but the tables that are looked up in."""
    if MODELS[function].package and WITHOUT:
        pytest.skip("needs transformers")
    w = replace(SMALL, function=function, mode="inference")
    model = MODELS[function].build(w)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    count = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in tables)
    if MODELS[function].package:
        count += w.vocabulary * w.H  # the readout is the table of the tokens
    steps, flops, moved = w.cost()
    assert (steps, flops, moved) == (1, 2 * count * w.tokens, 4 * count)
    assert replace(w, mode="training").cost()[1] == 3 * flops


def test_without_transformers_its_models_say_so(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    w = replace(SMALL, function="gpt2")
    rows = Runner("cpu").run(Case("models", "gpt2", tuple(Participant(n, w) for n in (EAGER, SDPA, OWN)), Effort()))
    assert {(r.status, r.reason) for r in rows} == {("unavailable", "transformers is not installed: pip install transformers")}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan(device, quick):
    cases = suite.plan(Options(device, "float32", (1,), quick))
    small = [case for case in cases if case.group in stand_ins.FAMILIES]
    rows = [row for family in stand_ins.FAMILIES.values() for row in family.rows.values()]
    assert len(small) == (sum(len(row.modes) for row in rows) if device == "cpu" else 0)
    cases = [case for case in cases if case not in small]
    assert [c.group for c in cases if c.participants[0].workload.mode == "inference"][:: 1 if quick else 2] == list(MODELS)
    for case in cases:
        (w,) = {p.workload for p in case.participants}
        assert w.function == case.group and w.device == device and w.H % w.heads == 0
        assert w.dtype == ("bfloat16" if device == "cuda" else "float32") and (w.layers == 12) is (device == "cuda" and not quick)
        names = [p.provider for p in case.participants]
        assert names == ([EAGER, SDPA, OWN] if MODELS[w.function].package else [BEFORE, AFTER])
        assert (names[-1], names[-2]) in case.baseline
    if quick:
        assert len(cases) == 8 and sum(c.effort.seconds for c in cases) < 5
        assert sum(c.effort.seconds for c in small) < 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, row in STAND_INS.items() for mode in row.modes])
def test_small_recurrent_models_pass_the_gate(name, mode, dtype):
    row = STAND_INS[name]
    w = StandInWorkload(name, min(row.T, 9), min(row.B, 4), row.I, row.hidden[0], mode, dtype=dtype, narrow=row.hidden[0] > 512)
    for provider in (BEFORE, AFTER):
        result = check_provider(lambda shape, provider=provider: (MODEL_PROVIDERS[provider].build(shape), ""), w)
        assert result.ok, result.reason
    model = MODEL_PROVIDERS[AFTER].build(w)
    assert all(type(layer).__module__.startswith("fastseq") for layer in model.layers)
    rows = sum(model.lengths.tolist()) if row.way == "packed" else w.B * w.T
    output = w.call(model, problem_of(w)).forward()
    assert output.numel() == rows * (w.row.out or w.row.vocabulary or w.row.hidden[-1] * (1 + row.both))


def test_a_model_called_step_by_step_is_the_model_called_at_once():
    name = "char-rnn, sampling"
    w = StandInWorkload(name, 6, 2, 128, 128)
    model = w.build()
    input = w.draw()
    stepped = model(input)
    model.way = "whole"
    torch.testing.assert_close(stepped, model(input))
    assert w.cost()[1] == 2 * 12 * (4 * 128 * 4 * 128 + 100 * 128)  # of 12 tokens: two layers of two matrices, and the readout


def test_a_rollout_feeds_its_output_back():
    w = StandInWorkload("DeepAR, sampling", 5, 2, 16, 40)
    model, x = w.build(), w.draw().float()
    whole = model(x)
    torch.testing.assert_close(model(torch.cat((x[:, :1], torch.full_like(x[:, 1:], torch.nan)), 1)), whole)
    model.way = "steps"
    torch.testing.assert_close(model(torch.cat((x[:, :1], whole[:, :-1]), 1)), whole)


class Late(stand_ins_models.Layers):
    """Starts every step from zeros: what a converted model must not do."""

    def through(self, x, states):
        return super().through(x, [None] * len(states))


def test_a_model_that_forgets_its_states_is_refused():
    result = check_provider(lambda w: (Late(w), ""), StandInWorkload("streaming GRU 128", 5, 1, 128, 128))
    assert not result.ok and "output is off by" in result.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, row in ATTENTION_STAND_INS.items() for mode in row.modes])
def test_small_attention_models_pass_the_gate(name, mode, dtype):
    row = ATTENTION_STAND_INS[name]
    if row.package and WITHOUT:
        pytest.skip("needs transformers")
    w = AttentionStandInWorkload.of(row, mode, dtype=dtype).small()
    for provider in (SDPA, OWN) if row.package else (BEFORE, AFTER):
        result = check_provider(lambda shape, provider=provider: (MODEL_PROVIDERS[provider].build(shape), ""), w)
        assert result.ok, result.reason
    call = w.call(MODEL_PROVIDERS[OWN if row.package else AFTER].build(w), problem_of(w))
    assert call.model.training is (mode == "training") and call.outputs()["output"].isfinite().all()
    assert call.model.training is (mode == "training")
    assert all(c.startswith("backend: ") for c in MODEL_PROVIDERS[AFTER].chose(call))


@pytest.mark.skipif(WITHOUT, reason="needs transformers")
@pytest.mark.parametrize("name", ["GPT-2, generation", "Llama, generation"])
def test_a_model_with_a_cache_is_the_model_called_at_once(name):
    w = AttentionStandInWorkload.of(ATTENTION_STAND_INS[name], "inference").small()
    model, input = w.build().eval(), w.draw()
    stepped = model(input)
    model.way = "whole"
    torch.testing.assert_close(stepped, model(input))


def test_greedy_decoding_is_the_model_called_at_once():
    w = AttentionStandInWorkload.of(ATTENTION_STAND_INS["nn.Transformer, greedy"], "inference").small()
    model, tokens = w.build().eval(), w.draw()
    x = model.embedding(tokens) + model.positions.weight
    mask = nn.Transformer.generate_square_subsequent_mask(w.T)
    torch.testing.assert_close(model(tokens), model.readout(model.transformer(x, x, tgt_mask=mask, tgt_is_causal=True)))


def test_dropout_is_timed_and_not_compared():
    w = AttentionStandInWorkload.of(ATTENTION_STAND_INS["nn.MultiheadAttention T=20, dropout"], "training")
    call = w.call(w.build(), problem_of(w))
    assert all(torch.equal(*pair) for pair in zip(call.gradients().values(), call.gradients().values(), strict=True))
    assert not torch.equal(call.run()[0], call.run()[0])


class Seeing(attention_models.Decoder):
    """Sees what is to come: what no causal mask may become."""

    def forward(self, x):
        return self.layers(x, x)


def test_a_model_that_sees_the_future_is_refused():
    w = AttentionStandInWorkload.of(ATTENTION_STAND_INS["nn.TransformerDecoder"], "inference").small()
    result = check_provider(lambda w: (Seeing(w), ""), w)
    assert not result.ok and "output is off by" in result.reason


def test_sizes_are_those_of_the_rows():
    for row in ATTENTION_STAND_INS.values():
        w = AttentionStandInWorkload.of(row, row.modes[0], dtype="float32")
        assert (w.B, w.T, w.H, w.heads, w.layers) == (row.B, row.T, row.H, row.heads, row.layers)
        assert w.H % w.heads == 0 and w.dtype == (row.dtype or "float32")
    pictures = {
        name: AttentionStandInWorkload.of(ATTENTION_STAND_INS[name], "inference").draw().shape for name in ("ViT", "SigLIP")
    }
    assert set(pictures.values()) == {(1, 3, 224, 224)}


def small_rows(synthetic, group, ratio):
    rows = []
    for case in stand_ins.plan(Options("cpu", "float32", (1,), quick=False), 1):
        if case.group != group:
            continue
        before, after = case.participants
        w = before.workload
        value = ratio(w.function, w.mode)
        rows.append(synthetic.timed(Row.of(suite.NAME, group, before.provider, w), 1e-3))
        rows.append(
            synthetic.timed(Row.of(suite.NAME, group, after.provider, w), 1e-3 / value, over=before.provider, ratio=value)
        )
    return rows


@pytest.mark.parametrize(("group", "slowest"), [("stand-ins", "LSTM 25"), ("attention stand-ins", "BERT")])
@pytest.mark.parametrize(
    ("slow", "mean", "reached"), [(0.98, 1.4, (True, True)), (0.96, 1.4, (False, True)), (1.2, 1.2, (True, False))]
)
def test_no_slower_and_the_mean(synthetic, slow, mean, reached, group, slowest):
    rows = small_rows(synthetic, group, lambda name, mode: slow if (name, mode) == (slowest, "training") else mean)
    derived = stand_ins.derive(rows)
    both = derived["both"]
    assert (both["none slower"], both["mean reached"]) == reached
    assert both["slower"] == ([f"{slowest}, forward + backward"] if slow < 0.97 else [])
    models = [row for row in stand_ins.FAMILIES[group].rows.values() if "inference" in row.modes]
    assert derived["inference"]["models"] == len(models) and derived["inference"]["slower"] == []
    assert suite.derive(Results({"device": "cpu"}, {}, rows)) == {group: derived}
    (section,) = suite.present(Results({"device": "cpu"}, {}, rows))
    table = next(t for t in section.tables if t.title == "Converted models")
    assert [cell.text for cell in (table.rows[-1][5], table.rows[-1][7])] == [
        "reached" if ok else "not reached" for ok in reached[::-1]
    ]
    every = next(t for t in section.tables if t.title == "Every model")
    assert len(every.rows) == len(stand_ins.FAMILIES[group].rows) and all("×" in str(row) for row in every.rows)
    untimed = next(r for r in rows if r.provider in (AFTER, OWN))
    untimed.status, untimed.ratio, untimed.time = "wrong", None, None
    assert not stand_ins.derive(rows)["both"]["none slower"]


def whole_suite(synthetic, ratio):
    """Rows of every case, with what a model gains by its name and mode."""
    rows = []
    for case in suite.plan(Options("cpu", "float32", (1,), quick=True)):
        base = dict(case.baseline)
        for participant in case.participants:
            w, over = participant.workload, base.get(participant.provider)
            value = ratio(w.function, w.mode) if participant.provider in (AFTER, OWN) else 1.0
            options = {"over": over, "ratio": value} if over else {}
            rows.append(synthetic.timed(Row.of(suite.NAME, case.group, participant.provider, w), 1e-3 / value, **options))
    return Results({"device": "cpu"}, {}, rows)


def test_documents_show_every_model_and_name_what_is_slower(synthetic):
    results = whole_suite(synthetic, lambda name, mode: 0.9 if (name, mode) == ("GPT-2", "training") else 1.5)
    rows = before_and_after.afterwards(results)
    models = {row.function for row in rows}
    assert len(models) == len(MODELS) + len(STAND_INS) + len(ATTENTION_STAND_INS)
    told = before_and_after.words(results)
    assert told.startswith(f"{len(models)} whole models before and after: forward 1.50× (1.50 to 1.50), forward + backward 1.4")
    assert f"Slower afterwards at 1 of {len(rows)} points, at 1 of them by more than 3%: GPT-2, forward + backward 0.90×." in told
    groups = dict(before_and_after.bars(results, "float32"))
    assert list(groups) == ["Training step, whole models before and after", "Inference, whole models before and after"]
    of_kinds = {bar.label.partition(" ")[2]: bar for bar in groups["Training step, whole models before and after"]}
    assert list(of_kinds) == list(before_and_after.KINDS) and of_kinds["Hugging Face"].losses == 1
    assert sum(bar.losses for of_kind in groups.values() for bar in of_kind) == 1
    narrow = sum(row.dtype != "float32" for row in rows)
    assert narrow and sum(len(bar.values) for of_kind in groups.values() for bar in of_kind) == len(rows) - narrow
    head, _, *lines = before_and_after.table(results)
    assert len({line.split(" | ")[0] for line in lines}) == len(lines) == len(models)
    (lost,) = [line for line in lines if "▼" in line]
    assert lost.startswith("| GPT-2 | Hugging Face | B=4, T=64, width 256 | **1.50×** 1.00 ms → 667 µs | **0.90×**▼ 1.00 ms")
    assert "bfloat16" in next(line for line in lines if line.startswith("| BERT, bf16 |")) and "forward + backward" in head
    unhurt = before_and_after.words(whole_suite(synthetic, lambda name, mode: 1.5))
    assert f"Slower afterwards at none of {len(rows)} points." in unhurt


def test_a_run_from_end_to_end(tmp_path):
    only = "group=lstm-lm mode=training"
    argv = ["--suite", "models", "--quick", "--threads", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    before, after = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (before["provider"], after["provider"]) == (BEFORE, AFTER)
    for row in (before, after):
        assert row["status"] == "ok" and row["check"]["ok"] and row["time"]["median"] > 0 and row["memory"] > row["kept"] / 2 > 0
    assert after["ratio"]["baseline"] == BEFORE and after["chose"][0].startswith("backend: ")
    assert "Whole models before and after" in (tmp_path / "report.html").read_text()
