"""How much longer a packed LSTM takes than a padded one: the experiment of pytorch#149194, with torch.nn and with fastseq.

    python examples/packed_lstm.py                # lengths up to 1000: a minute on a CPU
    python examples/packed_lstm.py --quick --threads 1

Two layers, rows whose lengths are spread evenly over 1..L, packing and unpacking included. All four programs run in turn, on the
same parameters; a time is the least of the rounds, of this thread alone, so other programs disturb it little. In percent of the
time that torch.nn takes for the padded rows, of which half is padding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

LENGTHS = (10, 20, 50, 100, 200, 500, 1000)
BATCH, WIDTH, LAYERS = 32, 64, 2
Run = Callable[[Tensor], Tensor]


def programs(lengths: Tensor) -> dict[str, Run]:
    """Rows [L, B, I] to output, padded or packed, by torch.nn and by fastseq."""
    theirs, ours = nn.LSTM(WIDTH, WIDTH, LAYERS), fastseq.LSTM(WIDTH, WIDTH, LAYERS)
    ours.load_state_dict(theirs.state_dict())

    def padded(rnn: nn.Module) -> Run:
        return lambda x: rnn(x)[0]

    def packed(rnn: nn.Module) -> Run:
        return lambda x: pad_packed_sequence(rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])[0]

    return {
        f"{name} {how.__name__}": how(rnn) for name, rnn in (("torch", theirs), ("fastseq", ours)) for how in (padded, packed)
    }


def measure(length: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of a forward and of a backward pass, the least of the rounds."""
    torch.manual_seed(0)
    lengths = torch.linspace(1, length, BATCH).round().long()
    x = torch.randn(length, BATCH, WIDTH, requires_grad=True)
    every = programs(lengths)
    assert torch.allclose(every["torch packed"](x), every["fastseq packed"](x), atol=1e-4), "results differ"
    least = dict.fromkeys(every, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, run in every.items():
            x.grad = None
            begin = time.thread_time()
            output = run(x)
            middle = time.thread_time()
            output.sum().backward()
            end = time.thread_time()
            forward, backward = least[name]
            least[name] = min(forward, middle - begin), min(backward, end - middle)
    return least


def table(rows: dict[int, dict[str, tuple[float, float]]]) -> str:
    """In Markdown: packed over torch.nn's padded, in percent."""
    lines = [
        "| L | forward: torch.nn packed | fastseq packed | backward: torch.nn packed | fastseq packed |",
        "|---|---|---|---|---|",
    ]
    for length, times in rows.items():
        cells = [
            f"{100 * times[f'{name} packed'][i] / times['torch padded'][i]:.0f} %"
            for i in range(2)
            for name in ("torch", "fastseq")
        ]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths, few rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch and fastseq (default: 1, whose time is told)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the times, with the machine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths, rounds = (LENGTHS[:3], 3) if options.quick else (LENGTHS, 5)
    rows = {length: measure(length, rounds) for length in lengths}
    print(table(rows))
    if options.json:
        from fastseq.benchmarks.measure import environment

        found = environment.collect("cpu")
        kept = {name: found[name] for name in ("time", "device", "device name", "cpu", "versions", "git")}
        sizes = {"batch": BATCH, "width": WIDTH, "layers": LAYERS, "threads": options.threads, "rounds": rounds}
        lines = ",\n".join(f"{json.dumps(str(length))}: {json.dumps(times)}" for length, times in rows.items())
        head = f'"environment": {json.dumps(kept)},\n"sizes": {json.dumps(sizes)},\n"seconds forward and backward"'
        options.json.write_text(f"{{\n{head}: {{\n{lines}\n}}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
