"""GPT, BERT, ViT and T5 against transformers' models of those names, and what must hold of them whatever the weights."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import frozen
from oracles import transformers_models as theirs
from torch import nn

from fastseq.models.bert import BERT
from fastseq.models.generation import beam, greedy
from fastseq.models.gpt import GPT
from fastseq.models.t5 import T5
from fastseq.models.vit import ViT
from support import tasks
from support import token_models as holds
from support.models import trained

WORDS, WIDTH, HEADS, INNER, LAYERS = theirs.WORDS, theirs.WIDTH, theirs.HEADS, theirs.INNER, theirs.LAYERS

NAMES = {
    "gpt": [("transformer.wte", "embedding.tokens"), ("transformer.wpe", "embedding.places"), ("transformer.h", "decoder.blocks"),
            ("transformer.ln_f", "decoder.final"), ("ln_1", "norms.0"), ("ln_2", "norms.1"),
            ("attn.c_attn", "attention.projection"), ("attn.c_proj", "attention.out"),
            ("mlp.c_fc", "inner.0"), ("mlp.c_proj", "inner.3")],
    "bert": [("bert.embeddings.word_embeddings", "embedding.tokens"), ("bert.embeddings.position_embeddings", "embedding.places"),
             ("bert.embeddings.token_type_embeddings", "segments"), ("bert.embeddings.LayerNorm", "norm"),
             ("bert.encoder.layer", "encoder.blocks"), ("attention.output.dense", "attention.out"),
             ("attention.output.LayerNorm", "norms.0"), ("output.LayerNorm", "norms.1"),
             (r"attention.self.(\w+)\.", r"attention.\1."), ("intermediate.dense", "inner.0"),
             (r"(\d).output.dense", r"\1.inner.3"), ("bert.pooler.dense", "pooler"),
             ("cls.predictions.bias", "output.bias"), ("cls.predictions.transform.dense", "transform"),
             ("cls.predictions.transform.LayerNorm", "transform_norm"), ("cls.seq_relationship", "relation")],
    "vit": [("vit.embeddings.cls_token", "token"), ("vit.embeddings.position_embeddings", "places"),
            ("vit.embeddings.patch_embeddings.projection", "patches"), ("vit.layers", "encoder.blocks"),
            (r"attention.(\w)_proj", r"attention.\1"), ("attention.o", "attention.out"), ("layernorm_before", "norms.0"),
            ("layernorm_after", "norms.1"), ("mlp.fc1", "inner.0"), ("mlp.fc2", "inner.3"), ("vit.layernorm", "encoder.final"),
            ("classifier", "head")],
    "t5": [("shared", "embedding.tokens"), (r"encoder.block.0.+relative_attention_bias", "encoder_bias"),
           (r"decoder.block.0.+relative_attention_bias", "decoder_bias"), ("block", "blocks"),
           ("SelfAttention.o", "attention.out"),
           ("EncDecAttention.o", "cross.out"), ("SelfAttention", "attention"), ("EncDecAttention", "cross"),
           ("DenseReluDense.wi", "inner.0"), ("DenseReluDense.wo", "inner.3"), (r"layer\.(\d).layer_norm", r"norms.\1"),
           (r"layer\.\d\.", ""), ("final_layer_norm", "final")],
}  # fmt: skip


def renamed(kind, weights):
    """Their weights under our names: three projections in one; GPT-2's linear layers are stored the other way around."""
    ours = {}
    for name, weight in weights.items():
        turned = kind == "gpt" and weight.dim() == 2 and not name.startswith(("transformer.wte", "transformer.wpe"))
        for pattern, other in NAMES[kind]:
            name = re.sub(pattern, other, name)
        ours[name] = weight.T if turned else weight
    for first in [name for name in ours if re.search(r"\.(q|query)\.", name)]:
        letters = ("query", "key", "value") if ".query." in first else ("q", "k", "v")
        parts = [ours.pop(first.replace(f".{letters[0]}.", f".{each}.")) for each in letters]
        ours[first.replace(f".{letters[0]}.", ".projection.")] = torch.cat(parts)
    return ours


