"""Attention over several ranks: what one process computes, and its gradients, by every method, with every feature.

The truth is plain PyTorch in fp64 with all scores in memory; every rank forms it from the same seed and compares its part. The
bound is that of one process, and what the merge adds: a weight of a merge, exp(lse of a part - lse), is off by
(2 max |lse| + 3) eps, and there are as many as parts.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastseq import use_backend
from fastseq.benchmarks.measure import memory
from fastseq.distributed import _exchange, context_parallel_attention
from fastseq.distributed import attention as module
from fastseq.distributed._exchange import Batch, counted
from fastseq.distributed._parts import Whole, held
from fastseq.distributed.sequence import held_runs, runs_of_ranks, size_of
from fastseq.functional import attention, t5_relative_bias
from fastseq.ops._attention_eager import random_seed
from fastseq.ops.types import Spec
from fastseq.testing import pooled_error
from support.attention import ATTENTION_CASES, AttentionCase, dense, make, spec_of

ROWS = {"q": "q", "relative_q": "q", "k": "k", "v": "k", "out": "q", "lse": "q"}  # which runs cut it

MORE = [
    AttentionCase("long-causal", batch=1, heads=(4, 2), lengths=(41, 41), right=0),
    AttentionCase("long-window", batch=1, heads=(2, 1), lengths=(47, 47), left=6, right=0, sinks=True, softcap=3.0),
    AttentionCase("shorter-than-ranks", lengths=(3, 2), sinks=True),
    AttentionCase("one-step", lengths=(1, 1), right=0, sinks=True),
    AttentionCase("packed-long", heads=(4, 2), packed=((7, 7), (13, 13), (0, 0), (3, 3), (5, 5)), right=0, sinks=True),
    AttentionCase("packed-cross", heads=(2, 1), packed=((3, 9), (6, 11), (2, 5)), left=4, right=0, bottom_right=True),
    AttentionCase("packed-dropout-slopes", heads=(4, 2), packed=((9, 9), (8, 8)), right=0, dropout=0.3, slopes=2),
    AttentionCase("packed-blocks", lengths=(40, 40), packed=((40, 40), (33, 33)), blocks="hqk", block_size=16, right=0),
    AttentionCase("dropout-causal-lengths", heads=(4, 2), lengths=(21, 21), dropout=0.4, right=0, k_lengths=(21, 9)),
    AttentionCase("bias-dropout-sinks", heads=(4, 2), lengths=(10, 10), bias="hqk", dropout=0.2, sinks=True, right=0),
]  # fmt: skip
CASES = {case.name: case for case in [*ATTENTION_CASES, *MORE]}
FEW = (
    "grouped",
    "causal-tiles",
    "window-bottom-right",
    "mask-all-dead",
    "bias-hqk-causal",
    "relative-bias-short-causal",
    "transformer-xl-both-sides",
    "sinks-dead",
    "dropout-tiles-grouped",
    "both-lengths-causal",
    "blocks-of-each-sequence",
    "packed-with-positions",
    "everything",
    *(case.name for case in MORE),
)


def options_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The case as the function takes it."""
    case, spec = inputs["case"], spec_of(inputs)
    options: dict[str, Any] = {
        "window_size": (case.left, case.right),
        "alignment": "bottom_right" if case.bottom_right else "top_left",
        "offset": case.offset,
        "scale": case.scale,
        "softcap": case.softcap,
        "dropout_p": case.dropout,
    }
    names = {
        "attn_mask": "mask", "attn_bias": "bias", "alibi_slopes": "slopes", "relative_bias": "relative_bias",
        "relative_key": "relative_k", "sinks": "sinks", "seqlens_q": "q_lengths", "seqlens_k": "k_lengths",
        "cu_seqlens_q": "cu_q", "cu_seqlens_k": "cu_k", "block_layout": "blocks",
    }  # fmt: skip
    options |= {name: inputs[own] for name, own in names.items() if inputs.get(own) is not None}
    if "relative_bias" in options:
        options["relative_bias_zero"] = spec.relative_bias_zero
    if "relative_key" in options:
        options |= {"relative_query": inputs["relative_q"], "relative_key_zero": spec.relative_k_zero}
    if "block_layout" in options:
        options["block_size"] = spec.block_size
    return options


