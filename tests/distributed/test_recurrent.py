"""Recurrence over ranks is that of one process: outputs, final states, and every gradient."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastseq
from fastseq.distributed import _wavefront, context_parallel, recurrent, shard_sequence, sum_gradients, unshard_sequence
from fastseq.distributed._exchange import counted
from fastseq.testing import assert_all_close_to_truth

WIDTH, H, B = 3, 4, 3

# kind, options of the module, what the call has beside its input, micro-batches, steps of the ranks
CASES: dict[str, tuple[str, dict[str, Any], str, int, tuple[int, ...]]] = {
    "lstm": ("LSTM", {"num_layers": 2}, "", 1, (3, 2)),
    "lstm, everything": (
        "LSTM",
        {"num_layers": 3, "bidirectional": True, "proj_size": 2},
        "hx lengths resets reset_to cells",
        2,
        (3, 2),
    ),
    "gru, both ways": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}, "hx lengths", 3, (2, 3)),
    "rnn, resets": ("RNN", {"nonlinearity": "relu", "bidirectional": True, "bias": False}, "resets", 2, (2, 2)),
    "slstm": ("SLSTM", {"num_heads": 2, "bidirectional": True}, "resets lengths", 2, (3, 3)),
    "slstm, resets to": ("SLSTM", {"bidirectional": True}, "hx resets reset_to", 1, (2, 3)),
    "coupled lstm": ("CoupledLSTM", {"num_layers": 2, "zoneout": 0.2}, "hx", 2, (4, 1)),
    "peephole lstm": ("PeepholeLSTM", {"bidirectional": True, "recompute": True}, "cells", 1, (2, 3)),
    "layer norm lstm": ("LayerNormLSTM", {"num_layers": 2, "bidirectional": True}, "hx cells", 2, (1, 4)),
    "layer norm gru": ("LayerNormGRU", {"num_heads": 2}, "hx resets", 1, (3, 2)),
    "newton": ("GRU", {"num_heads": H, "solver": fastseq.Newton(tolerance=1e-14, force=True)}, "hx", 1, (4, 3)),
    "a rank without steps": ("LSTM", {"num_layers": 2, "bidirectional": True}, "hx resets reset_to cells", 2, (0, 4)),
    "an end without steps": ("GRU", {"bidirectional": True}, "resets", 1, (4, 0)),
    "four": ("LSTM", {"num_layers": 2, "bidirectional": True}, "hx lengths resets reset_to cells", 3, (2, 3, 1, 2)),
    "rows": ("LSTM", {"num_layers": 2, "bidirectional": True}, "hx", 3, (2, 2, 1, 1)),
    "four, one way": ("GRU", {"num_layers": 3}, "hx", 3, (2, 2, 2, 2)),
    "fewer steps than ranks": ("LSTM", {"num_layers": 2, "bidirectional": True}, "hx lengths resets", 2, (0, 1, 0, 1)),
    "one step": ("SLSTM", {"bidirectional": True}, "hx resets reset_to", 1, (0, 0, 1, 0)),
    "ends on the first": ("GRU", {"num_layers": 2, "bidirectional": True}, "hx early", 2, (4, 2)),
    "ends before the last": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}, "hx early cells", 3, (2, 3, 1, 2)),
    "ends early, no states": ("PeepholeLSTM", {"num_layers": 2, "bidirectional": True}, "early resets", 2, (1, 4, 0, 3)),
    "slstm, ends early": ("SLSTM", {"num_layers": 2, "bidirectional": True}, "hx early resets reset_to", 1, (3, 1, 0, 2)),
    "ends early, one way": ("LayerNormLSTM", {"num_layers": 3, "batch_first": True}, "early", 3, (2, 2, 2, 2)),
}


def made(case: str, dtype: torch.dtype, drawn: torch.dtype) -> tuple[torch.nn.Module, Tensor, dict[str, Any]]:
    """The module, its whole input, and the other arguments, of numbers ``drawn`` in a dtype."""
    kind, options, extra, _, sizes = CASES[case]
    torch.manual_seed(len(case))
    module = getattr(fastseq, kind)(WIDTH, H, dtype=drawn, **options).to(dtype).eval()
    steps, lanes = sum(sizes), module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(steps, B, WIDTH, dtype=drawn).to(dtype)
    names = fastseq.cells.CELLS[module.cell].states

    def states(batch: int) -> Any:
        widths = [module.proj_size or H if name == "h" else H for name in names]
        found = [torch.randn(lanes, batch, width, dtype=drawn).to(dtype) for width in widths]
        if len(names) > 2:
            found[2] = found[2].abs() + 1  # the normalizer of an sLSTM
        return tuple(found) if len(names) > 1 else found[0]

    given: dict[str, Any] = {}
    if "hx" in extra:
        given["hx"] = states(B)
    if "lengths" in extra:
        given["lengths"] = torch.tensor([steps, max(steps - 3, 0), min(1, steps)])
    if "early" in extra:  # later ranks have a step of no row, one row has a step on no rank
        given["lengths"] = torch.tensor([steps // 2, 0, steps // 4])
    if "resets" in extra:
        given["resets"] = torch.rand(steps, B) < 0.4
        for border in torch.tensor(sizes).cumsum(0)[:-1].tolist():
            given["resets"][border : border + 1, 1] = True
    if "reset_to" in extra:
        given["reset_to"] = states(1)
    if "cells" in extra:
        given["return_cells"] = True
    return module, x, given


def leaves(states: Any) -> list[Tensor]:
    return [] if states is None else list(states) if isinstance(states, tuple) else [states]


def results(
    case: str,
    group: Any = None,
    dtype: torch.dtype = torch.float64,
    drawn: torch.dtype | None = None,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """Outputs and gradients by name; with a group of this rank's steps, what is summed over the ranks summed."""
    drawn = drawn or dtype
    module, x, given = made(case, dtype, drawn)
    *_, micro_batches, sizes = CASES[case]
    steps = slice(0, len(x))
    if group is not None:
        rank = dist.get_rank(group)
        steps = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        if "resets" in given:
            given["resets"] = given["resets"][steps]
    torch.manual_seed(7)
    weights = torch.randn(sum(sizes), B, 2 * H, dtype=drawn).to(dtype)[steps]
    x = x[steps].clone().requires_grad_(gradients)
    states = [*leaves(given.get("hx")), *leaves(given.get("reset_to"))]
    for state in states:
        state.requires_grad_(gradients)
    seen, resets, of_cells = x, given.get("resets"), weights
    if module.batch_first:
        seen, of_cells = x.transpose(0, 1), weights.transpose(0, 1)
        if resets is not None:
            given["resets"] = resets.T
    with torch.set_grad_enabled(gradients):
        if group is None:
            output, finals, *cells = module(seen, **given)
        else:
            with context_parallel(group, micro_batches=micro_batches):
                output, finals, *cells = module(seen, **given)
    found = {"output": output.transpose(0, 1) if module.batch_first else output}
    found |= {f"final {i}": state for i, state in enumerate(leaves(finals))}
    if cells:
        found["cells"] = cells[0].transpose(1, 2) if module.batch_first else cells[0]
    if gradients:
        shares = 1 if group is None else len(sizes)
        loss = (output * of_cells[..., : output.shape[-1]]).sum() + sum(c.sin().sum() for c in cells)
        loss = loss + sum((state.sin() * (i + 1)).sum() for i, state in enumerate(leaves(finals))) / shares
        loss.backward()
        if group is not None:
            sum_gradients(module, group)
        found["dx"] = x.grad
        found |= {f"d {name}": parameter.grad for name, parameter in module.named_parameters()}
        for i, state in enumerate(states):
            found[f"d state {i}"] = state.grad.clone()
            if group is not None:
                dist.all_reduce(found[f"d state {i}"], group=group)
    return {name: tensor.detach() for name, tensor in found.items()}


