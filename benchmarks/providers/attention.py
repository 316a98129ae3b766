"""The programs that compute a case of attention: torch's and its backends, FlexAttention, flash-attn, Reformer's, fastseq.

Masks and bucket indices that hold no gradient are built before the clock starts, for torch and FlexAttention as for fastseq: a
model builds them once for all its layers. What carries a gradient (a bias from its table, Transformer-XL's term) is built inside,
and so is the bias that ALiBi's slopes make: it is what a kernel with slopes saves.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..workloads.attention import CASES, AttentionWorkload, Bound, Program, Tensors, leaves_of
from ..workloads.attention_textbook import (
    BUCKETS,
    CAP,
    MAX_DISTANCE,
    alibi_bias,
    blocks_seen,
    positions,
    t5_buckets,
    valid_keys,
    visible,
)
from ..workloads.base import Workload
from ..workloads.hashed import HASHED, reformer, reformer_missing
from .base import Provider

ON_QKV = tuple(name for name, case in CASES.items() if not (case.module or case.hashed))
ON_SDPA = tuple(name for name in ON_QKV if name != "softcap")
ON_X = tuple(name for name, case in CASES.items() if case.module)


def _only(functions: tuple[str, ...], reason: Callable[[AttentionWorkload], str | None]) -> Callable[[Workload], str | None]:
    def unavailable(w: Workload) -> str | None:
        assert isinstance(w, AttentionWorkload)
        return reason(w) if w.function in functions else f"has nothing for {CASES[w.function].title}"

    return unavailable


def _chose(call: Any) -> list[str]:
    return call.chose()


def _provider(
    name: str, build: Program, unavailable: Callable[[Workload], str | None], color: str, dashed: bool = False
) -> Provider:
    return Provider(name, "attention alone", "", lambda w: build, unavailable, _chose, color, dashed)


def _sdpa_call(w: AttentionWorkload, device: torch.device) -> Callable[..., Tensor]:
    """F.scaled_dot_product_attention on a case's tensors, in the way that is best for torch. Also: what it is called with."""
    seen = None
    is_causal = w.causal and w.function == "dense"
    if not is_causal:
        seen = visible(w, device)
    buckets = t5_buckets(w.T, w.S, device) if w.function == "t5" else None

    def call(run: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **more: Tensor) -> Any:
        mask = seen
        if w.function == "transformer-xl":
            q, mask = positions(w, q, **more)
        elif w.function == "bias":
            mask = more["bias"]
        elif w.function == "alibi":
            mask = alibi_bias(w, more["slopes"])
        elif buckets is not None:
            mask = F.embedding(buckets, more["table"]).permute(2, 0, 1)[None]
        if seen is not None and mask is not None and mask is not seen:
            mask = mask.masked_fill(~seen, -torch.inf)
        return run(q, k, v, mask, 0.0, is_causal, scale=None, enable_gqa=w.G != w.heads)

    return call


def _sdpa(backend: SDPBackend | None) -> Program:
    def program(w: AttentionWorkload, tensors: Tensors) -> Bound:
        call = _sdpa_call(w, tensors["q"].device)

        def run() -> Tensor:
            if backend is None:
                return call(F.scaled_dot_product_attention, **tensors)
            with sdpa_kernel([backend]):
                return call(F.scaled_dot_product_attention, **tensors)

        def chose() -> list[str]:
            return [SDPBackend(call(torch._fused_sdp_choice, **tensors)).name if backend is None else backend.name]

        return Bound(run, leaves_of(w, tensors), chose)

    return program


def _sdpa_refuses(backend: SDPBackend, w: AttentionWorkload) -> str | None:
    """torch's own words, from a call of this very shape; None: it accepts it."""
    operands = CASES[w.function].operands(w)
    gradients = w.mode != "inference"
    tensors = {
        name: torch.zeros(t.shape, device=w.device, dtype=w.torch_dtype).requires_grad_(gradients and t.gradient)
        for name, t in operands.items()
    }
    with w.settings(), warnings.catch_warnings(record=True) as said, torch.inference_mode(not gradients):
        warnings.simplefilter("always")
        try:
            _sdpa(backend)(w, tensors).run()
        except torch.OutOfMemoryError:
            return "runs out of memory"
        except RuntimeError as error:
            if not str(error).startswith(("No viable backend", "No available kernel")):
                return None  # a failure, not a refusal: the check reports it
            words = [str(w.message).partition(" (Triggered")[0] for w in said]
            reasons = [word for word in words if "not used because" not in word and "not been" not in word]
            return f"torch refuses: {'; '.join(reasons[:2]) or str(error).partition(' This')[0]}"
    return None


def _flex_missing(w: AttentionWorkload) -> str | None:
    if not w.device.startswith("cuda"):
        return "compiled on a GPU only here: on the CPU it has no backward, and uncompiled it is no contestant"
    return "its deterministic mode excludes captured gradients" if w.deterministic and CASES[w.function].learned else None