def taken(tensor, runs, dim):
    return torch.cat([tensor.narrow(dim, begin, end - begin) for begin, end in runs], dim)


def weights_for(like, seed):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(out, lse, w_out, w_lse):
    (out.double() * w_out).sum().add((lse.masked_fill(lse == -torch.inf, 0).double() * w_lse).sum()).backward()


def results_of(inputs, out, lse):
    found = {"out": out.detach(), "lse": torch.nan_to_num(lse.detach(), neginf=0.0)}
    return found | {f"d{n}": t.grad for n, t in inputs.items() if isinstance(t, torch.Tensor) and t.grad is not None}


def whole(case, dtype, seed):
    """The inputs, and the results of plain PyTorch, with all their gradients."""
    inputs = make(case, dtype)
    inputs["seed"] = seed if case.dropout else None
    out, lse, _ = dense(inputs)
    weights = weights_for(out, 1), weights_for(lse, 2)
    backward(out, lse, *weights)
    return inputs, results_of(inputs, out, lse), weights


def shards(case, n, sharding, sizes=None):
    """The runs of each rank, of queries and of keys."""
    totals = [sum(pair[i] for pair in case.packed) for i in (0, 1)] if case.packed else case.lengths
    if sizes is not None:
        return [held_runs(sizes[i], sharding) for i in (0, 1)]
    return [runs_of_ranks(total, n, sharding) for total in totals]


def local_of(inputs, runs, rank):
    """This rank's part of the inputs, each with a gradient of its own where the whole has one."""
    own = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            continue
        if name in ("mask", "bias"):
            part = taken(value, runs[0][rank], 2) if value.shape[2] > 1 else value
        elif name in ROWS:
            part = taken(value, runs["qk".index(ROWS[name])][rank], -2)
        else:
            part = value
        own[name] = part.detach().clone().requires_grad_(value.requires_grad)
    return own


def in_parts(group, case, inputs, runs, weights, method, sharding):
    """This rank's results."""
    own = local_of(inputs, runs, dist.get_rank(group))
    options = options_of(own)
    swap = (lambda t: t.transpose(0, 1)) if case.packed else (lambda t: t)
    if "relative_query" in options:
        options["relative_query"] = swap(options["relative_query"])
    torch.manual_seed(77)
    out, lse = context_parallel_attention(
        swap(own["q"]), swap(own["k"]), swap(own["v"]), group, method=method, sharding=sharding, return_lse=True, **options
    )
    out = swap(out)
    rows = runs[0][dist.get_rank(group)]
    backward(out, lse, taken(weights[0], rows, -2), taken(weights[1], rows, -1))
    return results_of(own, out, lse)