OF_STEPS = ("output", "cells", "dx")


def part(whole: dict[str, Tensor], sizes: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    """What this rank has of the results of one process."""
    steps = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {
        name: tensor if name not in OF_STEPS else tensor[:, steps] if name == "cells" else tensor[steps]
        for name, tensor in whole.items()
    }


def check(group: Any, case: str) -> None:
    """In fp64, to rounding: a sum over all steps is formed in parts, in another order."""
    own, whole = results(case, group), part(results(case), CASES[case][-1], dist.get_rank(group))
    assert own.keys() == whole.keys()
    for name, tensor in own.items():
        assert tensor.shape == whole[name].shape, f"{case}, {name}: {list(tensor.shape)}, {list(whole[name].shape)}"
        scale = max(1.0, whole[name].abs().max().item()) if whole[name].numel() else 1.0
        error = (tensor - whole[name]).abs().max().item() if tensor.numel() else 0.0
        assert error <= 1000 * torch.finfo(torch.float64).eps * scale, f"{case}, {name}: {error:.2e} of {scale:.2e}"


def check_all(group: Any, cases: list[str]) -> None:
    for case in cases:
        check(group, case)


@pytest.mark.parametrize("size", [2, 4])
def test_is_what_one_process_computes(ranks, size):
    ranks.run(check_all, [case for case in CASES if len(CASES[case][-1]) == size], size=size)


def inference(group: Any) -> None:
    for case in ("lstm, everything", "gru, both ways"):
        own = results(case, group, gradients=False)
        whole = part(results(case, gradients=False), CASES[case][-1], dist.get_rank(group))
        for name, tensor in own.items():
            assert not tensor.requires_grad
            torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-12)


