"""``with context_parallel(mesh): model(x)``: modules and functions inside, errors that reach all ranks, DDP and FSDP2 around."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastseq
from fastseq.distributed import context_parallel, positions, shard_sequence, unshard_sequence
from fastseq.functional import attention, attention_with_kv_cache, scaled_dot_product_attention

T, WIDTH, HEADS = 12, 16, 4


def whole_and_parts(group, sharding, module, call, inputs, dims):
    """Output and gradients of a module on the whole, and of its copy in parts: equal to rounding in fp64."""
    twin = copy.deepcopy(module)
    expected = call(module, *inputs)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * weights).sum().backward()
    own = [
        t if dim is None else shard_sequence(t, group, dim=dim, sharding=sharding) for t, dim in zip(inputs, dims, strict=True)
    ]
    with context_parallel(group, sharding=sharding):
        out = call(twin, *own)
    (out * shard_sequence(weights, group, dim=dims[0], sharding=sharding)).sum().backward()
    torch.testing.assert_close(out, shard_sequence(expected, group, dim=dims[0], sharding=sharding))
    for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
        found = other.grad.clone()
        dist.all_reduce(found, group=group)
        torch.testing.assert_close(found, parameter.grad)


def plain(module, x, **options):
    return module(x, x, x, need_weights=False, **options)[0]


def modules(group, sharding):
    torch.manual_seed(0)
    x, source = torch.randn(2, T, WIDTH, dtype=torch.float64), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, T, dtype=torch.bool)
    padding[0, 7:], padding[1, 3] = True, True
    bias = torch.randn(T, T, dtype=torch.float64)
    for first in (True, False):
        mha = fastseq.MultiheadAttention(WIDTH, HEADS, batch_first=first).double()
        if not first:
            x, source = x.transpose(0, 1), source.transpose(0, 1)
        dim = 1 if first else 0
        whole_and_parts(group, sharding, mha, plain, [x], [dim])
        mha.zero_grad()
        whole_and_parts(
            group, sharding, mha, lambda m, x, mask: plain(m, x, attn_mask=mask, is_causal=True), [x, causal], [dim, 0]
        )
        mha.zero_grad()
        padded = lambda m, x, pad, b: plain(m, x, key_padding_mask=pad, attn_mask=b)  # noqa: E731
        whole_and_parts(group, sharding, mha, padded, [x, padding.double().mul(-1e9), bias], [dim, 1, 0])
        mha.zero_grad()
        masked = lambda m, x, pad, c: plain(m, x, key_padding_mask=pad, attn_mask=c)  # noqa: E731
        whole_and_parts(group, sharding, mha, masked, [x, padding, causal], [dim, 1, 0])
        mha.zero_grad()
        whole_and_parts(group, sharding, mha, lambda m, x, s: m(x, s, s, need_weights=False)[0], [x, source], [dim, dim])
        mha.zero_grad()
        alone = lambda m, x: m(x, x, x, need_weights=False)[0]  # noqa: E731
        whole_and_parts(group, sharding, mha, alone, [x[0] if first else x[:, 0]], [0])
    x = x.transpose(0, 1)
    layer = fastseq.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True).double()
    for training in (True, False):
        layer.train(training)
        layer.zero_grad()
        whole_and_parts(group, sharding, layer, lambda m, x, mask: m(x, src_mask=mask, is_causal=True), [x, causal], [1, 0])
    with torch.no_grad():  # where torch, and fastseq, have one call for the whole layer
        expected = shard_sequence(layer(x), group, dim=1, sharding=sharding)
        with context_parallel(group, sharding=sharding):
            torch.testing.assert_close(layer(shard_sequence(x, group, dim=1, sharding=sharding)), expected)
        assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("sharding", ["contiguous", "zigzag"])
def test_modules_attend_to_the_whole_sequence(ranks, sharding):
    ranks.run(modules, sharding, size=2)
    ranks.run(modules, sharding, size=3)


def functions(group):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 8) for heads in (4, 2, 2))
    mask, bias = torch.rand(2, 1, T, T) < 0.7, torch.randn(T, T)
    calls = [
        lambda q, k, v, m, b: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        lambda q, k, v, m, b: scaled_dot_product_attention(q, k, v, m, scale=0.3, enable_gqa=True),
        lambda q, k, v, m, b: scaled_dot_product_attention(q, k, v, b, enable_gqa=True),
        lambda q, k, v, m, b: scaled_dot_product_attention(q[0], k[0].repeat_interleave(2, 0), v[0].repeat_interleave(2, 0)),
        lambda q, k, v, m, b: attention(q, k, v, window_size=(3, 1), softcap=2.0, attn_mask=m),
        lambda q, k, v, m, b: attention(q, k, v, causal=True, return_lse=True)[1].unsqueeze(-1),
    ]
    own = [shard_sequence(t, group, dim=2, sharding="zigzag") for t in (q, k, v, mask)]
    own.append(shard_sequence(bias, group, dim=0, sharding="zigzag"))
    for number, call in enumerate(calls):
        expected = call(q, k, v, mask, bias)
        with context_parallel(group, sharding="zigzag"):
            found = call(*own)
        expected = shard_sequence(expected, group, dim=-2, sharding="zigzag")
        torch.testing.assert_close(found, expected, msg=lambda m, number=number: f"call {number}: {m}")
    torch.manual_seed(5)
    expected = scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), dropout_p=0.5)
    torch.manual_seed(5)
    with context_parallel(group, sharding="zigzag"):
        found = scaled_dot_product_attention(own[0], *(t.repeat_interleave(2, 1) for t in own[1:3]), dropout_p=0.5)
    torch.testing.assert_close(found, shard_sequence(expected, group, dim=2, sharding="zigzag"))


def test_functions_attend_to_the_whole_sequence(ranks):
    ranks.run(functions, size=2)


def refusals(group):
    x, cache = torch.randn(2, T, WIDTH), torch.randn(2, HEADS, T, 8)
    mha = fastseq.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    appended = fastseq.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True)
    calls = {
        "weights": lambda: mha(x, x, x),
        "appended": lambda: appended(x, x, x, need_weights=False),
        "returned weights": lambda: attention(cache, cache, cache, return_weights=True),
        "cache": lambda: attention_with_kv_cache(cache, cache, cache, cache_seqlens=torch.tensor([3, 4])),
        "mask": lambda: mha(x, x, x, need_weights=False, attn_mask=torch.zeros(T, T)),
        "causal alone": lambda: mha(x, x, x, need_weights=False, is_causal=True),
    }
    found = {}
    for name, call in calls.items():
        try:
            with context_parallel(group):
                call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_what_cannot_be_shared_is_refused(ranks):
    first, second = ranks.run(refusals)
    assert {name: words.replace("rank 0: ", "") for name, words in second.items()} == {
        name: words.replace("rank 0: ", "") for name, words in first.items()
    }
    assert "need_weights must be False" in first["weights"] and "add_bias_kv" in first["appended"]
    assert "return_weights" in first["returned weights"] and "a cache is not shared" in first["cache"]
    assert "attn_mask must be [Tq, Tk]" in first["mask"] or "attn_bias must be [Tq, Tk]" in first["mask"]
    assert "is_causal is a hint" in first["causal alone"]


def an_error_inside(group, where):
    """Rank 1 raises in the model's own code: before, between and after the attentions."""
    rank = dist.get_rank(group)
    q = torch.randn(1, 2, 4, 8)
    found = None
    try:
        with context_parallel(group):
            for step in range(3):
                if step == where and rank == 1:
                    raise LookupError("no such word")
                if step < 2:
                    scaled_dot_product_attention(q, q, q)
    except Exception as error:
        found = type(error).__name__, str(error)
    with context_parallel(group):
        scaled_dot_product_attention(q, q, q)
    return found