def compare(group, case, method, sharding="contiguous", dtype=torch.float32, sizes=None, again=False):
    """Raises AssertionError unless this rank's part, and the sum of all shares, are those of one process."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    runs = shards(case, n, sharding, sizes)
    torch.manual_seed(77)
    seed = random_seed()
    _, truth, _ = whole(case, torch.float64, seed)
    inputs, plain, weights = whole(case, dtype, seed)
    found = in_parts(group, case, inputs, runs, weights, method, sharding)
    if again:
        once_more = in_parts(group, case, inputs, runs, weights, method, sharding)
        assert all(torch.equal(found[name], once_more[name]) for name in found), "another run gives other bits"
    eps = torch.finfo(dtype).eps
    merges = (
        sum(len(held(of)) for of in runs[1]) * (2 * truth["lse"].abs().max().item() + 3) * eps if truth["lse"].numel() else 0.0
    )
    own_error = pooled_error(plain, truth) + merges / 2
    actual, expected, exact = {}, {}, {}
    for name, value in found.items():
        key = name.removeprefix("d") if name.startswith("d") else name
        one, other = plain[name], truth[name]
        if key in ROWS:
            which, dim = runs["qk".index(ROWS[key])][rank], -1 if key == "lse" else -2
            one, other = taken(one, which, dim), taken(other, which, dim)
        elif key == "bias" and one.shape[2] > 1:
            one, other = taken(one, runs[0][rank], 2), taken(other, runs[0][rank], 2)
        else:
            value = value.clone()
            dist.all_reduce(value, group=group)
        actual[name], expected[name], exact[name] = value, one, other
    missing = {name for name in plain if name not in found} - {"dbias"}
    assert not missing, f"no {missing}"
    scales = {name: truth[name].abs().max().item() if truth[name].numel() else 0.0 for name in actual}
    for name in actual:  # relative to the whole, of which a rank may hold what is all zero
        if actual[name].numel():
            bound = 2 * own_error * scales[name] + 2 * eps * max(1.0, scales[name])
            error = (actual[name].double() - exact[name]).abs().max().item()
            assert error <= bound, f"{case}, {method}, {sharding}, {n} ranks: {name} is off by {error:.3e}, bound {bound:.3e}"


def refusal(group, case, method, sharding="contiguous"):
    try:
        compare(group, case, method, sharding)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def compare_all(group, names, method, sharding, dtype=torch.float32, again=False, message=None):
    """How many cases were compared; the others were refused, with a method that takes them."""
    done = 0
    with small_messages(message):
        for name in names:
            case, n = CASES[name], dist.get_world_size(group)
            (hq, hk), own = case.heads, case.heads[0] // n
            group_size = hq // hk
            divides = hq % n == 0 and own and (own % group_size == 0 or group_size % own == 0)
            rowwise = any(which and "q" in which for which in (case.mask, case.bias))
            one_row = (case.mask or case.bias) and any(size_of(of) == 1 for of in shards(case, n, sharding)[0])
            if method == "all_to_all" and (not divides or rowwise or one_row):
                found = refusal(group, case, method, sharding)
                assert found and found[0] == "ValueError" and "method='ring'" in found[1], (name, found)
                continue
            compare(group, case, method, sharding, dtype, again=again)
            done += 1
    return done


@contextmanager
def small_messages(steps):
    before = _exchange.MESSAGE, _exchange.FEWEST
    if steps is not None:
        _exchange.MESSAGE, _exchange.FEWEST = 1, steps
    try:
        yield
    finally:
        _exchange.MESSAGE, _exchange.FEWEST = before


@pytest.mark.parametrize("sharding", ["contiguous", "zigzag"])
@pytest.mark.parametrize("method", ["ring", "all_gather", "all_to_all"])
def test_two_ranks_compute_what_one_does(ranks, method, sharding):
    names = list(CASES) if sharding == "contiguous" else FEW
    done = ranks.run(compare_all, names, method, sharding)
    assert done[0] == done[1] and (method == "all_to_all" or done[0] == len(names))
    assert done[0] >= 12


@pytest.mark.parametrize("method", ["ring", "all_gather", "all_to_all"])
def test_four_ranks_compute_what_one_does(ranks, method):
    for sharding in ("contiguous", "zigzag"):
        ranks.run(compare_all, FEW, method, sharding, size=4)


def test_chunks_and_bits(ranks):
    """Chunks of three steps, so that many go round; and every run gives the same bits."""
    ranks.run(compare_all, FEW, "ring", "zigzag", torch.float32, True, 3, size=3)
    ranks.run(compare_all, FEW, "all_gather", "zigzag", torch.float32, True, 3, size=3)
    ranks.run(compare_all, ("long-causal", "sinks", "dropout"), "all_to_all", "contiguous", torch.float32, True)


def test_half_precision(ranks):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        ranks.run(compare_all, ("causal-tiles", "sinks", "packed-long"), "ring", "contiguous", dtype)


def uneven(group):
    causal = replace(CASES["long-causal"], lengths=(11, 11))
    for method in ("ring", "all_gather", "all_to_all"):
        for sizes in ([(4, 0, 7, 0), (4, 0, 7, 0)], [(0, 11, 0, 0), (5, 1, 0, 5)], [(1, 1, 1, 8), (11, 0, 0, 0)]):
            compare(group, causal, method, sizes=sizes)
            with small_messages(2):
                compare(group, causal, method, sizes=sizes)
        packed = replace(CASES["packed-long"], packed=((5, 5), (6, 6)))
        compare(group, packed, method, sizes=[(2, 0, 8, 1), (2, 0, 8, 1)])


def test_uneven_parts(ranks):
    ranks.run(uneven, size=4)


def t5(group):
    """The table's gradient, through the table of distances."""
    rank, n, T = dist.get_rank(group), dist.get_world_size(group), 14
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, T, 8, dtype=torch.float64) for _ in range(3))
    tables = [torch.randn(8, 4, dtype=torch.float64).requires_grad_() for _ in range(1)]
    table = tables[0]
    w = torch.randn(1, 4, T, 8, dtype=torch.float64)

    def loss(table, q, k, v, w, call):
        bias, zero = t5_relative_bias(table, T, T, num_buckets=8, max_distance=9)
        return (call(q, k, v, relative_bias=bias, relative_bias_zero=zero, causal=True) * w).sum()

    (expected,) = torch.autograd.grad(loss(table, q, k, v, w, attention), table)
    for method in ("ring", "all_gather", "all_to_all"):
        runs = runs_of_ranks(T, n, "zigzag")[rank]
        own = [taken(t, runs, 2) for t in (q, k, v, w)]
        call = lambda q, k, v, **o: context_parallel_attention(q, k, v, group, method=method, sharding="zigzag", **o)  # noqa: E731, B023
        (found,) = torch.autograd.grad(loss(table, *own, call), table)
        dist.all_reduce(found, group=group)
        torch.testing.assert_close(found, expected)


