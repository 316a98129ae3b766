"""Transformer-XL against transformers', and what must hold of it whatever the weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import frozen
from oracles import transformer_xl as theirs

from fastseq.models.generation import beam, greedy, rows
from fastseq.models.transformer_xl import TransformerXL
from support import tasks
from support import token_models as holds
from support.models import trained

WORDS, MEMORY = 7, 4


def made(**options) -> TransformerXL:
    torch.manual_seed(0)
    model = TransformerXL(WORDS, 8, 2, 12, 2, MEMORY, **options).double()
    for bias in (model.u, model.v):
        torch.nn.init.normal_(bias)
    return model


def tokens(steps=9):
    torch.manual_seed(1)
    return torch.randint(WORDS, (3, steps))


def from_transformers(weights):
    pairs = (("word_emb.emb_layers.0", "embedding"), ("r_w_bias", "u"), ("r_r_bias", "v"), ("dec_attn.qkv_net", "projection"),
             ("dec_attn.o_net", "out"), ("dec_attn.r_net", "relative"), ("dec_attn.layer_norm", "norms.0"),
             ("pos_ff.layer_norm", "norms.1"), ("pos_ff.CoreNet", "inner"))  # fmt: skip
    renamed = {}
    for name, weight in weights.items():
        for other, ours in pairs:
            name = name.replace(other, ours)
        renamed[name.removeprefix("layers.0.dec_attn.")] = weight
    return renamed


@pytest.mark.parametrize(
    ("name", "same_length", "norm"), [("same length", True, "post"), ("all", False, "post"), ("norm before", True, "pre")]
)
def test_it_is_transformers(name, same_length, norm):
    results = frozen.read(theirs.__file__)
    case, sizes = results[name], (theirs.WORDS, theirs.WIDTH, theirs.HEADS, theirs.INNER)
    options = {"same_length": same_length, "clamp": theirs.CLAMP, "tied": False, "norm": norm}
    model = TransformerXL(*sizes, theirs.LAYERS, theirs.MEMORY, **options).double()
    model.final = torch.nn.Identity()  # theirs has no norm at the end
    output = {"output.weight": torch.eye(theirs.WIDTH, dtype=torch.float64)}  # the logits are the hidden states
    model.load_state_dict(from_transformers(results["weights"]) | output)
    state = tuple(torch.zeros(2, theirs.MEMORY, theirs.WIDTH, dtype=torch.float64) for _ in range(theirs.LAYERS))
    found = []
    for segment in results["tokens"].split(theirs.STEPS, 1):
        logits, state = model(segment, state)
        found.append(logits)
    holds.close(torch.cat(found, 1), case["output"])
    for number, memory in enumerate(state):
        holds.close(memory, case["memories"][str(number)])
    model.output.weight.requires_grad_(False)
    holds.same_gradients(torch.cat(found, 1), model, from_transformers(case["gradients"]))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("clamp", [None, 2])
def test_step_is_forward_however_the_sequence_is_cut(norm, clamp):
    model, given = made(norm=norm, clamp=clamp), tokens()
    holds.step_is_forward(model, given, model.start(3))
    whole, state = model(given, model.start(3))[0], model.start(3)
    parts = []
    for part in given.split([1, 5, 3], 1):
        logits, state = model(part, state)
        parts.append(logits)
        assert state[0].shape[1] <= MEMORY
    holds.close(torch.cat(parts, 1), whole)


def test_without_same_length_a_token_sees_its_whole_segment():
    model, given = made(same_length=False), tokens()
    holds.step_is_forward(model, given[:, : MEMORY + 1], model.start(3))  # as long as nothing has been forgotten
    changed = torch.cat([(given[:, :1] + 1) % WORDS, given[:, 1:]], 1)
    assert (model(given, model.start(3))[0] != model(changed, model.start(3))[0])[:, -1].any()
    near = made()
    reach = 2 * (MEMORY - 1)  # of two layers
    holds.close(near(given, near.start(3))[0][:, reach + 1 :], near(changed, near.start(3))[0][:, reach + 1 :])


def test_the_memory_is_seen_but_not_learned_through():
    model, given = made(), tokens(6)
    _, state = model(given[:, :3], model.start(3))
    assert not any(memory.requires_grad for memory in state)
    with_memory, without = (model(given[:, 3:], each)[0] for each in (state, model.start(3)))
    assert (with_memory != without).any()
    used = torch.autograd.grad(with_memory.sum(), model.layers[0].projection.weight, retain_graph=True)[0]
    assert used.isfinite().all()


def test_causal_and_rows_stand_alone():
    model, given = made(), tokens()
    holds.causal(lambda x: model(x, model.start(3))[0], given, (given + 1) % WORDS)
    holds.permuted(lambda x: model(x, model.start(len(x)))[0], given)
    _, state = model(given, model.start(3))
    whole = model(given, state)[0]
    for b in range(3):
        holds.close(model(given[b : b + 1], rows(state, torch.tensor([b])))[0], whole[b : b + 1])


def test_generation_is_the_forward_of_what_it_said():
    model, begin = made(), torch.tensor([0, 1, 2])
    said = greedy(model.step, model.start(3), begin, 7)
    logits, _ = model(torch.cat([begin[:, None], said[:, :-1]], 1), model.start(3))
    assert torch.equal(logits.argmax(-1), said)
    with torch.no_grad():
        assert torch.equal(beam(model.step, model.start(3), begin, 7, width=1)[0][:, 0], said)


def test_compiles_whole():
    model, given = made(), tokens(5)
    _, state = model(given, model.start(3))
    holds.captured(model, given, state)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_compiles_whole_with_inductor(norm):
    model, given = made(norm=norm), tokens(5)
    _, state = model(given, model.start(3))
    holds.compiled(model, lambda x, s: model(x, s)[0], given, state)
    holds.captured(model.step, given[:, 0], state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    model, given = made().to(dtype), tokens()
    out, state = model(given, model.start(3))
    expected = model.double()(given, model.start(3))[0]
    assert out.dtype == dtype and {memory.dtype for memory in state} == {dtype}
    assert (out.double() - expected).abs().max() < 200 * torch.finfo(dtype).eps


def test_dropouts_are_off_unless_named():
    given, plain = tokens(), made()
    outputs = [each(given, plain.start(3))[0] for each in (plain.train(), plain.eval())]
    assert torch.equal(*outputs)
    for name in ("dropout", "attention_dropout", "inner_dropout"):
        dropped = made(**{name: 0.5})
        assert not torch.equal(dropped.train()(given, plain.start(3))[0], outputs[0]), name
        assert torch.equal(dropped.eval()(given, plain.start(3))[0], outputs[0]), name


def test_errors_name_the_argument_and_what_is_accepted():
    with pytest.raises(ValueError, match="norm must be one of pre, post, got 'rms'"):
        made(norm="rms")
    with pytest.raises(ValueError, match=r"heads must divide width \(8\), got 3"):
        TransformerXL(WORDS, 8, 3, 12, 2, MEMORY)
    with pytest.raises(ValueError, match="memory must be greater than zero, got 0"):
        TransformerXL(WORDS, 8, 2, 12, 2, 0)
    with pytest.raises(ValueError, match="clamp must be greater than zero, got -1"):
        made(clamp=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mem_len'"):
        made(mem_len=4)


def test_a_state_of_another_model_or_batch_is_refused():
    model, given = made(), tokens()
    _, state = model(given, model.start(3))
    for other, message in (
        (rows(state, torch.tensor([0, 1])), r"state\[0\] must be \[3, 4, 8\] for this model and batch, got \[2, 4, 8\]"),
        (state[:1], "state must be a tuple of 2, as this model gives it back, got a tuple of 1"),
        (tuple(each.repeat(1, 2, 1) for each in state), r"state must be of at most 4 tokens \(memory\), got 8"),
        (tuple(each.float() for each in state), "state.0. must suit an input of torch.float64"),
        ((state[0], state[1][:, 1:]), r"state\[1\] must be \[3, 4, 8\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model(given, other)


@pytest.mark.slow
def test_it_recalls_what_was_a_segment_back_and_not_without_its_memory():
    """One symbol of 16 in the first segment, asked for at the end of the second, 300 steps."""
    found = {}
    for name in ("memory", "no memory"):
        torch.manual_seed(0)
        model = TransformerXL(18, 48, 4, 96, 3, 16, same_length=False)

        def said(batch, model=model, name=name):
            tokens, symbol = batch
            state = model.start(len(tokens))
            for segment in tokens.split(16, 1):
                scores, state = model(segment, model.start(len(tokens)) if name == "no memory" else state)
            return scores[:, -1], symbol

        batches = tasks.recall(64, 16, seed=1)
        trained(model, lambda said=said, batches=batches: F.cross_entropy(*said(next(batches))), 300, 2e-3)
        with torch.no_grad():
            scores, symbol = said(next(tasks.recall(500, 16, seed=2)))
        found[name] = (scores.argmax(-1) == symbol).double().mean().item()
    print(found)
    assert found["memory"] > 0.95 and found["no memory"] < 0.15
