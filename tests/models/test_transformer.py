"""The Transformer against torch.nn's and joeynmt's, and what must hold of it whatever the weights."""

from __future__ import annotations

import pytest
import torch
from oracles import frozen
from oracles import transformer as joeynmt
from torch import nn

from fastseq.models.blocks import Attention, Block
from fastseq.models.generation import beam, greedy
from fastseq.models.positions import Embedding, sinusoids
from fastseq.models.transformer import Decoder, Encoder, EncoderDecoder
from support import tasks
from support import token_models as holds
from support.models import trained

WORDS, WIDTH, HEADS, INNER, LAYERS = 7, 8, 2, 12, 2


def made(**options) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(WORDS, WIDTH, HEADS, INNER, LAYERS, **options).double()


def batch():
    torch.manual_seed(1)
    return torch.randint(WORDS, (3, 6)), torch.randint(WORDS, (3, 5)), torch.tensor([6, 1, 4])


def blocks(norm, cross=False, width=WIDTH, heads=HEADS, inner=INNER, layers=LAYERS, **options):
    return [Block(width, heads, inner, norm=norm, cross=cross, **options) for _ in range(layers)]


def from_torch(weights):
    """Names in torch.nn's layers, and here."""
    pairs = (("layers.", "blocks."), ("self_attn.in_proj_", "attention.projection."), ("self_attn.out_proj", "attention.out"),
             ("multihead_attn.in_proj_", "cross.projection."), ("multihead_attn.out_proj", "cross.out"),
             ("linear1", "inner.0"), ("linear2", "inner.3"),
             ("norm1", "norms.0"), ("norm2", "norms.1"), ("norm3", "norms.2"))  # fmt: skip
    renamed = {}
    for name, weight in weights.items():
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        renamed["final." + name.removeprefix("norm.") if name.startswith("norm.") else name] = weight
    return renamed


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_it_is_torchs(norm, activation):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "activation": activation, "batch_first": True, "norm_first": norm == "pre", "dtype": torch.float64}
    layers = [kind(WIDTH, HEADS, INNER, **options) for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)]
    ends = [nn.LayerNorm(WIDTH, dtype=torch.float64) for _ in layers]
    theirs = [nn.TransformerEncoder(layers[0], LAYERS, ends[0], False), nn.TransformerDecoder(layers[1], LAYERS, ends[1])]
    ours = [kind(blocks(norm, cross, activation=activation), nn.LayerNorm(WIDTH)).double()
            for kind, cross in ((Encoder, False), (Decoder, True))]  # fmt: skip
    for each, other in zip(ours, theirs, strict=True):
        for parameter in other.parameters():
            nn.init.normal_(parameter, std=0.5)
        each.load_state_dict(from_torch(other.state_dict()))
    x, y = (torch.randn(3, steps, WIDTH, dtype=torch.float64) for steps in (6, 5))
    lengths = torch.tensor([6, 1, 4])
    padding = torch.arange(6) >= lengths[:, None]
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    results = []
    for encode, decode in (
        (lambda: ours[0](x, lengths), lambda memory: ours[1](y, memory, lengths)),
        (
            lambda: theirs[0](x, src_key_padding_mask=padding),
            lambda memory: theirs[1](y, memory, mask, memory_key_padding_mask=padding, tgt_is_causal=True),
        ),
    ):
        memory = encode()
        results.append((memory.where(~padding[..., None], 0), decode(memory)))
    for actual, expected in zip(*results, strict=True):
        holds.close(actual, expected)
    model, other = nn.ModuleList(ours), nn.ModuleList(theirs)
    names, grads = dict(other.named_parameters()), torch.autograd.grad(frozen.weighted(*results[1]), list(other.parameters()))
    expected = dict(zip(names, grads, strict=True))
    holds.same_gradients(results[0], model, {
        f"{number}.{name}": grad
        for number in range(2)
        for name, grad in from_torch({key[2:]: value for key, value in expected.items() if key[0] == str(number)}).items()
    })  # fmt: skip


