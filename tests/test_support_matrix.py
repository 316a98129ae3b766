"""What `info --json` says under `matrix` is so: a kernel that it lists runs and is right, one that it denies is refused."""

from __future__ import annotations

import json

import pytest
import torch

from fastseq import info, support_matrix
from fastseq.backends import BACKENDS, AttentionQuery, Query, RecurrentQuery, ScanQuery, library
from fastseq.backends.triton import _launch
from fastseq.choice.problems import families, problems_of
from fastseq.choice.shipped import MEASURED

ROWS = support_matrix.rows()
CPU, GPU = support_matrix.DEVICES.values()
needs_library = pytest.mark.skipif(library.reason() is not None, reason=str(library.reason()))


def query(row: dict, dtype: torch.dtype) -> Query:
    """A small call of a row, on the CPU."""
    op, what, training, device = row["op"], row["what"], row["call"] == "training", torch.device("cpu")
    if op == "recurrent":
        return RecurrentQuery("recurrent", device, dtype, what, 5, 2, 19, False, "padded", batch=3, backward=training)
    if op == "scan":
        kind = {"real": "real", "complex": "complex", "2 x 2 blocks": "blocks"}[what]
        if kind == "complex":
            dtype = support_matrix.COMPLEX.get(dtype, torch.complex32)
        return ScanQuery("scan", "backward" if training else "forward", device, dtype, kind, 23, 3, 37, "padded", ())
    decodes = op == "attention_decode"
    call = "decode" if decodes else "weights" if what == "returned weights" else "forward"
    call = {"weights": "weights_backward", "forward": "backward"}[call] if training else call
    layout = "contiguous" if decodes else "padded"
    return AttentionQuery(op, call, device, dtype, 2, (4, 2), (1 if decodes else 33, 19), (16, 8), layout, (-1, 0), 0, 0, (), ())


def cells(device: str):
    for row in ROWS:
        if row["device"] == device:
            for name, cell in row["by_dtype"].items():
                yield row, getattr(torch, name), cell


@needs_library
def test_a_kernel_of_the_cpu_is_right_where_it_is_said_to_be_tested():
    tried = set()
    for row, dtype, cell in cells(CPU):
        asked = query(row, dtype)
        assert bool(BACKENDS["cpu"].why_not(asked)) == (cell["state"] == support_matrix.NONE), (row, dtype)
        if cell["backends"]:
            for family in families(asked)[row["call"] == "training" :][:1]:
                problem = next(problems_of(asked, family, coarse=False))
                if dtype == torch.float64:  # the truth itself
                    inputs = problem.make(0)
                    ours, theirs = (problem.run(BACKENDS[name], inputs) for name in ("cpu", "reference"))
                    torch.testing.assert_close(ours, theirs)
                else:
                    problem.check(BACKENDS["cpu"], BACKENDS["reference"])
                tried.add((row["op"], row["what"], family, dtype))
    assert len(tried) > 80


def test_what_a_gpu_is_said_to_have_its_backends_take(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    pytest.importorskip("triton")
    for row, dtype, cell in cells(GPU):
        asked = query(row, dtype)
        if isinstance(asked, RecurrentQuery):
            asked = asked._replace(batch=0)  # whether a plan fits is a question to the device
        for name in ("triton", "cuda"):
            assert (name in cell["backends"]) == (not BACKENDS[name].why_not(asked)), (name, row, dtype)


def test_measured_is_what_a_committed_result_has_a_time_of():
    measured = {tuple(row[:-1]): row[-1] for row in json.loads(MEASURED.read_text())["calls"]}
    kinds = {device: kind for kind, device in support_matrix.DEVICES.items()}
    found = set()
    for row in ROWS:
        for dtype, cell in row["by_dtype"].items():
            key = (kinds[row["device"]], row["op"], row["what"], row["call"], dtype)
            assert (cell["state"] == "measured") == (key in measured) and cell["measured on"] == measured.get(key, [])
            found.add(key)
    assert measured.keys() <= found, f"rows without a place in the matrix: {measured.keys() - found}"
    assert {cell["state"] for _, _, cell in cells(CPU)} <= {"measured", "tested", "not available"}
    assert ("cpu", "recurrent", "lstm", "training", "float32") in measured


def test_json_has_it():
    found = json.loads(info.as_json())["matrix"]
    assert found["rows"] == ROWS and found["states"] == support_matrix.STATES
    assert all(cell["state"] in found["states"] for row in found["rows"] for cell in row["by_dtype"].values())
    assert {platform["platform"] for platform in found["platforms"]} >= {"Linux, x86-64", "macOS, Windows"}