def flex_call(w: AttentionWorkload, tensors: Tensors, attention: Callable[..., Any]) -> Tensor:
    """A case through FlexAttention; `attention` is flex_attention, compiled or not, with its block mask already given."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    more = {name: t for name, t in tensors.items() if name not in ("q", "k", "v")}
    modify: Callable[..., Tensor] | None = None  # these capture tensors and numbers only: they are compiled
    if w.function == "bias":
        bias = more["bias"][0]

        def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[h, i, j]

    elif w.function == "t5":
        earlier, later = t5_buckets(w.T, 1, q.device)[1:, 0].flip(0), t5_buckets(1, w.S, q.device)[0]
        table = F.embedding(torch.cat((earlier, later)), more["table"]).T  # [H, T - 1 + S], distances from 1 - T on
        zero = w.T - 1

        def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[h, j - i + zero]

    elif w.function == "alibi":
        slopes = more["slopes"]

        def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slopes[h] * (j - i).abs()

    elif w.function == "softcap":

        def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return CAP * torch.tanh(score / CAP)

    elif w.function == "transformer-xl":
        q, term = positions(w, q, **more)

        def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + term[b, h, i, j]

    return attention(q, k, v, score_mod=modify, enable_gqa=w.G != w.heads)


def flex_mask(w: AttentionWorkload, device: torch.device) -> Any:
    """The BlockMask of a case; None where every key is seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not (w.causal or w.window or w.block):
        return None
    window, block = w.window or w.S, w.block or 1
    layout = blocks_seen(w).to(device) if w.block else torch.ones(1, 1, dtype=torch.bool, device=device)

    def see(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - window)

    def see_blocks(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & layout[i // block, j // block]

    def see_band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j - i).abs() <= window

    seen = see_band if w.function == "band" else see_blocks if w.block else see
    return create_block_mask(seen, None, None, w.T, w.S, device=device)


def _flex(w: AttentionWorkload, tensors: Tensors) -> Bound:
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import flex_attention

    functorch.donated_buffer = False  # else its graph cannot be gone through twice, as timing the backward alone does
    torch._dynamo.reset()  # each shape a program of its own, as in a model that has one
    compiled = partial(torch.compile(flex_attention, dynamic=False), block_mask=flex_mask(w, tensors["q"].device))
    return Bound(partial(flex_call, w, tensors, compiled), leaves_of(w, tensors))


def _flex_on_cpu_missing(w: AttentionWorkload) -> str | None:
    if w.device != "cpu" or w.mode != "inference":
        return "is FlexAttention on a CPU, which has no backward there"
    return None if cpp_compiler() else "needs a C++ compiler"


def cpp_compiler() -> str | None:
    """What torch.compile calls for a CPU."""
    return next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None)


def _flash_missing(w: AttentionWorkload) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if not w.device.startswith("cuda") or w.dtype not in ("float16", "bfloat16") or w.E > 256:
        return "flash-attn takes fp16 and bf16 on a GPU, up to 256 features"
    return None


def _flash(w: AttentionWorkload, tensors: Tensors) -> Bound:
    library = importlib.import_module("flash_attn")
    if w.function == "decode":

        def run() -> Tensor:
            q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
            return library.flash_attn_with_kvcache(q, k, v, cache_seqlens=w.S).transpose(1, 2)
    else:
        window = (w.window - 1, 0) if w.window else (-1, -1)

        def run() -> Tensor:
            q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
            causal = w.causal or bool(w.window)
            out = library.flash_attn_func(q, k, v, causal=causal, window_size=window, deterministic=w.deterministic)
            return out.transpose(1, 2)

    return Bound(run, leaves_of(w, tensors), lambda: [f"flash-attn {library.__version__}"])


def _fastseq_missing(*names: str) -> Callable[[AttentionWorkload], str | None]:
    def reason(w: AttentionWorkload) -> str | None:
        needed = {"decode": ["functional.attention_with_kv_cache"], "t5": ["functional.t5_relative_bias"]}.get(w.function, [])
        for name in [*names, *needed]:
            found: Any = importlib.import_module("fastseq")
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is None:
                return f"fastseq.{name} does not exist here"
        return None

    return reason


def _explained(run: Callable[[], Any]) -> Callable[[], list[str]]:
    return lambda: [f"backend: {b}" for b in sorted(set(importlib.import_module("fastseq").explain(run).backends))]


