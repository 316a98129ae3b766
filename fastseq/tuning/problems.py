"""A call made again from what a decision is about: inputs, the truth in fp64, and a program for each candidate."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq import functional, modules
from fastseq.backends import BACKENDS, AttentionQuery, Query, RecurrentQuery, obstacles, use_backend
from fastseq.backends.registry import CANDIDATES
from fastseq.backends.torch import serves
from fastseq.choice.decision import MODES, Call, Candidate

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
FEATURES = frozenset(("plain", "causal", "mask", "bias"))  # of attention, that are made again
MOST_HEADS = 16
Program = Callable[[], list[Tensor]]


@dataclass
class Problem:
    """``ours`` runs whatever is chosen while it runs; ``torchs`` is PyTorch's own module or function, or where it has none the
    reference, which is plain PyTorch."""

    query: Query
    ours: Program
    torchs: Program
    truth: Program  # in fp64


def untunable(call: Call) -> str | None:
    """Why there is nothing to measure of a call; None: there is."""
    if call.op == "attention":
        unknown = set(call.kind.split("+")) - FEATURES
        if unknown or call.layout != "padded" or {"mask", "bias"} <= set(call.kind.split("+")):
            return f"attention with {call.kind}, {call.layout}, has one kernel"
    elif call.kind not in LAYERS or (call.lanes > 2 and call.sizes[-1] > 1) or 0 in call.sizes:
        return f"{call.kind} in {call.lanes} lanes has one kernel"
    return None


def problem(call: Call, device: torch.device) -> Problem:
    """The same inputs each time."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        make = {"recurrent": _layers, "recurrent_cell": _step, "attention": _attention}[call.op]
        return make(call, device)


def candidates(query: Query) -> list[Candidate]:
    """Who can run a call; of the reference nobody expects speed."""
    as_op = query._replace(op="recurrent") if query.op == "recurrent_cell" else query
    names = [name for name in CANDIDATES[query.device.type] if name not in ("torch", "reference")]
    found = [Candidate("torch")] if serves(query) else []
    for name in names:
        if not obstacles(name, as_op):
            forms = getattr(BACKENDS[name], "forms", lambda query: ("",))(as_op)
            found += [Candidate(name, form) for form in forms]
    return found


def _dtype(call: Call) -> torch.dtype:
    dtype = getattr(torch, call.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _layers(call: Call, device: torch.device) -> Problem:
    name, options = LAYERS[call.kind]
    (B, T, H), dtype, training = call.sizes, _dtype(call), call.mode == MODES[True]
    if call.lanes > 2:  # heads of one unit, which torch does not have
        ours = getattr(modules, name)(call.lanes, call.lanes, num_heads=call.lanes, **options).to(device, dtype)
        theirs = copy.deepcopy(ours)
    else:
        theirs = getattr(nn, name)(H, H, bidirectional=call.lanes == 2, **options).to(device, dtype)
        ours = getattr(modules, name)(H, H, bidirectional=call.lanes == 2, **options).to(device, dtype)
        ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, ours.input_size).to(device, dtype)
    lengths = torch.cat((torch.tensor([T]), torch.randint(1, T + 1, (B - 1,))))

    def program(module: nn.Module, own: bool) -> Program:
        module.train(training).requires_grad_(training)
        leaf, packed = x.to(next(module.parameters()).dtype), None
        if call.layout == "packed":
            packed = pack_padded_sequence(leaf, lengths, enforce_sorted=False)
            leaf = packed.data
        leaf = leaf.detach().clone().requires_grad_(training)

        def output() -> Tensor:
            if packed is not None:
                return module(packed._replace(data=leaf))[0].data
            if call.layout == "padded":
                return module(leaf)[0]
            if own:
                return module(leaf, lengths=lengths.to(device))[0]
            return pad_packed_sequence(module(pack_padded_sequence(leaf, lengths, enforce_sorted=False))[0])[0]

        return _differentiated(output, [leaf, *module.parameters()], training)

    query = RecurrentQuery(
        "recurrent", device, dtype, call.kind, T, call.lanes, H, False, call.layout, batch=B, saving=training
    )  # fmt: skip
    exact = copy.deepcopy(theirs).double()
    if call.lanes > 2:
        plain, truth = (use_backend("reference")(program(module, True)) for module in (theirs, exact))
        return Problem(query, program(ours, True), plain, truth)
    return Problem(query, program(ours, True), program(theirs, False), program(exact, False))