def test_without_gradients(ranks):
    ranks.run(inference)


def lower_precision(group: Any) -> None:
    case = "lstm, everything"
    sizes, rank = CASES[case][-1], dist.get_rank(group)
    for dtype in (torch.float32, torch.bfloat16):
        truth = part(results(case, drawn=dtype), sizes, rank)
        with fastseq.use_backend("reference"):
            torchs = part(results(case, dtype=dtype), sizes, rank)
        assert_all_close_to_truth(results(case, group, dtype), torchs, truth)


def test_lower_precision_loses_no_more_than_pytorch(ranks):
    ranks.run(lower_precision)


def same_bits(group: Any) -> None:
    for case in ("lstm, everything", "gru, both ways"):
        first, second = (results(case, group, torch.float32) for _ in range(2))
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{case}, {name}"


def test_the_same_bits_every_time(ranks):
    ranks.run(same_bits)


def traffic(group: Any) -> None:
    """States alone go from rank to rank, once forward and once back: of a layer, a direction, a row h and c in fp32; the last
    ones from the rank that has them to all, and their gradients from all to it."""
    rank, ranks, layers = dist.get_rank(group), dist.get_world_size(group), 3
    module = fastseq.LSTM(WIDTH, H, layers, proj_size=2, dtype=torch.bfloat16)
    x = torch.randn(5, B, WIDTH, dtype=torch.bfloat16)
    states, last = layers * B * (2 + H) * 4, rank == ranks - 1
    for micro_batches in (1, 3):
        with counted() as sent, context_parallel(group, micro_batches=micro_batches):
            output, _ = module(x)
        assert sent.bytes == (last * (ranks - 1) or 1) * states
        assert sent.messages == (ranks - 1 if last else layers * micro_batches)
        with counted() as sent:
            output.sum().backward()
        assert sent.bytes == ((rank > 0) + (not last)) * states


def test_what_is_sent_is_states_alone(ranks):
    ranks.run(traffic, size=4)


# kind, options of the module, what the call has beside its input, lengths, whether they are sorted, steps of the ranks
PACKED: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...], tuple[int, ...]]] = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}, "hx resets reset_to cells", (5, 2, 7, 4), (4, 3)),
    "gru, sorted": ("GRU", {"num_layers": 2, "batch_first": True}, "hx reset_to resets sorted", (6, 6, 3, 1), (2, 4)),
    "rnn, no states": ("RNN", {"bidirectional": True}, "sorted", (5, 4, 1), (3, 2)),
    "a rank without rows": ("GRU", {"bidirectional": True}, "hx", (3, 4, 1), (0, 4)),
    "slstm": ("SLSTM", {"num_heads": 2, "bidirectional": True}, "resets", (2, 6, 5), (3, 3)),
    "four": ("LSTM", {"num_layers": 2, "bidirectional": True}, "hx resets cells", (9, 2, 1, 8, 4), (3, 2, 2, 2)),
    "one row on later ranks": ("GRU", {"num_layers": 3}, "hx", (8, 2, 1), (2, 2, 2, 2)),
    "fewer steps than ranks": ("LSTM", {"bidirectional": True}, "hx sorted", (2, 1, 1), (1, 0, 1, 0)),
}