def test_an_error_inside_reaches_all_ranks(ranks):
    for where in range(3):
        found = ranks.run(an_error_inside, where, size=3)
        assert found[1] == ("LookupError", "no such word")
        assert found[0] == found[2] == ("RuntimeError", "rank 1: LookupError: no such word")


def an_error_inside_two_blocks(group, inner_size):
    """Rank 1 raises inside a block in a block, of the same ranks or of two of them: all are told, once."""
    rank, q = dist.get_rank(group), torch.randn(1, 2, 4, 8)
    inner = group
    if inner_size == 2:
        inner = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("data", "context"))["context"]
    found = None
    try:
        with context_parallel(group):
            with context_parallel(inner, method="all_gather"):
                scaled_dot_product_attention(q, q, q)
                if rank == 1:
                    raise LookupError("no such word")
                scaled_dot_product_attention(q, q, q)
            scaled_dot_product_attention(q, q, q)
    except Exception as error:
        found = type(error).__name__, str(error)
    with context_parallel(group):  # nothing is left over
        scaled_dot_product_attention(q, q, q)
    return found


def test_an_error_inside_two_blocks_reaches_all_ranks(ranks):
    for inner_size in (4, 2):
        found = ranks.run(an_error_inside_two_blocks, inner_size, size=4)
        assert found[1] == ("LookupError", "no such word")
        assert all(
            of[0] == "RuntimeError" and of[1].endswith("rank 1: LookupError: no such word") for of in found[:1] + found[2:]
        )


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, raises):
        ctx.raises = raises
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.raises:
            raise LookupError("no such word")
        return gradient, None


