"""Recurrent encoder-decoders against joeynmt and against the equations, and what must hold of them whatever the weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracles import frozen
from oracles import seq2seq as joeynmt
from torch import nn

from examples import dates
from fastseq.models.alignment import Alignment
from fastseq.models.generation import beam, greedy, rows
from fastseq.models.seq2seq import Decoder, Encoder
from support import tasks
from support import token_models as holds
from support.models import trained

KINDS = [("none", False), ("dot", False), ("dot", True), ("general", False), ("general", True), ("concat", False),
         ("concat", True), ("bahdanau", False)]  # fmt: skip
CELLS = ("gru", "lstm", "rnn")
WORDS = 7


def pair(cell="gru", attention="general", feeding=False, layers=2, **options) -> nn.ModuleDict:
    torch.manual_seed(0)
    encoder = Encoder(WORDS, 4, 3, cell=cell, layers=layers)
    decoder = Decoder(WORDS, 4, 6, 6, cell=cell, layers=layers, attention=attention, feeding=feeding, **options)
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}).double()


def batch(rows=3, source=6, target=5):
    torch.manual_seed(1)
    lengths = torch.tensor([source, 1, 4][:rows])
    return torch.randint(WORDS, (rows, source)), torch.randint(WORDS, (rows, target)), lengths


def started(model, source, lengths):
    return model["decoder"].start(*model["encoder"](source, lengths), lengths)


def logits(model, source, target, lengths):
    return model["decoder"](target, started(model, source, lengths))[0]


OURS = {"encoder.rnn": "encoder.rnn", "decoder.rnn": "decoder.rnn", "source": "encoder.embedding", "target": "decoder.embedding",
        "decoder.att_vector_layer": "decoder.combine", "decoder.output_layer": "decoder.output",
        "decoder.bridge_layer": "decoder.bridge", "decoder.attention.key_layer": "decoder.alignment.key",
        "decoder.attention.query_layer": "decoder.alignment.query",
        "decoder.attention.energy_layer": "decoder.alignment.energy"}  # fmt: skip


def from_joeynmt(weights):
    split = (name.rpartition(".") for name in weights)
    return {f"{OURS[module]}.{last}": weights[f"{module}.{last}"] for module, _, last in split}


@pytest.mark.parametrize(("cell", "attention", "fed"), joeynmt.CASES)
def test_it_is_joeynmts(cell, attention, fed):
    results = frozen.read(joeynmt.__file__)
    case = results[f"{cell} {attention} {fed}"]
    ours = {"luong": "general", "bahdanau": "concat"}[attention]
    encoder = Encoder(joeynmt.WORDS, joeynmt.WIDTH, joeynmt.HIDDEN // 2, cell=cell)
    sizes = (joeynmt.WORDS, joeynmt.WIDTH, joeynmt.HIDDEN, joeynmt.HIDDEN)
    decoder = Decoder(*sizes, cell=cell, layers=2, attention=ours, feeding=fed == "feeding")
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).double()
    model.load_state_dict(from_joeynmt(case["weights"]))
    out = logits(model, results["source"], results["target"], results["lengths"])
    holds.close(out, case["logits"], 1e-14)
    holds.same_gradients(out, model, from_joeynmt(case["gradients"]), 1e-13)


def softmax_sum(scores, values, length):
    weights = torch.softmax(scores[:length], 0)
    return sum(weights[j] * values[j] for j in range(length))


def test_bahdanau_asks_with_the_state_before():
    """Equations of the paper's appendix, row by row, with torch's cells: two layers, whose last one asks and is bridged from."""
    model = pair(attention="bahdanau")
    source, target, lengths = batch()
    memory, (h,) = model["encoder"](source, lengths)
    decoder = model["decoder"]
    cells = [nn.GRUCell(4 + 6, 6).double(), nn.GRUCell(6, 6).double()]
    for number, cell in enumerate(cells):
        cell.load_state_dict({name: getattr(decoder.rnn, f"{name}_l{number}") for name in cell.state_dict()})
    align, out = decoder.alignment, logits(model, source, target, lengths)
    for b, length in enumerate(lengths.tolist()):
        s = [torch.tanh(decoder.bridge(h[b, -2:].flatten()))] * 2
        for t in range(target.shape[1]):
            scores = torch.stack([align.energy(torch.tanh(align.query(s[1]) + align.key(each)))[0] for each in memory[b]])
            context = softmax_sum(scores, memory[b], length)
            below = cells[0](torch.cat([decoder.embedding(target[b, t]), context])[None], s[0][None])
            s = [below[0], cells[1](below, s[1][None])[0]]
            holds.close(out[b, t], decoder.output(torch.tanh(decoder.combine(torch.cat([s[1], context])))))


@pytest.mark.parametrize("score", ["dot", "general", "additive"])
def test_scores_are_the_papers(score):
    torch.manual_seed(0)
    align = Alignment(4, 4, score).double()
    query, memory = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    out = align(query, align.keys(memory), memory, torch.tensor([5, 2]))
    for b, length in enumerate((5, 2)):
        for t, s in enumerate(query[b]):
            scores = {
                "dot": lambda s=s, b=b: memory[b] @ s,
                "general": lambda s=s, b=b: memory[b] @ align.key.weight.T @ s,
                "additive": lambda s=s, b=b: (
                    torch.tanh(
                        torch.cat([s.expand(5, -1), memory[b]], 1) @ torch.cat([align.query.weight, align.key.weight], 1).T
                    )
                    @ align.energy.weight[0]
                ),
            }[score]()
            holds.close(out[b, t], softmax_sum(scores, memory[b], length))


@pytest.mark.parametrize("cell", CELLS)
def test_without_attention_and_bridge_it_is_two_networks_in_a_row(cell):
    torch.manual_seed(0)
    encoder = Encoder(WORDS, 4, 5, cell=cell, layers=2, bidirectional=False).double()
    decoder = Decoder(WORDS, 4, 5, 5, cell=cell, layers=2, attention="none", bridge=False).double()
    source, target, _ = batch()
    kind = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}[cell]
    theirs = [kind(4, 5, 2, batch_first=True).double() for _ in range(2)]
    for network, ours in zip(theirs, (encoder, decoder), strict=True):
        network.load_state_dict(ours.rnn.state_dict())
    _, last = theirs[0](encoder.embedding(source))
    expected = decoder.output(theirs[1](decoder.embedding(target), last)[0])
    holds.close(decoder(target, decoder.start(*encoder(source)))[0], expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("attention", "feeding"), KINDS)
def test_step_is_forward_and_rows_stand_alone(cell, attention, feeding):
    model = pair(cell, attention, feeding)
    source, target, lengths = batch()
    holds.step_is_forward(model["decoder"], target, started(model, source, lengths))
    holds.causal(lambda y: logits(model, source, y, lengths), target, (target + 1) % WORDS)
    holds.permuted(lambda x, y, n: logits(model, x, y, n), source, target, lengths)
    whole = logits(model, source, target, lengths)
    for b, length in enumerate(lengths.tolist()):  # alone, and without padding
        holds.close(logits(model, source[b : b + 1, :length], target[b : b + 1], None), whole[b : b + 1])
    changed = source.where(torch.arange(6) < lengths[:, None], (source + 1) % WORDS)
    holds.close(logits(model, changed, target, lengths), whole)


def test_an_empty_source_gives_finite_numbers():
    for attention in ("general", "concat", "bahdanau"):
        model = pair(attention=attention)
        source, target, _ = batch()
        out = logits(model, source, target, torch.tensor([0, 6, 2]))
        out.sum().backward()
        assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters()) and out.isfinite().all()


def test_compiles_whole():
    model, (source, target, lengths) = pair("lstm", "concat", True), batch(target=3)
    holds.captured(lambda x, y, n: logits(model, x, y, n), source, target, lengths)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("attention", "feeding"), KINDS)
def test_compiles_whole_with_inductor(attention, feeding):
    model, (source, target, lengths) = pair("gru", attention, feeding), batch(target=3)
    holds.compiled(model, lambda x, y, n: logits(model, x, y, n), source, target, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    model, (source, target, lengths) = pair("lstm", "general", True).to(dtype), batch()
    out = logits(model, source, target, lengths)
    expected = logits(model.double(), source, target, lengths)
    assert out.dtype == dtype and (out.double() - expected).abs().max() < 100 * torch.finfo(dtype).eps


def test_a_wide_beam_finds_the_best_sequence():
    model, (source, _, lengths) = pair("gru", "general", True), batch()
    decoder, begin, end, steps = model["decoder"], torch.zeros(3, dtype=torch.int64), 1, 3
    decoder.output.weight.data *= 5  # so that words differ in likelihood
    state = started(model, source, lengths)
    found, scores = beam(decoder.step, state, begin, steps, width=WORDS**2, end=end)
    for b in range(3):
        best, every = {}, list(itertools.product(range(WORDS), repeat=steps))
        inputs = torch.tensor([(0, *words[:-1]) for words in every])
        chances = decoder(inputs, rows(state, torch.full((len(every),), b)))[0].log_softmax(-1)
        for words, each in zip(every, chances, strict=True):
            said = words[: words.index(end) + 1] if end in words else words
            best[said] = each[range(len(said)), list(said)].sum().item()
        wanted = max(best, key=best.get)
        assert tuple(found[b, 0].tolist()) == (*wanted, *[end] * (steps - len(wanted)))
        for words, score in zip(found[b].tolist(), scores[b].tolist(), strict=True):  # of all that were found, not the best alone
            said = words[: words.index(end) + 1] if end in words else words
            assert score == pytest.approx(best[tuple(said)], abs=1e-12)
        assert (scores[b].diff() <= 0).all()


def test_after_its_end_a_row_says_nothing_else():
    def counts(token, state):
        return F.one_hot((token + 1) % 5, 5).double(), state

    said = greedy(counts, (), torch.tensor([0, 2]), 5, end=3)
    assert said.tolist() == [[1, 2, 3, 3, 3], [3, 3, 3, 3, 3]]
    assert greedy(counts, (), torch.tensor([0, 2]), 5).tolist() == [[1, 2, 3, 4, 0], [3, 4, 0, 1, 2]]
    assert torch.equal(beam(counts, (), torch.tensor([0, 2]), 5, width=1, end=3)[0][:, 0], said)


def test_a_length_penalty_favors_the_longer():
    """`end` at once is likelier; a word more and then `end` for sure is longer."""

    def step(token, state):
        first = torch.tensor([0.55, 0.45, 0.0]).log().expand(len(token), 3)
        return torch.where((token == 2)[:, None], first, torch.tensor([1.0, 0.0, 0.0]).log()), state

    begin = torch.tensor([2, 2])
    short, _ = beam(step, (), begin, 3, width=2, end=0)
    longer, scores = beam(step, (), begin, 3, width=2, end=0, length_penalty=3.0)
    assert short[0, 0].tolist() == [0, 0, 0] and longer[0, 0].tolist() == [1, 0, 0]
    expected = [math.log(p) / ((5 + n) / 6) ** 3 for p, n in ((0.45, 2), (0.55, 1))]
    assert scores[0].tolist() == pytest.approx(expected)


def test_dropouts_are_off_unless_named():
    model, given = pair("gru", "general", True).train(), batch()
    assert torch.equal(logits(model, given[0], given[1], given[2]), logits(model.eval(), given[0], given[1], given[2]))
    for name in ("input_dropout", "layer_dropout", "output_dropout"):
        dropped = pair("gru", "general", True, **{name: 0.5}).train()
        assert not torch.equal(logits(dropped, *given[:2], given[2]), logits(model, *given[:2], given[2])), name


def test_errors_name_the_argument_and_what_is_accepted():
    with pytest.raises(ValueError, match="cell must be one of gru, lstm, rnn, got 'sru'"):
        Encoder(7, 4, 6, cell="sru")
    with pytest.raises(ValueError, match="attention must be one of none, dot, general, concat, bahdanau, got None"):
        Decoder(7, 4, 6, 6, attention=None)
    with pytest.raises(ValueError, match="feeding goes with attention='dot', 'general' or 'concat', got attention='bahdanau'"):
        Decoder(7, 4, 6, 6, attention="bahdanau", feeding=True)
    with pytest.raises(ValueError, match="got memory=6 and hidden=5"):
        Decoder(7, 4, 5, 6, attention="dot")
    with pytest.raises(ValueError, match="hidden must be greater than zero, got 0"):
        Encoder(7, 4, 0)
    with pytest.raises(TypeError, match="layers must be an int, got 1.5"):
        Encoder(7, 4, 6, layers=1.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'droput'"):
        Encoder(7, 4, 6, droput=0.1)
    with pytest.raises(ValueError, match="width must be greater than zero, got 0"):
        beam(lambda token, state: (token, state), (), torch.tensor([0]), 3, width=0)


def test_a_state_of_another_model_or_batch_is_refused():
    model, (source, target, lengths) = pair(), batch()
    state = started(model, source, lengths)
    with pytest.raises(RuntimeError, match=r"state.hidden\[0\] must be \[2, 2, 6\] for this model and batch, got \[3, 2, 6\]"):
        model["decoder"](target[:2], state)
    with pytest.raises(RuntimeError, match=r"state.hidden must be a tuple of 2, as this model gives it back, got a tuple of 1"):
        pair("lstm")["decoder"](target, state)
    with pytest.raises(RuntimeError, match=r"state.fed must be \[3, 6\]"):
        pair(feeding=True)["decoder"].step(target[:, 0], state)
    with pytest.raises(RuntimeError, match=r"memory must be \[any, any, 6\] for this model and batch, got \[3, 6, 8\]"):
        model["decoder"].start(torch.zeros(3, 6, 8, dtype=torch.float64), state.hidden)
    with pytest.raises(RuntimeError, match=r"state.hidden\[0\] must be \[3, 2, 6\]"):
        pair(bridge=False)["decoder"].start(*model["encoder"](source, lengths), lengths)


def exact_after(steps, attention, words, task):
    """The share of 500 new sequences said rightly without help, after so many steps of one seed."""
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "encoder": Encoder(words, 32, 64),
        "decoder": Decoder(words, 32, 64, 128, attention=attention),
    })  # fmt: skip
    batches = task(64, seed=1)

    def loss():
        source, lengths, target = next(batches)
        return tasks.loss_of(logits(model, source, tasks.said_after(target), lengths), target)

    trained(model, loss, steps, 2e-3)
    source, lengths, target = next(task(500, seed=2))
    with torch.no_grad():
        begin = torch.full((500,), tasks.BEGIN)
        said = greedy(model["decoder"].step, started(model, source, lengths), begin, target.shape[1], end=tasks.END)
    return tasks.exact(said, target)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_attention_learns_to_reverse_where_none_does_not():
    """Sequences of 5 to 10 symbols said backwards."""
    found = {kind: exact_after(1300, kind, tasks.WORDS, tasks.reversals) for kind in ("general", "bahdanau", "none")}
    print(found)
    assert found["general"] > 0.95 and found["bahdanau"] > 0.95 and found["none"] < 0.8


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_attention_learns_dates_sooner():
    """Dates in five forms said as ISO 8601 has them, by character."""
    found = {kind: exact_after(700, kind, dates.WORDS, dates.batches) for kind in ("general", "none")}
    print(found)
    assert found["general"] > 0.95 and found["none"] < 0.8