def test_gradient_of_a_t5_table(ranks):
    ranks.run(t5, size=4)


def same_bits_of_dropout(group, T, methods, shardings, backend=None):
    """Which weights are dropped, seen through values that tell keys apart: zeros are exact."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    q, k = torch.zeros(2, 4, T, 8), torch.zeros(2, 2, T, 8)
    v = torch.eye(T).expand(2, 2, T, T)
    torch.manual_seed(5)
    one = attention(q, k, v, dropout_p=0.5)
    kept = (one.unflatten(1, (2, 2)) != 0).any(2)  # by a head of a group of two at least
    for method in methods:
        for sharding in shardings:
            runs = runs_of_ranks(T, n, sharding)[rank]
            torch.manual_seed(5 if rank == 0 else 6)  # the first rank's generator counts
            own = [taken(t, runs, 2).requires_grad_() for t in (q, k, v)]
            with use_backend(backend) if backend else nullcontext():
                out = context_parallel_attention(*own, group, method=method, sharding=sharding, dropout_p=0.5)
                # query i asks for feature i: dv has, transposed, the weights that were kept
                (dv,) = torch.autograd.grad(out, own[2], taken(torch.eye(T).expand_as(one), runs, 2))
            assert torch.equal(out == 0, taken(one, runs, 2) == 0)
            assert torch.equal(dv.mT != 0, taken(kept, runs, 3))
    return int((one == 0).sum())


def test_dropout_is_that_of_one_process(ranks):
    every = ("ring", "all_gather", "all_to_all"), ("contiguous", "zigzag")
    counts = {zeros for size in (1, 2, 4) for zeros in ranks.run(same_bits_of_dropout, 16, *every, size=size)}
    assert len(counts) == 1 and 900 < counts.pop() < 1150


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_dropout_by_triton_is_that_of_one_process(ranks):
    """Parts that begin at a key where no four of random numbers begin, and at other heads."""
    ranks.run(same_bits_of_dropout, 10, ("ring", "all_to_all"), ("contiguous",), "triton")


def work_of(n, sharding, T, tile):
    """Tiles of queries and keys that each rank computes under a causal mask."""
    whole = Whole(Spec(right=0), T, T, 1, 1)
    runs = runs_of_ranks(T, n, sharding)
    counts = []
    for of in runs:
        tiles = 0
        for queries in held(of):
            for keys in (chunk for other in runs for chunk in held(other)):
                for part in whole.parts(queries, keys):
                    (begin, end), (first, last), _ = part.pairs
                    for i in range(begin, end, tile):
                        tiles += sum(j <= min(i + tile, end) - 1 for j in range(first, last, tile))
        counts.append(tiles)
    return counts


@pytest.mark.parametrize("n", [2, 4, 8])
def test_zigzag_gives_every_rank_the_same_tiles(n):
    zigzag, contiguous = work_of(n, "zigzag", 128 * n, 16), work_of(n, "contiguous", 128 * n, 16)
    assert max(zigzag) - min(zigzag) <= 1
    assert sum(zigzag) == sum(contiguous) and max(contiguous) > 1.5 * max(zigzag) - 16


def sent(group, T, method, sharding, window, gradients):
    n = dist.get_world_size(group)
    q, k, v = (torch.randn(1, heads, T // n, 16, requires_grad=gradients) for heads in (4, 2, 2))
    with counted() as traffic:
        out = context_parallel_attention(
            q, k, v, group, method=method, sharding=sharding, causal=window is not None, window_size=window
        )
        if gradients:
            out.sum().backward()
    return traffic.bytes


def test_bytes_sent_are_those_of_the_formula(ranks):
    T, n = 64, 4
    key = 2 * 2 * 16 * 4  # K and V of a step: 2 heads, 16 features, fp32
    part = T // n * key
    assert ranks.run(sent, T, "ring", "contiguous", None, False, size=n) == [(n - 1) * part] * n
    assert ranks.run(sent, T, "ring", "zigzag", None, True, size=n) == [3 * (n - 1) * part] * n
    # causal: the chunk of rank r goes to the ranks behind it, which are n - 1 - r hops; hop h is sent by rank r + h
    causal = ranks.run(sent, T, "ring", "contiguous", (None, 0), False, size=n)
    assert causal == [part * rank_sends for rank_sends in (1, 2, 3, 0)]
    assert ranks.run(sent, T, "all_gather", "contiguous", None, False, size=n) == [(n - 1) * part] * n
    # a window of 5 before: the last 5 keys go to the next rank, and their gradients come back
    assert ranks.run(sent, T, "all_gather", "contiguous", (5, 0), False, size=n) == [5 * key] * (n - 1) + [0]
    assert ranks.run(sent, T, "all_gather", "contiguous", (5, 0), True, size=n) == [10 * key, 15 * key, 15 * key, 5 * key]
    # heads for steps: of q and the output 1 of 4 heads to each other rank, of k and v 1 (2 heads for 4 ranks), and the lse
    own = T // n
    there, back = own * (16 + 2 * 16) * 4, own * (16 + 1) * 4
    assert ranks.run(sent, T, "all_to_all", "contiguous", None, False, size=n) == [(n - 1) * (there + back)] * n
    there, back = there + own * 16 * 4, back + own * (16 + 2 * 16) * 4
    assert ranks.run(sent, T, "all_to_all", "contiguous", None, True, size=n) == [(n - 1) * (there + back)] * n


def growth(group, method, leaves):
    """Bytes at the peak of forward with backward of full attention, by step, in tensors of a rank's steps."""
    n, heads, features = dist.get_world_size(group), 4, 32

    def run(T):
        q, k, v = (torch.randn(1, heads, T // n, features if leaves else 1, requires_grad=True) for _ in range(3))
        ones = torch.ones(features)

        def attended():
            own = (q, k, v) if leaves else (q * ones, k * ones, v * ones)  # which nobody keeps but attention
            return context_parallel_attention(*own, group, method=method)

        out = attended()
        return [out, *torch.autograd.grad(out, (q, k, v), torch.randn(out.shape))]

    with small_messages(16):
        first, second = (memory.observe(lambda T=T: run(T)).peak_bytes for T in (256, 512))
    return (second - first) / (256 // n * heads * features * 4)


@pytest.mark.parametrize("n", [2, 4])
def test_memory_of_a_rank_is_that_of_the_formula(ranks, n):
    """Of q, k, v, the output and their gradients, each counted once: 8. lse and its like are a part of ``features``."""
    small = 0.3
    for method, leaves, formula in (
        ("ring", True, 8),
        ("all_gather", True, 8),  # forward q, k, v, the output, and twice its keys and values at once: as many
        ("all_to_all", True, 13),  # and q, k, v, the output and its gradient once more, of own heads
        ("all_to_all", False, 10),
    ):
        for found in ranks.run(growth, method, leaves, size=n):
            assert formula - 0.1 <= found <= formula + small, (method, leaves, found)


BLOCK, LATE = 0.15, 0.1  # seconds that a block takes, and that a message is late


def waits(group, late, hidden, gradients):
    """Seconds of a call whose blocks and messages take long, on the slowest rank."""
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=gradients) for _ in range(3))
    post, wait, attend, back = Batch.post, Batch.wait, module._attend, module._gradients

    def posted(self):
        self.due = time.monotonic() + late
        result = post(self)
        if not hidden:
            self.wait()
        return result

    def waited(self):
        if self._works:
            time.sleep(max(0.0, self.due - time.monotonic()))
        wait(self)

    def slowly(function):
        def slow(*args):
            time.sleep(BLOCK)
            return function(*args)

        return slow

    Batch.post, Batch.wait, module._attend, module._gradients = posted, waited, slowly(attend), slowly(back)
    try:
        dist.barrier(group)
        out, begun = context_parallel_attention(q, k, v, group), time.monotonic()
        if gradients:
            out.sum().backward()
        else:
            begun = time.monotonic()
            context_parallel_attention(q, k, v, group)
        return time.monotonic() - begun
    finally:
        Batch.post, Batch.wait, module._attend, module._gradients = post, wait, attend, back


def test_messages_are_hidden_behind_blocks(ranks):
    """In a ring of three, two messages are late: nobody waits for them; backward only for the gradients that come home last."""
    for gradients, exposed in ((False, 0.0), (True, LATE)):

        def least(hidden, gradients=gradients):
            return min(max(ranks.run(waits, LATE, hidden, gradients, size=3)) for _ in range(3))

        assert 3 * BLOCK <= least(True) < 3 * BLOCK + exposed + LATE
        assert least(False) >= 3 * BLOCK + 2 * LATE


def mistake(group, name):
    """Type and words of what this rank raises, and that nothing but headers was exchanged."""
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 6, 8) for _ in range(3))
    options: dict[str, Any] = {}
    if name == "dtype":
        k, v = (k.double(), v.double()) if rank else (k, v)
    elif name == "dtype of one":
        q = q.double() if rank else q
    elif name == "heads":
        k, v = k[:, : 3 - 2 * rank], v[:, : 3 - 2 * rank]
    elif name == "option":
        options["causal"] = rank == 1
    elif name == "method":
        options["method"] = ["ring", "all_gather"][rank]
    elif name == "no such method":
        options["method"] = "rings"
    elif name == "gradient":
        k.requires_grad_(rank == 0)
    elif name == "zigzag":
        q, k, v = (t[:, :, : 6 - 3 * rank] for t in (q, k, v))
        options["sharding"] = "zigzag"
    elif name == "rows of a mask":
        options["attn_mask"] = torch.ones(12, 12, dtype=torch.bool)
    elif name == "columns of a mask":
        options["attn_mask"] = torch.ones(6, 6, dtype=torch.bool)
    elif name == "heads for ranks":
        options["method"] = "all_to_all"
    elif name == "mask for all_to_all":
        q, k, v = (torch.randn(1, 4, 6, 8) for _ in range(3))
        options |= {"method": "all_to_all", "attn_bias": torch.zeros(6, 12)}
    elif name == "ambiguous":
        q, options["causal"] = q[:, :, :2], True
    elif name == "cu_seqlens":
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        options |= {"cu_seqlens_q": torch.tensor([0, 5 + rank, 12]), "cu_seqlens_k": torch.tensor([0, 5 + rank, 12])}
    elif name == "rows of cu_seqlens":
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        options |= {"cu_seqlens_q": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 6])}
    elif name == "no tensor":
        q = [1] if rank else q
    elif name == "slopes":
        options["alibi_slopes"] = torch.ones(3, requires_grad=rank == 1)
    elif name == "lengths":
        v = v[:, :, : 6 - rank]
    with counted() as traffic:
        try:
            context_parallel_attention(q, k, v, group, **options)
        except Exception as error:
            return type(error).__name__, str(error), traffic.bytes
    return None


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("dtype", "RuntimeError", "the dtype of k: rank 0 has torch.float32, rank 1 has torch.float64"),
        ("dtype of one", "RuntimeError", "the dtype of q: rank 0 has torch.float32, rank 1 has torch.float64"),
        ("heads", "RuntimeError", "the shape of k but for steps: rank 0 has [1, 3, 8], rank 1 has [1, 1, 8]"),
        ("option", "RuntimeError", "differ in causal: rank 0 has False, rank 1 has True"),
        ("method", "RuntimeError", "method: rank 0 has ring, rank 1 has all_gather"),
        ("no such method", "ValueError", "did you mean 'ring'"),
        ("gradient", "RuntimeError", "whether k wants a gradient: rank 0 has True, rank 1 has False"),
        ("zigzag", "RuntimeError", "(shard_sequence does it), got [6, 3]"),
        ("rows of a mask", "RuntimeError", "attn_mask must hold this rank's rows, [.., 6 or 1, T], got [12, 12]"),
        ("columns of a mask", "RuntimeError", "attn_mask must be [Tq, Tk]"),
        ("heads for ranks", "ValueError", "cannot be divided by 2; method='ring' takes any number"),
        ("mask for all_to_all", "ValueError", "attn_bias would be needed whole, [.., T, T]; method='ring'"),
        ("ambiguous", "ValueError", "causal with 4 queries and 12 keys: ambiguous"),
        ("cu_seqlens", "RuntimeError", "cu_seqlens_q: rank 0 has"),
        ("rows of cu_seqlens", "RuntimeError", "the number of rows, 12, got [0, 6]"),
        ("no tensor", "TypeError", "rank 1: q must be a Tensor, not list"),
        ("slopes", "RuntimeError", "alibi_slopes: rank 0 has (torch.float32, 'cpu', 3, False), rank 1 has"),
        ("lengths", "RuntimeError", "rank 1: k and v must agree in length, got 6 and 5"),
    ],
)
def test_mistakes_are_told_on_every_rank_before_anything_is_sent(ranks, name, kind, words):
    first, second = ranks.run(mistake, name)
    assert first == second and first is not None
    assert first[0] == kind and words in first[1] and first[2] == 0, first


