"""DistributedDataParallel and FSDP2 over two gloo processes: the gradients of the whole batch."""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fastseq

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")

RANKS, T, B, I, H = 2, 5, 4, 3, 6  # noqa: E741


class Model(nn.Module):
    """Every module once, also bidirectional and stacked, with lengths and with a PackedSequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastseq.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=2)
        self.gru = fastseq.GRU(4, H, bidirectional=True)
        self.rnn = fastseq.RNN(2 * H, H, nonlinearity="relu", recompute=True)
        self.cells = nn.ModuleList([fastseq.RNNCell(H, H), fastseq.GRUCell(H, H), fastseq.LSTMCell(H, H), nn.Linear(H, 1)])

    def forward(self, input: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        output, _ = self.lstm(input, lengths=lengths)
        packed = nn.utils.rnn.pack_padded_sequence(output, lengths, enforce_sorted=False)
        packed, _ = self.gru(packed)
        output, _ = nn.utils.rnn.pad_packed_sequence(packed, total_length=T)
        _, h_n = self.rnn(output, lengths=lengths)
        h = self.cells[0](h_n[0], h_n[0])
        h = self.cells[1](h, h)
        h, _ = self.cells[2](h, (h, h))
        return self.cells[3](h).square().mean()


def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(T, B, I, generator=generator), torch.tensor([5, 2, 3, 5])


def build():
    torch.manual_seed(0)
    return Model()


def train(model, optimizer, input, lengths, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(input, lengths).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        optimizer.step()
    return gradients


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def work(rank, method, path):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        input, lengths = batch()
        part = slice(rank * B // RANKS, (rank + 1) * B // RANKS)
        alone = build()
        model = copy.deepcopy(alone)
        expected = train(alone, torch.optim.SGD(alone.parameters(), 0.5), input, lengths)
        if method == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (RANKS,))
            for module in [model.lstm, model.gru, model.rnn, *model.cells]:
                fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        actual = train(model, optimizer, input[:, part], lengths[part])
        actual = {n.removeprefix("module."): whole(g) for n, g in actual.items()}
        after = {n.removeprefix("module."): whole(p.detach()) for n, p in model.named_parameters()}
        assert actual.keys() == expected.keys()
        for n, gradient in expected.items():
            assert gradient.any(), n
            torch.testing.assert_close(actual[n], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")
        for n, p in alone.named_parameters():
            torch.testing.assert_close(after[n], p.detach(), rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(method, tmp_path):
    mp.spawn(work, args=(method, str(tmp_path / "rendezvous")), nprocs=RANKS)