def from_joeynmt(weights):
    """Their three projections are one here, the second norm of a block is that of its linear layers."""
    renamed = {}
    for name, weight in weights.items():
        pairs = (("encoder.layers.", "encoder.blocks."), ("decoder.layers.", "decoder.blocks."), ("src_src_att", "attention"),
                 ("trg_trg_att", "attention"), ("src_trg_att", "cross"), ("feed_forward.pwff_layer.0", "inner.0"),
                 ("feed_forward.pwff_layer.3", "inner.3"), ("output_layer.", "out."), ("x_layer_norm", "norms.0"),
                 ("dec_layer_norm", "norms.1"),
                 ("feed_forward.layer_norm", "norms.1" if "encoder" in name else "norms.2"))  # fmt: skip
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        part, _, rest = name.partition(".")
        rest = rest.replace("layer_norm", "norms.0" if rest.startswith("blocks") else "final")
        name = {"decoder.out.weight": "output.weight"}.get(f"{part}.{rest}", f"{part}.{rest}")
        renamed[name] = weight
    for name in [name for name in renamed if ".q_layer." in name]:
        parts = [renamed.pop(name.replace(".q_layer.", f".{each}_layer.")) for each in "qkv"]
        renamed[name.replace("q_layer", "projection")] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_it_is_joeynmts(norm):
    results = frozen.read(joeynmt.__file__)
    case, sizes = results[norm], (joeynmt.WIDTH, joeynmt.HEADS, joeynmt.INNER, joeynmt.LAYERS)
    final = [nn.LayerNorm(joeynmt.WIDTH, 1e-6) if norm == "pre" else None for _ in range(2)]
    model = nn.ModuleDict({
        "encoder": Encoder(blocks(norm, False, *sizes, eps=1e-6), final[0]),
        "decoder": Decoder(blocks(norm, True, *sizes, eps=1e-6), final[1]),
        "output": nn.Linear(joeynmt.WIDTH, joeynmt.WORDS, bias=False),
    }).double()  # fmt: skip
    model.load_state_dict(from_joeynmt(case["weights"]))
    source, target = (case[name].requires_grad_() for name in ("source", "target"))
    memory = model["encoder"](source + results["sinusoids"], results["lengths"])
    logits = model["output"](model["decoder"](target + results["sinusoids"][: target.shape[1]], memory, results["lengths"]))
    holds.close(memory, case["memory"])
    holds.close(logits, case["logits"])
    gradients = case["gradients"]
    of_inputs = [gradients.pop("source"), gradients.pop("target")]
    found = torch.autograd.grad(frozen.weighted(logits), (source, target), retain_graph=True)
    for actual, expected in zip(found, of_inputs, strict=True):
        holds.close(actual, expected)
    holds.same_gradients(logits, model, from_joeynmt(gradients))