def made(kind, **options):
    torch.manual_seed(0)
    return {
        "gpt": lambda: GPT(WORDS, WIDTH, HEADS, LAYERS, theirs.LONGEST, inner=INNER, **options),
        "bert": lambda: BERT(WORDS, WIDTH, HEADS, LAYERS, theirs.LONGEST, inner=INNER, **options),
        "vit": lambda: ViT(theirs.SIZE, theirs.PATCH, theirs.CHANNELS, theirs.CLASSES, WIDTH, HEADS, LAYERS, inner=INNER,
                           **{"eps": 1e-12} | options),
        "t5": lambda: T5(WORDS, WIDTH, HEADS, INNER, LAYERS, buckets=theirs.BUCKETS, farthest=theirs.FARTHEST, **options),
    }[kind]().double()  # fmt: skip


def loaded(kind, results):
    model, weights = made(kind), renamed(kind, results[kind]["weights"])
    if kind == "bert":  # what BERT's authors also trained, on the pooled vector; it is no part of the model here
        model.relation = torch.nn.Linear(WIDTH, 2, dtype=torch.float64)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"output.weight"}  # that is the table of words
    return model


@pytest.mark.parametrize("kind", ["gpt", "vit", "t5"])
def test_logits_are_transformers(kind):
    results = frozen.read(theirs.__file__)
    model = loaded(kind, results)
    given = {"gpt": ["source"], "vit": ["images"], "t5": ["source", "target", "lengths"]}[kind]
    logits = model(*(results[name] for name in given))
    holds.close(logits, results[kind]["logits"])
    holds.same_gradients(logits, model, renamed(kind, results[kind]["gradients"]), 1e-11)


def test_berts_two_heads_are_transformers():
    results = frozen.read(theirs.__file__)
    model = loaded("bert", results)
    x = model(results["source"], results["lengths"], results["segments"])
    heads = model.words(x), model.relation(model.pooled(x))
    for found, name in zip(heads, ("prediction_logits", "seq_relationship_logits"), strict=True):
        holds.close(found, results["bert"][name])
    holds.same_gradients(heads, model, renamed("bert", results["bert"]["gradients"]), 1e-11)


def batch():
    results = frozen.read(theirs.__file__)
    return results["source"], results["target"], results["lengths"]


def test_gpt_steps_and_prompts_are_forward():
    model, (tokens, *_) = made("gpt"), batch()
    whole = model(tokens)
    holds.causal(model, tokens, (tokens + 1) % WORDS)
    holds.permuted(model, tokens)
    with torch.no_grad():
        state = model.start(2, 6)
        for t in range(6):
            logits, state = model.step(tokens[:, t], state)
            holds.close(logits, model(tokens[:, : t + 1])[:, -1])
        first, state = model.read(tokens[:, :4], model.start(2, 6))
        holds.close(torch.cat([first, model.read(tokens[:, 4:], state)[0]], 1), whole.detach())
        said = greedy(model.step, model.start(2, 6), tokens[:, 0], 6)
        assert torch.equal(beam(model.step, model.start(2, 6), tokens[:, 0], 6, width=1)[0][:, 0], said)


def test_t5_steps_are_forward_also_of_rows_at_different_places():
    model, (source, target, lengths) = made("t5"), batch()
    torch.nn.init.normal_(model.decoder_bias.weight)  # so that places matter
    whole = model(source, target, lengths)
    holds.causal(lambda y: model(source, y, lengths), target, (target + 1) % WORDS)
    holds.permuted(model, source, target, lengths)
    for b, length in enumerate(lengths.tolist()):
        holds.close(model(source[b : b + 1, :length], target[b : b + 1]), whole[b : b + 1])
    with torch.no_grad():
        state = model.start(source, 6, lengths)
        for t in range(6):
            logits, state = model.step(target[:, t], state)
            holds.close(logits, model(source, target[:, : t + 1], lengths)[:, -1])
        state = state._replace(past=torch.tensor([5, 2]))
        logits, _ = model.step(torch.tensor([3, 3]), state)
        for b, count in enumerate((5, 2)):
            alone = torch.cat([target[b, :count], torch.tensor([3])])[None]
            holds.close(logits[b], model(source[b : b + 1], alone, lengths[b : b + 1])[0, -1])


def test_berts_rows_stand_alone_and_see_both_sides():
    model, (tokens, _, lengths) = made("bert"), batch()
    whole = model(tokens, lengths)
    holds.permuted(model, tokens, lengths)
    for b, length in enumerate(lengths.tolist()):
        holds.close(model(tokens[b : b + 1, :length]), whole[b : b + 1, :length])
    changed = torch.cat([tokens[:1, :-1], (tokens[:1, -1:] + 1) % WORDS], 1)
    assert (model(changed)[0, 0] != model(tokens[:1])[0, 0]).any()