def of_packed(case: str, group: Any = None) -> dict[str, Tensor]:
    """Outputs and gradients by name, of all sequences: with a group put together from parts."""
    kind, options, extra, lengths, sizes = PACKED[case]
    torch.manual_seed(len(case))
    module = getattr(fastseq, kind)(WIDTH, H, dtype=torch.float64, **options)
    rows, lanes = len(lengths), module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(max(lengths), rows, WIDTH, dtype=torch.float64, requires_grad=True)

    def pack(padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted="sorted" in extra)

    def states(batch: int) -> Any:
        names = fastseq.cells.CELLS[module.cell].states
        widths = [module.proj_size or H if name == "h" else H for name in names]
        found = [torch.randn(lanes, batch, width, dtype=torch.float64, requires_grad=True) for width in widths]
        return tuple(found) if len(names) > 1 else found[0]

    def part(packed: PackedSequence) -> PackedSequence:
        """As ``shard_sequence`` cuts, but for the steps of each rank."""
        if group is None:
            return packed
        rank, counts = dist.get_rank(group), packed.batch_sizes.split(list(sizes))
        of_ranks = [int(count.sum()) for count in counts]
        return packed._replace(data=packed.data.split(of_ranks)[rank], batch_sizes=counts[rank])

    given: dict[str, Any] = {}
    if "hx" in extra:
        given["hx"] = states(rows)
    if "resets" in extra:
        given["resets"] = part(pack(torch.rand(max(lengths), rows) < 0.4))
    if "reset_to" in extra:
        given["reset_to"] = states(rows)
    if "cells" in extra:
        given["return_cells"] = True
    if group is None:
        output, finals, *cells = module(pack(x), **given)
    else:
        with context_parallel(group, micro_batches=2):
            output, finals, *cells = module(part(pack(x)), **given)
    assert isinstance(output, PackedSequence)
    weights = part(pack(torch.randn(max(lengths), rows, output.data.shape[1], dtype=torch.float64))).data
    shares = 1 if group is None else len(sizes)
    loss = (output.data * weights).sum() + sum(c.sin().sum() for c in cells)
    (loss + sum((state.sin() * (i + 1)).sum() for i, state in enumerate(leaves(finals))) / shares).backward()
    if group is not None:
        sum_gradients(module, group)
        output = unshard_sequence(output, group)
        cells = [unshard_sequence(c, group, dim=1) for c in cells]
    found = {"output": pad_packed_sequence(output)[0]} | {f"cells {i}": c for i, c in enumerate(cells)}
    found |= {f"final {i}": state for i, state in enumerate(leaves(finals))}
    found |= {f"d {name}": parameter.grad for name, parameter in module.named_parameters()}
    for i, tensor in enumerate([x, *leaves(given.get("hx")), *leaves(given.get("reset_to"))]):
        found[f"d given {i}"] = tensor.grad.clone()
        if group is not None:
            dist.all_reduce(found[f"d given {i}"], group=group)
    return {name: tensor.detach() for name, tensor in found.items()}


def check_packed(group: Any, size: int) -> None:
    for case, (*_, sizes) in PACKED.items():
        if len(sizes) == size:
            own, whole = of_packed(case, group), of_packed(case)
            assert own.keys() == whole.keys()
            for name, tensor in own.items():
                what = f"{case}, {name}"
                torch.testing.assert_close(
                    tensor, whole[name], rtol=1e-12, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}"
                )


@pytest.mark.parametrize("size", [2, 4])
def test_packed_sequences_are_what_one_process_computes(ranks, size):
    ranks.run(check_packed, size, size=size)