def fails_within(group, where, method):
    """One rank fails in its own part of the work, forward or backward: all raise its error, and the next call is right."""
    rank = dist.get_rank(group)
    target, name = {
        "forward": (module, "_attend") if method != "all_to_all" else (module.ops, "attention"),
        "backward": (module, "_gradients") if method != "all_to_all" else (module.ops, "attention_backward"),
    }[where]
    before = getattr(target, name)

    def planted(*args, **kwargs):
        raise MemoryError("planted")

    q, k, v = (torch.randn(1, 4, 4, 8, requires_grad=True) for _ in range(3))
    if rank == 1:
        setattr(target, name, planted)
    try:
        context_parallel_attention(q, k, v, group, method=method).sum().backward()
    except Exception as error:
        found = type(error).__name__, str(error)
    else:
        found = None
    finally:
        setattr(target, name, before)
    compare(group, CASES["causal-tiles" if method != "all_to_all" else "causal"], method)
    return found


@pytest.mark.parametrize("method", ["ring", "all_gather", "all_to_all"])
def test_a_rank_that_fails_leaves_no_other_waiting(ranks, method):
    for where in ("forward", "backward"):
        found = ranks.run(fails_within, where, method, size=2)
        assert set(found) == {("RuntimeError", "rank 1: MemoryError: planted")}