def test_vit_sees_patches_in_their_places():
    model = made("vit")
    torch.manual_seed(1)
    images = torch.randn(3, theirs.CHANNELS, theirs.SIZE, theirs.SIZE, dtype=torch.float64)
    holds.permuted(model, images)
    swapped = images.roll(theirs.PATCH, -1)  # the same patches, elsewhere
    assert (model(swapped) - model(images)).abs().max() > 1e-6
    model.places.data.zero_()
    holds.close(model(swapped), model(images))


GIVEN = {"gpt": lambda s, t, n: (s,), "bert": lambda s, t, n: (s, n), "t5": lambda s, t, n: (s, t, n),
         "vit": lambda s, t, n: (torch.ones(2, theirs.CHANNELS, theirs.SIZE, theirs.SIZE, dtype=torch.float64),)}  # fmt: skip


@pytest.mark.parametrize("kind", GIVEN)
def test_compiles_whole(kind):
    model, given = made(kind), GIVEN[kind](*batch())
    holds.captured(model, *given)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", GIVEN)
def test_compiles_whole_with_inductor(kind):
    model, given = made(kind), GIVEN[kind](*batch())
    run = (
        model
        if kind != "bert"
        else lambda s, n: torch.cat([model.words(model(s, n)).flatten(), model.pooled(model(s, n)).flatten()])
    )
    holds.compiled(model, run, *given)
    if kind == "t5":
        with torch.no_grad():
            holds.captured(model.step, given[1][:, 0], model.start(given[0], 6, given[2]))


@pytest.mark.parametrize("kind", GIVEN)
def test_other_precisions_and_dropouts(kind):
    model, given = made(kind), GIVEN[kind](*batch())
    plain = model(*given)
    for name in ("dropout", "attention_dropout"):
        dropped = made(kind, **{name: 0.5})
        assert not torch.equal(dropped.train()(*given), plain) and torch.equal(dropped.eval()(*given), plain), name
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [each.to(dtype) if each.is_floating_point() else each for each in given]
        out, expected = model.to(dtype)(*inputs), model.double()(*given)
        scale = max(1.0, expected.abs().max().item())
        assert out.dtype == dtype and (out.double() - expected).abs().max() < 200 * torch.finfo(dtype).eps * scale


def test_errors_name_the_argument_and_what_is_accepted():
    for kind in GIVEN:
        with pytest.raises(TypeError, match="unexpected keyword argument 'hidden_size'"):
            made(kind, hidden_size=4)
    with pytest.raises(ValueError, match=r"patch must divide size \(4\), got 3"):
        ViT(4, 3, 1, 2, 4, 2, 1)
    with pytest.raises(RuntimeError, match=r"the input must be \[any, 2, 4, 4\], got \[1, 2, 4, 5\]"):
        made("vit")(torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match=r"there are 6 learned places \(longest\), got 7 tokens"):
        made("gpt").start(2, 7)
    with pytest.raises(ValueError, match="layers must be greater than zero, got 0"):
        T5(4, 4, 2, 5, 0)
    with pytest.raises(ValueError, match=r"heads must divide width \(4\), got 3"):
        GPT(4, 4, 3, 1)