def packed_faults(group: Any) -> None:
    """What ``check_packed`` must see."""
    right = recurrent.packing
    planted = {
        "what is padded counts": lambda found: found._replace(lengths=torch.full_like(found.lengths, 7)),
        "a step too many": lambda found: found._replace(lengths=(found.lengths + 1).clamp(max=7)),
        "the last sequence first": lambda found: found._replace(sequence=found.sequences - 1 - found.sequence),
    }
    for fault, change in planted.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recurrent, "packing", lambda *args, change=change: change(right(*args)))
            own = of_packed("lstm", group)
        whole = of_packed("lstm")
        seen = [name for name in own if not torch.allclose(own[name], whole[name], rtol=1e-12, atol=1e-12)]
        assert "output" in seen and "d given 0" in seen, (fault, seen)


def test_packed_faults_are_seen(ranks):
    ranks.run(packed_faults)


def packed_functions(group: Any) -> None:
    """``batch_sizes`` of the function, in packed order; a program of shard_sequence and unshard_sequence; without gradients."""
    torch.manual_seed(4)
    module, x = fastseq.LSTM(WIDTH, H, bidirectional=True), torch.randn(7, B, WIDTH)
    whole = pack_padded_sequence(x, torch.tensor([7, 5, 1]))
    hx = torch.randn(2, B, H), torch.randn(2, B, H)
    params = [parameter.detach() for parameter in module.parameters()]
    with torch.no_grad():
        expected, states = module(whole, hx)
        with context_parallel(group):
            part = shard_sequence(whole, group)
            output, finals = module(part, hx)
            y, *of_function = fastseq.functional.lstm(part.data, hx, params, bidirectional=True, batch_sizes=part.batch_sizes)
    torch.testing.assert_close(unshard_sequence(output, group).data, expected.data)
    assert torch.equal(output.data, y)
    for own, other, again in zip(finals, states, of_function, strict=True):
        torch.testing.assert_close(own, other)
        assert torch.equal(own, again)


def test_packed_sequences_of_functions(ranks):
    ranks.run(packed_functions)


def packed_mistakes(group: Any) -> None:
    rank, lstm = dist.get_rank(group), fastseq.LSTM(WIDTH, H)
    whole = pack_padded_sequence(torch.randn(4, B, WIDTH), torch.tensor([4, 2, 3]), enforce_sorted=False)
    part = shard_sequence(whole, group)
    x = torch.randn(2, B, WIDTH)
    text = "call: rank 0 has recurrent, of packed sequences, rank 1 has recurrent (lstm)"
    refused(group, RuntimeError, text, lambda: lstm(x if rank else part))
    back = pack_sequence([torch.randn(2, WIDTH)] * (1 + rank))
    refused(group, RuntimeError, "must not rise from rank to rank", lambda: lstm(back))
    short = part._replace(data=part.data[: len(part.data) - rank])
    refused(group, RuntimeError, "rank 1: batch_sizes add up to 3 rows, but the packed data has 2", lambda: lstm(short))
    states = torch.randn(1, B + 1, H), torch.randn(1, B + 1, H)
    refused(group, RuntimeError, "Expected hidden[0] size (1, 3, 4), got [1, 4, 4]", lambda: lstm(part, states), alike=False)
    ordered = part._replace(sorted_indices=None, unsorted_indices=None)
    refused(group, RuntimeError, "Expected h0 for a batch of 3, got [1, 4, 4]", lambda: lstm(ordered, states))
    refused(group, ValueError, "carries its own lengths", lambda: lstm(part, lengths=torch.tensor([1, 2, 3])), alike=False)
    resets = torch.zeros(1, dtype=torch.bool)
    refused(group, RuntimeError, "resets must be", lambda: lstm(part, resets=resets if rank else None), alike=False)
    empty = PackedSequence(torch.randn(0, WIDTH), torch.zeros(0, dtype=torch.int64))
    refused(group, RuntimeError, "Expected sequence length to be larger than 0", lambda: lstm(empty), alike=False)
    try:
        with context_parallel(group, sharding="zigzag"):
            lstm(part)
    except ValueError as error:
        assert "must be one run: give sharding='contiguous', got 'zigzag'" in str(error)
    else:
        raise AssertionError("zigzag was taken")


