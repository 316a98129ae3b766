"""The measured peaks, as a table."""

from __future__ import annotations

from ..measure.results import Results
from .model import Cell, Section, Table, bytes_text, time_text

SHOWN_KIB = (64, 512, 3072, 65536)  # sizes of the reading bandwidth in the table


def present(results: Results) -> list[Section]:
    rows: list[list[Cell | str]] = []
    columns: list[str] = []
    for p in results.peaks:
        values = {
            "threads": str(p.threads),
            "dtype": p.dtype,
            "torch.mm": f"{p.gemm / 1e9:.0f} GFLOP/s",
            "multiply-adds": f"{p.fma / 1e9:.0f} GFLOP/s" if p.fma else "–",
            **{f"read {bytes_text(k << 10)}": f"{p.read[k] / 1e9:.0f} GB/s" for k in SHOWN_KIB if k in p.read},
            **{f"copy {bytes_text(k << 10)}": f"{v / 1e9:.0f} GB/s" for k, v in sorted(p.copy.items())},
            **{how: time_text(seconds) for how, seconds in p.launch.items()},
        }
        columns = list(values)
        rows.append(list(values.values()))
    note = (
        "Measured in this run; the rooflines follow from them. torch.mm: the best of a few square products. multiply-adds: in a "
        "CPU's registers alone; the faster of the two bounds arithmetic. "
        "read: one buffer again and again, each thread its share, as recurrent weights are at every step. "
        "copy: bytes read and written. operator: the shortest call of a torch operator. A program that beats "
        "this way of reading, or torch.mm where nothing else bounds arithmetic, is above 100 % of its roofline."
    )
    return (
        [Section("Measured peaks (roofline)", tables=[Table("What this machine does at best", columns, rows, note)])]
        if rows
        else []
    )