def _fastseq(w: AttentionWorkload, tensors: Tensors) -> Bound:
    functional = importlib.import_module("fastseq.functional")
    attention = functional.attention
    blocks = blocks_seen(w)[None, None].to(tensors["q"].device) if w.block else None
    lengths = torch.full((w.B,), w.S, dtype=torch.int32, device=tensors["q"].device)
    slopes = tensors["slopes"].float() if w.function == "alibi" else None

    def run() -> Tensor:
        q, k, v, *more = tensors.values()
        if w.function == "decode":
            return functional.attention_with_kv_cache(q, k, v, cache_seqlens=lengths)
        if w.function == "bias":
            return attention(q, k, v, attn_bias=more[0])
        if w.function == "t5":
            sizes = {"bidirectional": True, "num_buckets": BUCKETS, "max_distance": MAX_DISTANCE}
            table, zero = functional.t5_relative_bias(more[0], w.T, w.S, **sizes)
            return attention(q, k, v, relative_bias=table, relative_bias_zero=zero)
        if w.function == "transformer-xl":
            u, p, r = more
            relative = {"relative_query": q + p[:, None], "relative_key": r, "relative_key_zero": w.S - 1}
            return attention(q + u[:, None], k, v, causal=True, **relative)
        if w.function == "window":
            return attention(q, k, v, window_size=(w.window - 1, 0))
        if w.function == "band":
            return attention(q, k, v, window_size=(w.window, w.window))
        if w.function == "alibi":
            return attention(q, k, v, alibi_slopes=slopes)
        if w.function == "softcap":
            return attention(q, k, v, softcap=CAP)
        if w.function == "blocks":
            return attention(q, k, v, causal=w.causal, block_layout=blocks, block_size=w.block)
        return attention(q, k, v, causal=w.causal)

    return Bound(run, leaves_of(w, tensors), _explained(run))


def _multihead(cls: Callable[[], type[nn.Module]], chose: Callable[..., Callable[[], list[str]]]) -> Program:
    """A MultiheadAttention with a case's parameters; its masks are prepared, as a model does once for all its layers."""

    def program(w: AttentionWorkload, tensors: Tensors) -> Bound:
        x = tensors["x"]
        module = cls()(w.H, w.heads, batch_first=True, device=x.device, dtype=x.dtype).train(w.mode != "inference")
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        masks: dict[str, Any] = {}
        if w.function == "padding":
            hidden = ~torch.ones(w.T, w.T, dtype=torch.bool, device=x.device).tril()
            masks = {"key_padding_mask": ~valid_keys(w, tensors["lengths"]), "attn_mask": hidden, "is_causal": True}

        def run() -> tuple[Tensor, Tensor | None]:
            return module(x, x, x, need_weights=w.function == "weights", **masks)

        return Bound(run, leaves_of(w, {"x": x}) | (parameters if x.requires_grad else {}), chose(run))

    return program


def _eager(w: AttentionWorkload, tensors: Tensors) -> Bound:
    return CASES[w.function].eager(w, tensors)


EAGER, SDPA, FLEX, FLASH, OWN = "eager attention", "torch SDPA", "FlexAttention", "flash-attn", "fastseq.attention"
FLEX_ON_CPU, MATH = "FlexAttention (compiled for a CPU)", "torch SDPA (math)"
FORCED = {
    "torch SDPA (cudnn)": (SDPBackend.CUDNN_ATTENTION, "#5f9447"),
    "torch SDPA (flash)": (SDPBackend.FLASH_ATTENTION, "#b97d00"),
    "torch SDPA (efficient)": (SDPBackend.EFFICIENT_ATTENTION, "#c454b8"),
    MATH: (SDPBackend.MATH, "#7c889e"),
}
REFORMER = "Reformer (transformers)"
TORCH_MODULE, OWN_MODULE = "torch.nn.MultiheadAttention", "fastseq.MultiheadAttention"

ATTENTION_PROVIDERS = {
    p.name: p
    for p in (
        _provider(EAGER, _eager, _only(ON_QKV, lambda w: None), "#7c889e", True),
        _provider(SDPA, _sdpa(None), _only(ON_SDPA, lambda w: None), "#d1495b"),
        *(
            _provider(name, _sdpa(backend), _only(ON_SDPA, partial(_sdpa_refuses, backend)), color, True)
            for name, (backend, color) in FORCED.items()
        ),
        _provider(FLEX, _flex, _only(ON_QKV, _flex_missing), "#0f9a72"),
        _provider(FLEX_ON_CPU, _flex, _only(ON_QKV, _flex_on_cpu_missing), "#0f9a72", True),
        _provider(FLASH, _flash, _only(("dense", "window", "decode"), _flash_missing), "#888888"),
        _provider(REFORMER, reformer, _only((HASHED,), reformer_missing), "#009e73"),
        _provider(OWN, _fastseq, _only(ON_QKV, _fastseq_missing("functional.attention")), "#1e88e5"),
        _provider(
            TORCH_MODULE, _multihead(lambda: nn.MultiheadAttention, lambda run: list), _only(ON_X, lambda w: None), "#d1495b"
        ),
        _provider(
            OWN_MODULE,
            _multihead(lambda: importlib.import_module("fastseq").MultiheadAttention, _explained),
            _only(ON_X, _fastseq_missing("MultiheadAttention")),
            "#1e88e5",
        ),
    )
}
