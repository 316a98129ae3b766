"""A causal character model whose sequences lie on several processes, each with its part, beside the same model on one.

    torchrun --nproc-per-node 2 examples/context_parallel.py
    torchrun --nproc-per-node 4 examples/context_parallel.py --method all_to_all --quick

Both start from the same weights and see the same text; a process holds a sequence's length divided by their number. The program
checks that the losses agree as far as rounding lets them: a third model, every weight of which was moved by one unit of rounding,
is trained along on one process, and shows how far that carries. Text: see data/README.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from side_by_side import ALLOWANCE, nudged
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from fastseq.distributed import context_parallel, positions, shard_sequence
from fastseq.functional import scaled_dot_product_attention

TEXT = Path(__file__).parent / "data" / "persuasion.txt"
SHARDING = "zigzag"  # under a causal mask every process has as much to do


class Block(nn.Module):
    """Causal attention and two linear layers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.inner(self.norms[1](x))


class CharacterModel(nn.Module):
    """Scores for the next character: characters [B, t] at these places [t] -> [B, t, characters]."""

    def __init__(self, characters: int, longest: int, width: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.embedding, self.places = nn.Embedding(characters, width), nn.Embedding(longest, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.head = nn.Linear(width, characters)

    def forward(self, characters: Tensor, places: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(characters) + self.places(places)))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor, places: Tensor, whole: int) -> Tensor:
    """The share that these characters have in the mean over ``whole`` of them."""
    return F.cross_entropy(model(inputs, places).flatten(0, 1), targets.flatten(), reduction="sum") / whole


def pieces(text: Tensor, steps: int, length: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Characters [B, T] from random places, each with the same one character later."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length - 1, (size, 1), generator=generator)
        piece = text[starts + torch.arange(length + 1)]
        yield piece[:, :-1], piece[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("ring", "all_gather", "all_to_all"), default="ring")
    parser.add_argument("--steps", type=int, help="training steps (default 200, quick 8)")
    parser.add_argument("--quick", action="store_true", help="few steps on short sequences: some seconds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("context",))
    held, size = (32, 4) if options.quick else (128, 8)  # characters that a process holds of a sequence; sequences
    length, steps = held * ranks, options.steps or (8 if options.quick else 200)

    text = TEXT.read_text(encoding="utf-8")
    alphabet = "".join(sorted(set(text)))
    codes = torch.tensor([alphabet.index(c) for c in text])
    torch.manual_seed(options.seed)
    parted = CharacterModel(len(alphabet), length)
    models: dict[str, nn.Module] = {"parts": parted}
    if rank == 0:
        models |= {"whole": copy.deepcopy(parted), "nudged": nudged(parted)}
    optimizers = {name: torch.optim.Adam(model.parameters(), 3e-3) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    own = positions(length, mesh, sharding=SHARDING)

    for inputs, targets in pieces(codes, steps, length, size, options.seed):
        for name, model in models.items():
            in_parts = name == "parts"
            optimizers[name].zero_grad()
            if in_parts:
                x, y = (shard_sequence(t, mesh, dim=1, sharding=SHARDING) for t in (inputs, targets))
            with context_parallel(mesh, method=options.method, sharding=SHARDING) if in_parts else nullcontext():
                data = (x, y, own) if in_parts else (inputs, targets, torch.arange(length))
                loss = loss_of(model, *data, targets.numel())
                loss.backward()
            if in_parts:  # each process has its share of the loss and of every gradient
                loss = loss.detach()
                for tensor in (loss, *(parameter.grad for parameter in model.parameters())):
                    dist.all_reduce(tensor)
            optimizers[name].step()
            losses[name].append(loss.item())

    if rank == 0:
        print(f"{length} characters, {held} on each of {ranks} processes, by {options.method}")
        print(f"{'step':>6}{'one process':>14}{f'{ranks} processes':>14}{'difference':>12}{'allowed':>12}")
        drift = 0.0
        for step, (one, parts, moved) in enumerate(zip(losses["whole"], losses["parts"], losses["nudged"], strict=True)):
            drift = max(drift, abs(moved - one))
            allowed = ALLOWANCE * (drift + torch.finfo(torch.float32).eps * one)
            if step % max(1, steps // 8) == 0 or step == steps - 1:
                print(f"{step:>6}{one:>14.6f}{parts:>14.6f}{abs(one - parts):>12.1e}{allowed:>12.1e}")
            assert abs(one - parts) <= allowed, f"step {step}: losses differ by {abs(one - parts)}, allowed is {allowed}"
        assert losses["parts"][-1] < losses["parts"][0], "training did not help"
        print(f"losses agree at every one of {steps} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
