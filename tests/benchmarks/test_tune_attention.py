"""The model of a tile by hand, and the tuning command on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastseq.benchmarks.gpu import attention_model as model
from fastseq.benchmarks.gpu import tune_attention


def cost(kernel="forward", tile=(128, 64), causal=False, capability=90, resident=1, instruction="wgmma.mma_async", **more):
    given = {"features": (128, 128), "itemsize": 2, "sizes": (1, 8, 1024, 1024)} | more
    return model.cost(
        kernel, tile, given["features"], given["itemsize"], given["sizes"], causal, capability, resident, instruction
    )


def test_a_tile_by_hand():
    c = cost()
    assert c.tile_flops == 2 * 128 * 64 * 256 and c.tile_bytes == 64 * 256 * 2 and c.intensity == 128
    assert c.cycles == {"products": 1024.0, "exponentials": 512.0, "cache": 512.0} and c.bound == "products"
    assert (c.blocks, c.tiles) == (64, 64 * 16)
    # 64 blocks leave 68 of 132 multiprocessors without work, so each does its 16 tiles alone
    assert c.seconds == pytest.approx(16 * (1024 + 512 + 512) / 1.83e9)


def test_all_products_of_a_head_are_counted():
    """Full attention has 4 T S E FLOP per head; its backward by two passes 6 + 8."""
    for kernel, factor in (("forward", 4), ("bwd_dq", 6), ("bwd_dkdv", 8)):
        c = cost(kernel)
        assert c.tile_flops * c.tiles == factor * 8 * 1024 * 1024 * 128
    assert cost("bwd_dkdv").tile_bytes == 128 * 256 * 2  # streams queries


def test_causal_has_half_the_tiles_and_those_of_the_diagonal():
    full, causal = cost(), cost(causal=True)
    exact = sum(-(-(i + 1) * 128 // 64) for i in range(8)) * 8
    assert causal.tiles == exact and full.tiles / 2 < exact < full.tiles


def test_what_makes_it_slower():
    assert cost(resident=2, sizes=(8, 64, 1024, 1024)).seconds < cost(resident=1, sizes=(8, 64, 1024, 1024)).seconds
    assert cost(instruction="mma.sync").cycles["products"] == pytest.approx(1024 / model.SYNC_ON_HOPPER)
    assert cost(instruction="").cycles["products"] == 2 * 128 * 64 * 256 / model.FLOAT_FLOPS
    assert cost(instruction="mma.sync", capability=80).cycles["products"] == 2048.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", "4,16"], "--shape: '4,16' is not a list of 3 positive numbers"),
        (["--bm", "a"], "--bm: 'a' is not a list"),
        (["--kernel", "sideways"], "invalid choice"),
        (["--capability", "70"], "invalid choice"),
    ],
)
def test_bad_arguments_are_named(capsys, tmp_path, argv, message):
    with pytest.raises(SystemExit) as stop:
        tune_attention.main([*argv, "--out", str(tmp_path / "rows")])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_interpreted_kernels_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        tune_attention.main(["--out", str(tmp_path / "rows")])
    assert "cannot be compiled" in capsys.readouterr().err


def test_what_is_wrong_or_spills_comes_last():
    row = {"measured": None, "spilled": 0, "model": {"seconds": 2.0}, "check": None}
    fast = row | {"model": {"seconds": 1.0}}
    spills, wrong, failed = fast | {"spilled": 8}, fast | {"check": {"ok": False}}, fast | {"failed": "no"}
    assert sorted([failed, wrong, spills, row, fast], key=tune_attention._rank)[:3] == [fast, row, spills]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_one_command_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "fastseq.benchmarks.gpu.tune_attention",
        "--out",
        str(out),
        "--features",
        "64",
        "--capability",
        "80",
    ]
    command += ["--bm", "64", "--bn", "32", "--warps", "4", "--stages", "1,2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No GPU here" in done.stdout and "Nothing is measured" in done.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["kernel"], r["stages"]) for r in rows] == [(k, s) for k in tune_attention.KERNELS for s in (1, 2)]
    for row in rows:
        assert row["measured"] is None and row["registers"] > 0 and row["products"] == "mma.sync" and row["model"]["seconds"] > 0