def second_derivative(group):
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    out = context_parallel_attention(q, k, v, group)
    try:
        torch.autograd.grad(out.sum(), q, create_graph=True)
    except NotImplementedError as error:
        return str(error)
    return None


def test_a_second_derivative_is_refused(ranks):
    for words in ranks.run(second_derivative):
        assert "has no second derivative" in words


def _of_another_rank(once_round):
    """What arrives is taken for what the neighbor on the other side has."""

    def wrong(ranks, own, shapes, last, use, returns=None):
        return once_round(ranks, own, shapes, last, lambda r, pair: use((2 * ranks.rank - r) % ranks.size, pair), returns)

    return wrong


def _shifted(function):
    """A place too early."""
    return lambda part, *rest: function(part._replace(spec=part.spec._replace(offset=part.spec.offset - 1)), *rest)


def _unweighted(add):
    def wrong(self, part, out, lse):
        self.out[part.q] += out / 2
        self.lse[part.q] = torch.logaddexp(self.lse[part.q], lse)

    return wrong


def _to_the_wrong_rank(once_round):
    """dK and dV come home one rank early."""

    def wrong(ranks, *rest):
        home = once_round(ranks, *rest)
        everyone = [None] * ranks.size
        dist.all_gather_object(everyone, home, group=ranks.group)
        other = everyone[(ranks.rank + 1) % ranks.size]
        return None if home is None else torch.zeros_like(home) if other is None else other

    return wrong