def an_error_on_the_way_back(group, kind, what):
    """Rank 1 raises in its own backward pass, or runs none, between what all ranks run together."""
    rank, found = dist.get_rank(group), None
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, requires_grad=True)
    if kind == "attention":
        call = lambda x: scaled_dot_product_attention(*[x.unsqueeze(0)] * 3)[0]  # noqa: E731
    elif kind == "unshard_sequence":
        call = lambda x: unshard_sequence(x, group, dim=0)  # noqa: E731
    else:
        module = getattr(fastseq, kind)(8, 8, **({"window": 2} if kind == "QRNN" else {}))
        call = lambda x: module(x)[0]  # noqa: E731
    try:
        with context_parallel(group):
            y = call(_Raises.apply(call(x), rank == 1 and what == "raises"))
            if rank != 1 or what == "raises":
                y.sum().backward()
    except Exception as error:
        found = type(error).__name__, str(error)
    with context_parallel(group):  # nothing is left over
        call(x).sum().backward()
    return found


@pytest.mark.parametrize("kind", ["attention", "unshard_sequence", "LSTM", "MinGRU", "RGLRU", "QRNN"])
def test_an_error_on_the_way_back_reaches_all_ranks(ranks, kind):
    found = ranks.run(an_error_on_the_way_back, kind, "raises", size=3)
    assert found[1] == ("LookupError", "no such word")
    assert found[0] == found[2] == ("RuntimeError", "rank 1: LookupError: no such word")
    found = ranks.run(an_error_on_the_way_back, kind, "runs none", size=3)
    assert found[0] == found[1] == found[2] and "rank 1 has the end of context_parallel" in found[0][1]


def wrong_blocks(group):
    """Arguments that are wrong on one rank alone."""
    rank, found = dist.get_rank(group), []
    for wrong in ({"method": "rings"}, {"sharding": "zigzags"}, {"micro_batches": 0}, {"micro_batches": "2"}):
        try:
            with context_parallel(group, **(wrong if rank == 1 else {})):
                pass
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def test_a_wrong_block_on_one_rank_is_told_to_all(ranks):
    first, second, third = ranks.run(wrong_blocks, size=3)
    assert first == second == third
    assert [kind for kind, _ in first] == ["ValueError", "ValueError", "ValueError", "TypeError"]
    assert all(words.startswith("rank 1: ") for _, words in first)


