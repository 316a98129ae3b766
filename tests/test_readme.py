"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastseq

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def hugging_face_model() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
    return transformers.BertModel(transformers.BertConfig(**sizes))


def names(block: str) -> dict[str, Any]:
    """What a block takes for granted."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=16, batch_first=True)
    given: dict[str, Any] = {
        "fastseq": fastseq,
        "torch": torch,
        "model": nn.LSTM(128, 8, batch_first=True),
        "encoder": nn.TransformerEncoder(layer, 1),
        "x": torch.randn(2, 12, 128),
        "lengths": torch.tensor([12, 7]),
        "starts": torch.rand(2, 12) < 0.2,
        "x_t": torch.randn(2, 128),
        "rows": torch.randn(19, 128),
        "ends": torch.tensor([0, 12, 19]),
        "padding": torch.zeros(2, 12, dtype=torch.bool),
        "q": torch.randn(2, 4, 12, 8),
        "k": torch.randn(2, 2, 12, 8),
        "v": torch.randn(2, 2, 12, 8),
        "bias": torch.randn(4, 12, 12, requires_grad=True),
        "slopes": torch.rand(4),
        "packed_q": torch.randn(19, 4, 8),
        "packed_k": torch.randn(19, 2, 8),
        "packed_v": torch.randn(19, 2, 8),
        "cu_seqlens": torch.tensor([0, 12, 19]),
    }
    if "recurrent_ppo" in block:
        sb3_contrib = pytest.importorskip("sb3_contrib", reason="needs sb3-contrib")
        given["recurrent_ppo"] = sb3_contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    if "hugging_face_model" in block:
        given["hugging_face_model"] = hugging_face_model()
    return given


def test_there_are_blocks():
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0][:50])
def test_block_runs(block):
    given = names(block)
    exec(compile(block, str(README), "exec"), given)
    if "set_attn_implementation" in block:
        model = given["hugging_face_model"].eval()
        assert "attention forward" in str(fastseq.explain(model, torch.ones(1, 3, dtype=torch.long)))
    if "fastseq.convert(encoder)" in block:
        assert isinstance(given["encoder"].layers[0].self_attn, fastseq.MultiheadAttention)
        torch.testing.assert_close(given["y"], given["mha"](given["x"], given["x"], given["x"])[0])