def _twice(results):
    def wrong(self, sinks, dtype):
        results(self, sinks, dtype)
        self.lse = torch.logaddexp(self.lse, sinks[:, None])
        return results(self, sinks, dtype)

    return wrong


def _rotated(swap):
    """What one rank sent is taken for what another did."""

    def wrong(ranks, outgoing, shapes):
        found = swap(ranks, outgoing, shapes)
        return found[1:] + found[:1]

    return wrong


def _own_again(trade):
    """What a rank gave is taken for what it got."""

    def wrong(ranks, outgoing, *rest):
        trade(ranks, outgoing, *rest)
        return outgoing

    return wrong


def _the_first_again(some_at_once):
    """Of the keys that come in several turns the first come in each."""

    def wrong(self, asked, most):
        turns = list(some_at_once(self, asked, most))
        return turns[:1] * len(turns)

    return wrong


FAULTS = {
    "neighbor": (module, "once_round", _of_another_rank),
    "all_gather from another rank": (module, "trade", _own_again),
    "all_gather of the first keys": (module._Gather, "_some_at_once", _the_first_again),
    "all_to_all from another rank": (module, "swap", _rotated),
    "offset": (module, "_attend", _shifted),
    "offset of gradients": (module, "_gradients", _shifted),
    "merge without lse": (module._Merged, "add", _unweighted),
    "dK to the wrong rank": (module, "once_round", _to_the_wrong_rank),
    "sinks twice": (module._Merged, "results", _twice),
}


def planted(group, fault):
    """What the comparison says of a fault of the protocol."""
    owner, name, change = FAULTS[fault]
    right = getattr(owner, name)
    setattr(owner, name, change(right))
    method, everything = (fault.split()[0], -1) if fault.startswith("all_") else ("ring", 0)
    try:
        with small_messages(2):
            compare(group, replace(CASES["long-causal"], lengths=(12, 12), sinks=True, right=everything), method)
    except AssertionError as error:
        return str(error)
    finally:
        setattr(owner, name, right)
    return ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(ranks, fault):
    found = ranks.run(planted, fault, size=2 if fault.startswith("all_to_all") else 3)
    assert any("is off by" in words for words in found), found