class Model(nn.Module):
    """A causal model of characters, which is told the places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places, self.head = nn.Embedding(11, WIDTH), nn.Embedding(T, WIDTH), nn.Linear(WIDTH, 11)
        self.layers = nn.ModuleList([fastseq.TransformerEncoderLayer(WIDTH, HEADS, 24, 0.0, batch_first=True) for _ in range(2)])

    def forward(self, characters, places, mask):
        x = self.embedding(characters) + self.places(places)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)


def train(model, optimizer, data, places, mask, share, around, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        with around():
            scores = model(data[:, :-1] if share is None else share(data[:, :-1]), places, mask)
            target = data[:, 1:] if share is None else share(data[:, 1:])
            loss = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="sum") / (len(data) * T)
            loss.backward()
        gradients = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        optimizer.step()
    return gradients


def recomputed(group):
    """Layers that are computed once more on the way back, which comes after the block."""
    torch.manual_seed(0)
    x = torch.randn(2, T, WIDTH, dtype=torch.float64)
    attends = fastseq.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True).double()
    recurs = fastseq.GRU(WIDTH, WIDTH, batch_first=True, dtype=torch.float64)
    for module, call in ((attends, lambda m, x: m(x)), (recurs, lambda m, x: m(x)[0].tanh())):
        again = lambda m, x, call=call: checkpoint(call, m, x, use_reentrant=False, context_fn=block.checkpoint_contexts)  # noqa: E731
        twin, own = copy.deepcopy(module), shard_sequence(x, group, dim=1)
        call(module, x).square().sum().backward()
        with context_parallel(group) as block:
            out = again(twin, own)
        out.square().sum().backward()
        for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
            dist.all_reduce(other.grad, group=group)
            torch.testing.assert_close(other.grad, parameter.grad)
        with context_parallel(group):  # and without the block it would be computed of the rank's part alone: that is seen
            out = checkpoint(call, twin, own, use_reentrant=False)
        with pytest.raises(CheckpointError):
            out.square().sum().backward()


def test_what_is_computed_anew_is_so_inside_the_block(ranks):
    ranks.run(recomputed)


class Recurrences(nn.Module):
    """An LSTM and scans, one of which reads the step before; the order is in them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11)
        kinds = [partial(fastseq.LSTM, num_layers=2), fastseq.MinGRU, partial(fastseq.QRNN, window=2)]
        self.layers = nn.ModuleList([kind(WIDTH, WIDTH, batch_first=True) for kind in kinds])

    def forward(self, characters, places, mask):
        x = self.embedding(characters)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(x)


def data_and_context(group, method, kind, sharding):
    """Two halves of the batch times two halves of the sequence: the gradients are the mean over the halves of the batch."""
    rank = dist.get_rank(group)
    plane = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("data", "context"))
    torch.manual_seed(0)
    alone, data = globals()[kind](), torch.randint(0, 11, (4, T + 1))
    model, mask = copy.deepcopy(alone), torch.ones(T, T, dtype=torch.bool).triu(1)
    expected = train(alone, torch.optim.SGD(alone.parameters(), 0.5), data, torch.arange(T), mask, None, nullcontext)
    context = plane["context"]
    if method == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.layers:  # sharded over the context, copied over the data
            fully_shard(layer, mesh=plane)
        fully_shard(model, mesh=plane)
    half = data[rank // 2 * 2 : rank // 2 * 2 + 2]
    share = lambda t: shard_sequence(t, context, dim=1, sharding=sharding)  # noqa: E731
    places = positions(T, context, sharding=sharding)
    around = lambda: context_parallel(context, sharding=sharding, micro_batches=2)  # noqa: E731
    # a share of a context is a sum, the gradient that DDP and FSDP form a mean over all four
    optimizer = torch.optim.SGD(model.parameters(), 0.5 * 2)
    found = train(model, optimizer, half, places, mask, share, around)
    for name, gradient in expected.items():
        own = found[name]
        own = own.full_tensor() if hasattr(own, "full_tensor") else own
        torch.testing.assert_close(own * 2, gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("method", ["ddp", "fsdp2"])
def test_data_times_context(ranks, method):
    ranks.run(data_and_context, method, "Model", "zigzag", size=4)
    ranks.run(data_and_context, method, "Recurrences", "contiguous", size=4)