def test_packed_mistakes_are_told_by_all(ranks):
    ranks.run(packed_mistakes)


def random_parts(group: Any) -> None:
    """The same elements of w_hh are dropped on all ranks; what else is drawn is each rank's own."""
    rank = dist.get_rank(group)
    torch.manual_seed(1)
    module = fastseq.LSTM(WIDTH, H, 2, dropout=0.5, zoneout=0.3, weight_dropout=0.5, dtype=torch.float64)
    x = torch.randn(3, B, WIDTH, dtype=torch.float64)
    torch.manual_seed(rank)
    with context_parallel(group, micro_batches=2):
        module(x)[0].sum().backward()
    dropped = module.weight_hh_l0.grad == 0
    every = [torch.empty_like(dropped) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, dropped, group=group)
    assert 0.2 < dropped.double().mean() < 0.8 and all(torch.equal(dropped, of) for of in every)


def test_all_ranks_drop_the_same_weights(ranks):
    ranks.run(random_parts)


def cut_off(group: Any) -> None:
    """What is before a reset on another rank does not count, be it NaN; nor what is beyond a row's length."""
    rank = dist.get_rank(group)
    module = fastseq.GRU(WIDTH, H, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 2, WIDTH, dtype=torch.float64)[2 * rank : 2 * rank + 2]
    resets = torch.zeros(2, 2, dtype=torch.bool)
    if rank:
        resets[0, 0] = True
    else:
        x[:, 0] = torch.nan
    with context_parallel(group):
        output, _ = module(x, resets=resets)
    good = output[:, 1:] if rank == 0 else output
    assert good.isfinite().all()
    good.sum().backward()
    if rank:
        assert all(p.grad.isfinite().all() for p in module.parameters())
    x = torch.randn(2, 2, WIDTH, dtype=torch.float64)
    if rank:
        x[:, 0] = torch.inf
    module.zero_grad()
    with context_parallel(group):
        output, h_n = module(x, lengths=torch.tensor([1, 4]))
    (output.sum() + h_n.sum()).backward()
    assert output.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())


def test_what_is_cut_off_may_be_anything(ranks):
    ranks.run(cut_off)


def refused(group: Any, kind: type[Exception], text: str, call: Any, alike: bool = True) -> None:
    """By this rank, as by all others, in the same words, unless one of them has it from itself alone."""
    try:
        with context_parallel(group, micro_batches=2):
            call()
    except kind as error:
        said = str(error)
    else:
        raise AssertionError(f"nothing was raised, expected {kind.__name__}: {text}")
    assert text in said, said
    if not alike:
        return
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, said, group=group)
    assert len(set(every)) == 1, every


def disagreements(group: Any) -> None:
    rank = dist.get_rank(group)
    lstm, gru = fastseq.LSTM(WIDTH, H), fastseq.GRU(WIDTH, H)
    x, rows = torch.randn(2, B, WIDTH), torch.randn(2, B + rank, WIDTH)
    text = "rank 0 has [.., 3, 3] torch.float32 on cpu, rank 1 has [.., 4, 3] torch.float32 on cpu"
    refused(group, RuntimeError, text, lambda: lstm(rows))
    double = fastseq.LSTM(WIDTH, H, dtype=torch.float64)
    refused(group, RuntimeError, "differ in input: rank 0 has", lambda: double(x.double()) if rank else lstm(x))
    text = "call: rank 0 has recurrent (lstm), rank 1 has recurrent (gru)"
    refused(group, RuntimeError, text, lambda: (gru if rank else lstm)(x))
    lengths = torch.tensor([1, 2, 2 + rank])
    text = "lengths: rank 0 has [1, 2, 2], rank 1 has [1, 2, 3]"
    refused(group, RuntimeError, text, lambda: lstm(x, lengths=lengths))
    text = "lengths must lie in [0, 4], the number of steps of all ranks; got values from 1 to 5"
    refused(group, RuntimeError, text, lambda: lstm(x, lengths=torch.tensor([1, 2, 5])))
    refused(group, RuntimeError, "wants gradients: rank 0 has 1, rank 1 has 0", lambda: lstm.requires_grad_(not rank)(x))
    lstm.requires_grad_()
    states = torch.randn(1, B + rank, H), torch.randn(1, B, H)
    refused(group, RuntimeError, "Expected hidden[0] size (1, 3, 4), got [1, 4, 4]", lambda: lstm(x, states), alike=False)
    refused(group, ValueError, "micro_batches must lie in 1..1, the rows of the batch, got 2", lambda: lstm(x[:, :1]))
    refused(group, ValueError, "give resets", lambda: lstm(x[:, 0], cu_seqlens=torch.tensor([0, 2])))
    refused(group, RuntimeError, "Expected sequence length to be larger than 0", lambda: lstm(x[:0]))
    refused(group, RuntimeError, "torch.func", lambda: torch.func.grad(lambda x: lstm(x)[0].sum())(x))
    try:
        with context_parallel(group, sharding="zigzag"):
            lstm(x)
    except ValueError as error:
        assert "must be one run: give sharding='contiguous', got 'zigzag'" in str(error)
    else:
        raise AssertionError("zigzag was taken")