def _step(call: Call, device: torch.device) -> Problem:
    name, options = LAYERS[call.kind]
    (B, T, H), dtype, training = call.sizes, _dtype(call), call.mode == MODES[True]
    theirs = getattr(nn, f"{name}Cell")(H, H, **options).to(device, dtype)
    ours = getattr(modules, f"{name}Cell")(H, H, **options).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    x, h, c = (torch.randn(B, H).to(device, dtype) for _ in range(3))

    def program(module: nn.Module) -> Program:
        module.train(training).requires_grad_(training)
        leaves = [t.to(next(module.parameters()).dtype).requires_grad_(training) for t in (x, h, c)[: 2 + (name == "LSTM")]]
        states = (leaves[1], leaves[2]) if name == "LSTM" else leaves[1]

        def output() -> Tensor:
            result, input = states, leaves[0]
            for _ in range(T):
                result = module(input, result)
                if training:
                    input = _between_steps(leaves[0], result[0] if isinstance(result, tuple) else result)
            return input if training else result[0] if isinstance(result, tuple) else result

        return _differentiated(output, [*leaves, *module.parameters()], training)

    query = RecurrentQuery("recurrent_cell", device, dtype, call.kind, T, 1, H, False, "padded", batch=B)
    return Problem(query, program(ours), program(theirs), program(copy.deepcopy(theirs).double()))


def _between_steps(x: Tensor, h: Tensor) -> Tensor:
    """Inputs [B, I] of a step made of the state [B, H] before it, I = H, as models make them: by functions of many kinds.

    A step with gradients takes about as long as a few of these. In a loop over nothing but steps what it runs stays in the
    caches, which in a model it shares with them; and to PyTorch's step, which consists of such functions, they owe that they are
    there already. A kernel that gains less than that takes is not the faster one.
    """
    few = min(16, h.shape[1])
    decayed = h * torch.exp(-torch.relu(x))
    kept, left = decayed[:, :few], decayed[:, few:]
    mixed = torch.sigmoid(nn.functional.linear(torch.cat((kept, x[:, :few]), 1), x.detach().new_ones(few, 2 * few) / few))
    found = torch.cat((mixed * kept + (1 - mixed) * torch.tanh(x[:, :few]), left), 1)
    return found - (found - x).abs().mean()


def _attention(call: Call, device: torch.device) -> Problem:
    BH, Tq, Tk, E = call.sizes
    dtype, training, kind = _dtype(call), call.mode == MODES[True], set(call.kind.split("+"))
    heads = next(h for h in range(min(MOST_HEADS, BH), 0, -1) if BH % h == 0 and h % call.lanes == 0) if BH >= call.lanes else BH
    batch, keys = BH // heads, max(1, heads // call.lanes)
    q = torch.randn(batch, heads, Tq, E).to(device, dtype)
    k, v = (torch.randn(batch, keys, Tk, E).to(device, dtype) for _ in range(2))
    mask = None
    if "mask" in kind:
        mask = torch.rand(Tq, Tk, device=device) < 0.7
        mask[:, 0] = True
    elif "bias" in kind:
        mask = torch.randn(Tq, Tk).to(device, dtype)

    def program(function: Callable[..., Tensor], wide: bool) -> Program:
        leaves = [(t.double() if wide else t).detach().requires_grad_(training) for t in (q, k, v)]
        bias = mask.double() if wide and mask is not None and mask.is_floating_point() else mask

        def output() -> Tensor:
            return function(*leaves, bias, 0.0, "causal" in kind, enable_gqa=keys != heads)

        return _differentiated(output, leaves, training)

    query = AttentionQuery(
        op="attention",
        call="forward",
        device=device,
        dtype=dtype,
        batch=batch,
        heads=(heads, keys),
        lengths=(Tq, Tk),
        features=(E, E),
        layout="padded",
        window=(-1, 0) if "causal" in kind else (-1, -1),
        offset=0,
        block_size=0,
        uses=tuple(sorted(kind & {"mask", "bias"})),
        gradients=(),
    )
    theirs = F.scaled_dot_product_attention
    return Problem(query, program(functional.scaled_dot_product_attention, False), program(theirs, False), program(theirs, True))


def _differentiated(output: Callable[[], Tensor], leaves: Sequence[Tensor], training: bool) -> Program:
    """The output alone without gradients, else with those of every leaf."""
    grads: list[Tensor] = []

    def run() -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [output()]
        y = output()
        if not grads:
            # of the same numbers in every dtype
            grads.append(torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).sin().to(y.dtype))
        return list(itertools.chain([y.detach()], torch.autograd.grad(y, leaves, grads[0])))

    return run