def test_sinusoids_in_both_layouts():
    table = frozen.read(joeynmt.__file__)["sinusoids"]
    places = torch.arange(len(table))
    assert torch.equal(sinusoids(places, joeynmt.WIDTH), table.float())
    halves = sinusoids(places, joeynmt.WIDTH, "halves")
    assert torch.equal(torch.stack(halves.chunk(2, -1), -1).flatten(1), table.float())
    wide = sinusoids(torch.tensor([3, 100_000]), 4, dtype=torch.float64)
    angles = torch.tensor([[3.0, 0.03], [1e5, 1e3]], dtype=torch.float64)
    holds.close(wide, torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
    assert sinusoids(torch.tensor([70_000]), 4, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("positions", ["interleaved", "halves", "learned", "none"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_step_and_read_are_forward_and_rows_stand_alone(norm, positions):
    model, (source, target, lengths) = made(norm=norm, positions=positions), batch()
    whole = model(source, target, lengths)
    holds.causal(lambda y: model(source, y, lengths), target, (target + 1) % WORDS)
    holds.permuted(model, source, target, lengths)
    for b, length in enumerate(lengths.tolist()):
        holds.close(model(source[b : b + 1, :length], target[b : b + 1]), whole[b : b + 1])
    with torch.no_grad():
        state = model.start(source, 5, lengths)
        for t in range(5):
            logits, state = model.step(target[:, t], state)
            holds.close(logits, whole[:, t].detach())
            holds.close(logits, model(source, target[:, : t + 1], lengths)[:, -1])
        first, state = model.read(target[:, :3], model.start(source, 9, lengths))
        holds.close(torch.cat([first, model.read(target[:, 3:], state)[0]], 1), whole.detach())


def test_prompts_of_different_lengths_share_a_state():
    """Padding that was read is written over once the counts say how much of it was real."""
    model, (source, target, _) = made(), batch()
    with torch.no_grad():
        _, state = model.read(target[:, :3], model.start(source, 5))
        state = state._replace(past=torch.tensor([3, 1, 2]))
        logits, state = model.step(torch.tensor([5, 5, 5]), state)
        for b, count in enumerate((3, 1, 2)):
            alone = torch.cat([target[b, :count], torch.tensor([5])])[None]
            holds.close(logits[b], model(source[b : b + 1], alone)[0, -1])


def test_tied_tables_are_one_and_untied_three():
    assert len({id(each) for each in (made().source.tokens.weight, made().output.weight)}) == 2
    model = made()
    assert model.source.tokens.weight is model.target.tokens.weight is model.output.weight
    more = sum(p.numel() for p in made(tied=False).parameters()) - sum(p.numel() for p in model.parameters())
    assert more == 2 * WORDS * WIDTH


def test_greedy_is_a_beam_of_one():
    model, (source, _, lengths) = made(), batch()
    begin = torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        said = greedy(model.step, model.start(source, 5, lengths), begin, 5, end=1)
        found, _ = beam(model.step, model.start(source, 5, lengths), begin, 5, width=1, end=1)
        wide, better = beam(model.step, model.start(source, 5, lengths), begin, 5, width=6, end=1)
        again = model(source, torch.cat([begin[:, None], said[:, :-1]], 1), lengths)
    assert torch.equal(found[:, 0], said) and wide.shape == (3, 6, 5) and (better.diff() <= 0).all()
    for b in range(3):
        length = said[b].tolist().index(1) + 1 if 1 in said[b] else 5
        assert torch.equal(again[b, :length].argmax(-1), said[b, :length])


def test_compiles_whole():
    model, (source, target, lengths) = made(), batch()
    holds.captured(model, source, target, lengths)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_compiles_whole_with_inductor(norm):
    model, (source, target, lengths) = made(norm=norm), batch()
    holds.compiled(model, model, source, target, lengths)
    with torch.no_grad():
        holds.captured(model.step, target[:, 0], model.start(source, 5, lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    model, (source, target, lengths) = made().to(dtype), batch()
    out = model(source, target, lengths)
    expected = model.double()(source, target, lengths)
    assert out.dtype == dtype and (out.double() - expected).abs().max() < 200 * torch.finfo(dtype).eps


def test_dropouts_are_off_unless_named():
    given, plain = batch(), made()
    assert torch.equal(plain.train()(*given), plain.eval()(*given))
    for name in ("dropout", "attention_dropout", "inner_dropout"):
        dropped = made(**{name: 0.5})
        assert not torch.equal(dropped.train()(*given), plain(*given)), name
        assert torch.equal(dropped.eval()(*given), plain(*given)), name


def test_errors_name_the_argument_and_what_is_accepted():
    with pytest.raises(ValueError, match="norm must be one of pre, post, got 'before'"):
        Block(8, 2, 12, norm="before")
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, gelu_tanh, got 'silu'"):
        made(activation="silu")
    with pytest.raises(ValueError, match=r"heads must divide width \(8\), got 3"):
        Attention(8, 3)
    with pytest.raises(ValueError, match="positions must be one of interleaved, halves, learned, none, got 'rotary'"):
        Embedding(7, 8, "rotary")
    with pytest.raises(ValueError, match="width must be even for sinusoids, got 7"):
        sinusoids(torch.arange(3), 7)
    with pytest.raises(ValueError, match=r"dropout must be a number in \[0, 1\], got 2"):
        made(dropout=2)
    with pytest.raises(ValueError, match=r"there are 4 learned places \(longest\), got 5 tokens"):
        made(positions="learned", longest=4)(*batch()[:2])
    with pytest.raises(ValueError, match=r"there are 8 learned places \(longest\), got 9 tokens"):
        made(positions="learned", longest=8).start(batch()[0], 9)
    with pytest.raises(RuntimeError, match=r"memory must be a tensor \[B, S, W\] for these blocks"):
        Decoder(blocks("pre", True))(torch.zeros(1, 2, 8))
    with pytest.raises(RuntimeError, match="memory must be None for these blocks"):
        Decoder(blocks("pre")).start(1, 4, torch.zeros(1, 2, 8))


def test_a_state_of_another_model_or_batch_is_refused():
    model, (source, target, lengths) = made(), batch()
    with torch.no_grad():
        state = model.start(source, 2, lengths)
        with pytest.raises(
            RuntimeError, match=r"state.keys\[0\] must be \[2, 2, 2, 4\] for this model and batch, got \[3, 2, 2, 4\]"
        ):
            model.decoder.read(torch.zeros(2, 1, 8, dtype=torch.float64), state)
        with pytest.raises(RuntimeError, match="a state of 3 rows goes with 3 rows of tokens, got 2"):
            model.step(target[:2, 0], state)
        with pytest.raises(RuntimeError, match="state.keys must be a tuple of 2, as this model gives it back, got a tuple of 3"):
            model.step(target[:, 0], EncoderDecoder(7, 8, 2, 12, 3).double().start(source, 5))
        with pytest.raises(RuntimeError, match="state.source must be a tuple of 2"):
            model.step(target[:, 0], state._replace(source=()))
        with pytest.raises(RuntimeError, match=r"state.past must be \[3\] for this batch"):
            model.decoder.read(torch.zeros(3, 1, 8, dtype=torch.float64), state._replace(past=torch.zeros(1)))
        with pytest.raises(RuntimeError, match="has room for 2 keys"):
            model.read(target, state)
    with pytest.raises(RuntimeError, match="has no backward"):
        model.step(target[:, 0], model.start(source, 2, lengths))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_learns_to_reverse_with_places_and_not_without():
    """The loss on sequences said backwards, 600 steps: without positions the source is a bag of symbols."""
    found = {}
    for positions in ("interleaved", "none"):
        torch.manual_seed(0)
        model = EncoderDecoder(tasks.WORDS, 64, 4, 128, 2, positions=positions)

        def loss_of(batch, model=model):
            source, lengths, target = batch
            return tasks.loss_of(model(source, tasks.said_after(target), lengths), target)

        batches, others = tasks.reversals(64, seed=1), tasks.reversals(500, seed=2)
        trained(model, lambda loss_of=loss_of, batches=batches: loss_of(next(batches)), 600, 1e-3)
        found[positions] = tasks.mean_loss(lambda loss_of=loss_of, others=others: loss_of(next(others)), 1)
    print(found)
    assert found["interleaved"] < 0.5 * found["none"]