def test_what_ranks_disagree_in_is_said_by_all(ranks):
    ranks.run(disagreements)


def failures(group: Any) -> None:
    """A rank that raises while it computes goes on sending, and all raise what it has to say."""
    rank, run_layer = dist.get_rank(group), recurrent.run_layer
    module, x = fastseq.LSTM(WIDTH, H, 2, bidirectional=True), torch.randn(2, B, WIDTH)
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 3:
            raise RuntimeError("no more memory")
        return run_layer(*args)

    recurrent.run_layer = failing
    try:
        refused(group, RuntimeError, "rank 1: no more memory", lambda: module(x))
        calls = 3
        with context_parallel(group):
            output, _ = module(x)
    finally:
        recurrent.run_layer = run_layer
    if rank == 1:
        output.register_hook(lambda gradient: gradient)
        recurrent._Run.undo, undo = lambda *_: 1 / 0, recurrent._Run.undo
    try:
        output.sum().backward()
    except RuntimeError as error:
        assert str(error) == "rank 1: ZeroDivisionError: division by zero"
    else:
        raise AssertionError("nothing was raised")
    finally:
        if rank == 1:
            recurrent._Run.undo = undo


def test_an_error_on_one_rank_reaches_all(ranks):
    ranks.run(failures, size=4)


def memory(group: Any) -> None:
    """What is kept for the backward pass grows with the steps: on a rank by its share of what one process keeps."""
    module = fastseq.LSTM(WIDTH, 16, 2)

    def kept(steps: int, shared: bool) -> int:
        storages: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(steps, B, WIDTH)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), fastseq.use_backend("cpu"):
            if shared:
                with pytest.MonkeyPatch.context() as patch, context_parallel(group):
                    patch.setattr(recurrent, "unhooked", nullcontext)  # to count
                    module(x)[0].sum().backward()
            else:
                module(x)[0].sum().backward()
        return sum(storages.values())

    ranks = dist.get_world_size(group)
    own, one = (kept(2 * t, shared) - kept(t, shared) for t, shared in ((32, True), (32 * ranks, False)))
    assert 0 < own <= one / ranks * 1.15, f"{own} bytes on a rank, {one} on one"


def test_a_rank_keeps_its_part(ranks):
    ranks.run(memory)


