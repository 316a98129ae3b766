"""What mypy says of the functions; `test_typing.py` runs it. `# E: ...` is the error of a line, `# R: ...` what it reveals."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import reveal_type

import fastseq
from fastseq.functional import (
    attention,
    attention_grad,
    attention_with_kv_cache,
    gru,
    lstm,
    merge_attention,
    scaled_dot_product_attention,
    transformer_xl_attention,
)


def fused(q: Tensor, weights: bool) -> None:
    reveal_type(attention(q, q, q, causal=True, window_size=(3, None), alignment="top_left"))  # R: Tensor
    reveal_type(attention(q, q, q, return_lse=True))  # R: tuple[Tensor, Tensor]
    reveal_type(attention(q, q, q, return_weights="average"))  # R: tuple[Tensor, Tensor]
    reveal_type(attention(q, q, q, return_lse=True, return_weights=True))  # R: tuple[Tensor, Tensor, Tensor]
    reveal_type(attention(q, q, q, return_weights=weights))  # R: Any
    reveal_type(transformer_xl_attention(q, q, q, q, q, q, attn_mask=q))  # R: Tensor
    reveal_type(attention_grad(q, q, q, q, q, q, offset=3))  # R: tuple[Tensor, Tensor, Tensor]
    reveal_type(merge_attention(q, q, q, q, layout="thd"))  # R: tuple[Tensor, Tensor]
    reveal_type(scaled_dot_product_attention(q, q, q, is_causal=True))  # R: Tensor
    attention(q, q, q, window=(3, 0))  # E: call-overload
    attention(q, q, q, causal="bottom_right")  # E: call-overload
    attention(q, q, q, window_size=4)  # E: call-overload
    attention(q, q, q, layout="bhte")  # E: call-overload
    attention_grad(q, q, q, q, q, q, shift=3)  # E: call-arg


def cached(q: Tensor, lengths: Tensor) -> None:
    reveal_type(attention_with_kv_cache(q, q, q, cache_seqlens=lengths))  # R: Tensor
    reveal_type(attention_with_kv_cache(q, q, q, cache_seqlens=lengths, return_lse=True))  # R: tuple[Tensor, Tensor]
    attention_with_kv_cache(q, q, q, lengths=lengths)  # E: call-overload
    attention_with_kv_cache(q, q, q, cache_seqlens=lengths, num_splits="two")  # E: call-overload


def recurrent(x: Tensor, params: list[Tensor]) -> None:
    reveal_type(lstm(x, (x, x), params))  # R: tuple[Tensor, Tensor, Tensor]
    reveal_type(lstm(x, None, params, return_cells=True))  # R: tuple[Tensor, Tensor, Tensor, Tensor]
    reveal_type(gru(x, None, params))  # R: tuple[Tensor, Tensor]
    lstm(x, x, params)  # E: call-overload
    gru(x, None, params, layers=2)  # E: call-arg


def reports(model: fastseq.LSTM) -> None:
    report: fastseq.Report = fastseq.convert(model)
    explanation: fastseq.Explanation = fastseq.explain(model)
    reveal_type(report.converted[0].backend)  # R: str | None
    reveal_type(report.converted[0].choice)  # R: str
    tuned: fastseq.TuneReport = fastseq.tune(model, (), training=False)
    reveal_type(tuned.rows[0].speedup)  # R: float | None
    fastseq.tune(model, (), minutes=2)  # E: call-arg
    fastseq.set_backend("cpu")
    fastseq.set_backend(3)  # E: arg-type
    reveal_type(explanation.backends)  # R: list[str]