def test_a_state_of_another_model_or_batch_is_refused():
    source, target, lengths = batch()
    gpt, t5 = made("gpt"), made("t5")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="a state of 3 rows goes with 3 rows of tokens, got 2"):
            gpt.step(source[:, 0], gpt.start(3, 4))
        with pytest.raises(RuntimeError, match="state.source must be a tuple of 0"):
            gpt.step(source[:, 0], t5.start(source, 6, lengths))
        with pytest.raises(
            RuntimeError, match=r"state.keys\[0\] must be \[1, 6, 2, 2\] for this model and batch, got \[2, 6, 2, 2\]"
        ):
            t5.step(target[:1, 0], t5.start(source, 6, lengths))
        with pytest.raises(RuntimeError, match="state.source must be a tuple of 2"):
            t5.step(target[:, 0], gpt.start(2, 6))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_t5_learns_to_reverse_with_its_bias_and_not_without():
    """Exact sequences said without help, 1,000 steps: the bias by distance is all that it knows of places."""
    found = {}
    for name in ("bias", "none"):
        torch.manual_seed(0)
        model = T5(tasks.WORDS, 64, 4, 128, 2)
        if name == "none":
            for bias in (model.encoder_bias, model.decoder_bias):
                nn.init.zeros_(bias.weight).requires_grad_(False)
        batches = tasks.reversals(64, seed=1)

        def loss(model=model, batches=batches):
            source, lengths, target = next(batches)
            return tasks.loss_of(model(source, tasks.said_after(target), lengths), target)

        trained(model, loss, 1000, 2e-3)
        source, lengths, target = next(tasks.reversals(500, seed=2))
        with torch.no_grad():
            said = greedy(model.step, model.start(source, 11, lengths), torch.full((500,), tasks.BEGIN), 11, end=tasks.END)
        found[name] = tasks.exact(said, target)
    print(found)
    assert found["bias"] > 0.75 and found["none"] < 0.1


@pytest.mark.slow
def test_gpt_learns_english_letters():
    """Bits a letter of Persuasion after 500 steps, against what the frequencies of letters alone give."""
    text = (Path(__file__).parents[2] / "examples/data/persuasion.txt").read_text(encoding="utf-8")
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(letter) for letter in text])
    shares = codes.bincount().double() / len(codes)
    torch.manual_seed(0)
    model = GPT(len(letters), 96, 4, 3, 64)

    known, unknown = codes.split([len(codes) * 9 // 10, len(codes) - len(codes) * 9 // 10])

    def loss(text):
        piece = text[torch.randint(len(text) - 65, (24, 1)) + torch.arange(65)]
        return F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten())

    trained(model, lambda: loss(known), 500, 2e-3)
    bits = tasks.mean_loss(lambda: loss(unknown), 20) / math.log(2)
    unigram = -(shares * shares.log2()).sum().item()
    print(bits, unigram)
    assert bits < 3.0 and unigram > 4.2


@pytest.mark.slow
def test_bert_says_what_was_hidden_if_it_knows_places():
    """Rows of period 8 with 15 % hidden, 400 steps: a hidden word is what stands eight places away."""
    found = {}
    for name in ("places", "none"):
        torch.manual_seed(0)
        model = BERT(21, 64, 4, 2, 32)
        if name == "none":
            nn.init.zeros_(model.embedding.places.weight).requires_grad_(False)

        def said(rows, model=model):
            words = torch.randint(1, 21, (rows, 8)).repeat(1, 4)
            hidden = torch.rand(rows, 32) < 0.15
            return model.words(model(words.masked_fill(hidden, 0)))[hidden], words[hidden]

        trained(model, lambda said=said: F.cross_entropy(*said(64)), 400, 2e-3)
        torch.manual_seed(1)
        with torch.no_grad():
            scores, words = said(500)
        found[name] = (scores.argmax(-1) == words).double().mean().item()
    print(found)
    assert found["places"] > 0.95 and found["none"] < 0.5


@pytest.mark.slow
def test_vit_sees_which_mark_is_left_if_it_knows_places():
    """Two marks somewhere in 8 x 8 pixels: which of them is farther left? 400 steps."""
    found = {}
    for name in ("places", "none"):
        torch.manual_seed(0)
        model = ViT(8, 2, 1, 2, 48, 4, 2)
        if name == "none":
            nn.init.zeros_(model.places).requires_grad_(False)

        def said(rows, model=model):
            columns = torch.rand(rows, 4).argsort(1)[:, :2]  # two different ones of four
            images = torch.randn(rows, 1, 8, 8) * 0.1
            for mark in range(2):
                x, y = columns[:, mark] * 2, torch.randint(4, (rows,)) * 2
                images[torch.arange(rows), 0, y, x + mark] += 2  # the one in the patch's left half, the other in its right
            return model(images), (columns[:, 0] > columns[:, 1]).long()

        trained(model, lambda said=said: F.cross_entropy(*said(64)), 400, 1e-3)
        torch.manual_seed(1)
        with torch.no_grad():
            scores, side = said(1000)
        found[name] = (scores.argmax(-1) == side).double().mean().item()
    print(found)
    assert found["places"] > 0.93 and found["none"] < 0.6
