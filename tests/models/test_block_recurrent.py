"""Block-Recurrent Transformer: against another package, states from block to block, steps, errors, and what states are for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import block_recurrent as oracle
from oracles import frozen
from torch import nn

from fastseq.benchmarks.workloads.torch_models import on_parts
from fastseq.models import BlockRecurrent
from fastseq.models.block_recurrent import turns_of
from fastseq.testing import assert_all_close_to_truth
from support import models as support

W, BLOCK = 8, 4
OF_STATES = {
    "initial": "init_state",
    "identity": "state_pos_ids",
    "state_norm.weight": "state_norm.gamma",
    "query_states.weight": "q_to_state.weight",
    "state_query_tokens.weight": "q_from_state.weight",
    "state_query_states.weight": "state_to_q.weight",
    "state_key_value.weight": "state_to_kv.weight",
    "state_out.weight": "to_state_out.weight",
    "candidate.weight": "state_out_to_gate.weight",
    "candidate.bias": "state_out_to_gate.bias",
    "kept": "learned_ema_beta",
}
SCORES = {"token_scores": "to_state_cross_attn", "own_scores": "state_self_attn", "state_scores": "from_state_cross_attn"}


def renamed(layers: int) -> dict[str, str]:
    """Our names by theirs."""
    names = {"norm.weight": "to_logits.0.gamma"}
    for n in range(layers):
        ours, theirs = f"layers.{n}.", f"layers.{n}."
        names |= {
            f"{ours}norm.weight": f"{theirs}0.norm.gamma",
            f"{ours}query.weight": f"{theirs}0.to_q.weight",
            f"{ours}key_value.weight": f"{theirs}0.to_kv.weight",
            f"{ours}out.weight": f"{theirs}0.to_out.weight",
            f"{ours}feedforward_norm.weight": f"{theirs}1.0.gamma",
            f"{ours}up.weight": f"{theirs}1.1.weight",
            f"{ours}down.weight": f"{theirs}1.3.weight",
        }
        names |= {f"{ours}{own}": f"{theirs}0.state_container.{other}" for own, other in OF_STATES.items()}
        for own, other in {"scores": "attn", **{own: f"state_container.{other}" for own, other in SCORES.items()}}.items():
            names |= {f"{ours}{own}.{which}_scale": f"{theirs}0.{other}.{which[0]}_scale" for which in ("query", "key")}
    return names


def test_parity_with_another_package():
    """Two segments of four blocks: logits, states and every gradient. Theirs is divided by sqrt(E), ours is in the scale; their
    decay is what enters, ours what is kept."""
    results = frozen.read(oracle.__file__)
    weights, ids = results["weights"], results["ids"]
    model = BlockRecurrent(W, 2, 2, block=oracle.BLOCK, states=oracle.STATES, recurrent=(1,)).double()
    names = renamed(2)

    def ours(name, theirs):
        return theirs / 2 if name.endswith("query_scale") else -theirs if name.endswith("kept") else theirs

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours(name, weights[names[name]]))
    embedding, head = (weights[name].requires_grad_() for name in ("token_emb.weight", "to_logits.1.weight"))
    state, logits = None, []
    for segment in range(2):
        y, state = model(F.embedding(ids[segment], embedding), state)
        logits.append(y @ head.mT)
        expected = results[f"segment {segment}"]
        torch.testing.assert_close(logits[-1], expected["logits"], rtol=0, atol=1e-13)
        torch.testing.assert_close(state[1][2], expected["states"], rtol=0, atol=1e-13)
        state = tuple(tuple(t.detach() for t in layer) for layer in state)
    frozen.weighted(*logits).backward()
    found = {names[name]: ours(name, p.grad) for name, p in model.named_parameters()}
    found |= {"token_emb.weight": embedding.grad, "to_logits.1.weight": head.grad}
    torch.testing.assert_close(found, results["gradients"], rtol=1e-10, atol=1e-12)


@pytest.fixture(params=["fixed", "lstm"])
def model(request):
    torch.manual_seed(0)
    return BlockRecurrent(W, 2, 3, block=BLOCK, states=3, recurrent=(0, 2), gate=request.param).double()


def test_every_call_goes_on_where_the_last_one_ended(model):
    support.assert_steps_are_forward(model, torch.randn(2, 11, W, dtype=torch.float64))


def test_causal_and_rows_alone(model):
    x = torch.randn(3, 10, W, dtype=torch.float64)
    support.assert_causal(model, x)
    support.assert_rows_stand_alone(model, x)


def test_the_lstm_gate_by_hand():
    """s' = sigmoid(f + 1) s + sigmoid(i - 1) tanh(z), from what the state vectors saw."""
    torch.manual_seed(0)
    layer = BlockRecurrent(W, 2, 1, block=BLOCK, states=3, gate="lstm").double().layers[0]
    seen = []
    layer.state_out.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(2, BLOCK, W, dtype=torch.float64)
    before = torch.randn(2, 3, W, dtype=torch.float64)
    none = x.new_zeros(2, 0, W // 2)
    after = layer(x, (none, none, before), BLOCK, turns_of(BLOCK, BLOCK, W // 2, x), (0.0, 0.0))[-1]
    u = seen[0]
    i, f = F.linear(u, layer.gates.weight, layer.gates.bias).split(W, -1)
    z = F.linear(u, layer.candidate.weight, layer.candidate.bias)
    torch.testing.assert_close(after, before / (1 + (-f - 1).exp()) + z.tanh() / (1 + (1 - i).exp()))


def test_without_states_in_reach_nothing_passes_two_blocks():
    """Two layers see four blocks back at most by memory; the state vectors are what reaches further."""
    torch.manual_seed(0)
    x = torch.randn(1, 6 * BLOCK, W, dtype=torch.float64)
    other = x.clone()
    other[:, 0] *= -1
    for recurrent, reaches in (((0,), True), ((), False)):
        model = BlockRecurrent(W, 2, 2, block=BLOCK, states=2, recurrent=recurrent).double()
        assert bool((model(x)[0][:, -1] != model(other)[0][:, -1]).any()) == reaches


def test_dropouts_are_in_training_alone():
    x = torch.randn(2, 6, W)
    for rates in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        model = BlockRecurrent(W, 2, 2, block=BLOCK, states=2, **rates)
        assert not torch.equal(model(x)[0], model(x)[0])
        model.eval()
        assert torch.equal(model(x)[0], model(x)[0])


def test_sixteen_bits():
    """As exact as the same model on torch's attention: outputs, and the state after them."""
    torch.manual_seed(0)
    model, x = BlockRecurrent(W, 2, 2, block=BLOCK, states=2).bfloat16(), torch.randn(8, 10, W).bfloat16()
    found, state = model(x)
    assert found.dtype == torch.bfloat16 and {t.dtype for t in support.flat(state)} == {torch.bfloat16}
    by_torch = on_parts(copy.deepcopy(model))(x)
    truth = model.double()(x.double())
    named = ({str(n): t for n, t in enumerate(support.flat(each))} for each in ((found, state), by_torch, truth))
    assert_all_close_to_truth(*named)


@support.ON_COMPILERS
def test_compiled_without_a_break(compiler):
    model = BlockRecurrent(W, 2, 2, block=BLOCK, states=2).double()
    support.assert_compiles(lambda x: model(x)[0], model, compiler, torch.randn(2, 6, W, dtype=torch.float64))


fine = BlockRecurrent(W, 2, 2, block=BLOCK, states=2)
state = fine(torch.randn(2, 5, W))[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockRecurrent(8, 3, 2, block=4, states=2), ValueError, r"heads must divide width \(8\), got 3"),
        (lambda: BlockRecurrent(6, 2, 2, block=4, states=2), ValueError, "width / heads must be even"),
        (lambda: BlockRecurrent(8, 2, 2, block=4, states=0), ValueError, "states must be"),
        (lambda: BlockRecurrent(8, 2, 2, block=4.0, states=1), TypeError, "block must be an int, got 4.0"),
        (lambda: BlockRecurrent(8, 2, 2, block=4, states=1, gate="gru"), ValueError, "gate must be one of .*fixed.*lstm.*'gru'"),
        (lambda: BlockRecurrent(8, 2, 2, block=4, states=1, recurrent=(2,)), ValueError, r"recurrent must name layers in 0..1"),
        (
            lambda: BlockRecurrent(8, 2, 2, block=4, states=1, dropout=2),
            ValueError,
            r"dropout must be a number in \[0, 1\], got 2",
        ),
        (lambda: fine(torch.randn(2, 5, 6)), RuntimeError, r"the input must be \[any, any, 8\], got \[2, 5, 6\]"),
        (lambda: fine.step(torch.randn(2, 5, 8)), RuntimeError, r"the input must be \[any, 8\]"),
        (
            lambda: fine(torch.randn(3, 5, 8), state),
            RuntimeError,
            r"state\[0\]\[0\] must be \[3, any, 4\] for this model and batch",
        ),
        (lambda: fine(torch.randn(2, 5, 8), state[:1]), RuntimeError, "state must be a tuple of 2"),
        (lambda: fine(torch.randn(2, 5, 8), state[::-1]), RuntimeError, r"state\[0\] must be a tuple of 3"),
        (lambda: fine(torch.randn(2, 5, 8).double(), state), RuntimeError, "must suit an input of torch.float64"),
        (
            lambda: fine(torch.randn(2, 5, 8), tuple((torch.cat((k, k), 1), torch.cat((v, v), 1), *s) for k, v, *s in state)),
            RuntimeError,
            "fewer than 2 x 4 keys",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_states_recall_what_three_segments_hide():
    """Say at the end of the fourth segment what the first began with, noise since: chance without state vectors."""
    segment, symbols, width = 8, 8, 48

    def accuracy(recurrent):
        torch.manual_seed(0)
        parts = nn.ModuleDict(
            {
                "embedding": nn.Embedding(2 * symbols + 1, width),
                "model": BlockRecurrent(width, 4, 2, block=segment, states=4, recurrent=recurrent),
                "head": nn.Linear(width, symbols),
            }
        )

        def run(rows):
            ids, target = torch.randint(symbols, 2 * symbols, (rows, 4 * segment)), torch.randint(symbols, (rows,))
            ids[:, 0], ids[:, -1] = target, 2 * symbols
            return parts["head"](parts["model"](parts["embedding"](ids))[0][:, -1]), target

        support.trained(parts, lambda: F.cross_entropy(*run(32)), 300, 3e-3)
        with torch.no_grad():
            logits, target = run(512)
        return (logits.argmax(-1) == target).float().mean().item()

    found = accuracy((0,)), accuracy(())
    assert found[0] > 0.95 and found[1] < 0.25, found