def averaged(group: Any) -> None:
    """DistributedDataParallel and FSDP over the ranks form the mean of their parts."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    x = torch.randn(4, B, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = x[2 * rank : 2 * rank + 2]

    def made() -> torch.nn.Module:
        torch.manual_seed(0)
        return fastseq.LSTM(WIDTH, H, 2, bidirectional=True, dtype=torch.float64)

    whole = made()
    whole(x)[0].square().sum().backward()
    for wrap in (
        lambda module: DistributedDataParallel(module, process_group=group),
        lambda module: fully_shard(module, mesh=DeviceMesh.from_group(group, "cpu")),
    ):
        module = wrap(made())
        with context_parallel(group, micro_batches=3):
            loss = module(own)[0].square().sum() * ranks
        loss.backward()
        for one, other in zip(whole.parameters(), module.parameters(), strict=True):
            grad = other.grad.full_tensor() if isinstance(other.grad, DTensor) else other.grad
            torch.testing.assert_close(grad, one.grad, rtol=1e-12, atol=1e-12)


def test_data_parallel_over_the_ranks(ranks):
    ranks.run(averaged)


def compiled(group: Any) -> None:
    """A program is of whole sequences; inside the block none is made."""
    lstm, x = fastseq.LSTM(WIDTH, H), torch.randn(2, B, WIDTH)
    program = torch.compile(lstm, fullgraph=True, backend="eager")
    torch.testing.assert_close(program(x), lstm(x))
    with context_parallel(group), pytest.raises(Exception, match="shares a sequence with other ranks cannot be compiled"):
        program(x)
    torch.testing.assert_close(program(x), lstm(x))


def test_nothing_is_compiled_inside(ranks):
    ranks.run(compiled, size=1)


def faults(group: Any) -> None:
    """Protocols with a fault in them, each of which ``check`` must see."""
    run, early = recurrent._Run, "ends before the last"
    packed, unpacked = run.packed, run.unpacked

    def no_gradient(self: Any, job: Any, states: Any) -> Tensor:
        return packed(self, job, None if torch._C._current_graph_task_id() >= 0 else states)

    def swapped(self: Any, job: Any, buffer: Tensor) -> list[Tensor]:
        """The states that a micro-batch of two gets first, the other one gets as well."""
        kept = self.__dict__.setdefault("kept", {})
        return unpacked(self, job, kept.setdefault((job.layer, job.direction), buffer))

    def both_from_the_first(ranks: int, layers: int, micro_batches: int, directions: int) -> Any:
        return [
            [job and job._replace(direction=way) for job in row]
            for row in _wavefront.rounds(ranks, layers, micro_batches, 1)
            for way in range(directions)
        ]

    def none_of_rows_that_ended(backward: bool) -> Any:
        """A row without a step here passes nothing on, of states or of their gradients."""

        def fault(self: Any, job: Any, states: Any) -> Tensor:
            if backward == (torch._C._current_graph_task_id() >= 0) and states is not None:
                here = self.options.lengths[self.rows[job.micro_batch]] > self.before
                states = [None if state is None else state * here[:, None] for state in states]
            return packed(self, job, states)

        return fault

    planted: dict[str, dict[Any, dict[str, Any]]] = {
        "dh is not sent back": {run: {"packed": no_gradient}},
        "micro-batches are swapped": {run: {"unpacked": swapped}},
        "lengths are counted from a rank's first step": {run: {"before": property(lambda self: 0, lambda self, before: None)}},
        "rows that ended pass no states on": {run: {"packed": none_of_rows_that_ended(False)}},
        "rows that ended pass no gradients back": {run: {"packed": none_of_rows_that_ended(True)}},
        "backwards states go to the wrong neighbor": {
            run: {
                "upstream": lambda self, direction: self.ranks.rank - 1 if self.ranks.rank else None,
                "downstream": lambda self, direction: self.ranks.rank + 1 if self.ranks.rank + 1 < self.ranks.size else None,
                "owner": lambda self, direction: self.ranks.size - 1,
            },
            recurrent: {"rounds": both_from_the_first},
        },
    }
    for fault, patches in planted.items():
        case = early if "rows that ended" in fault or "lengths" in fault else "rows"
        with pytest.MonkeyPatch.context() as patch:
            for where, functions in patches.items():
                for name, function in functions.items():
                    patch.setattr(where, name, function, raising=False)
            seen = ""
            try:
                check(group, case)
            except AssertionError as error:
                seen = str(error)
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, seen, group=group)
        assert any(text.startswith(f"{case}, ") for text in every), (fault, every)
    for case in ("rows", early):
        check(group, case)


def test_faults_are_seen(ranks):
    ranks.run(faults, size=4)
