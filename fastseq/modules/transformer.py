"""``nn.TransformerEncoderLayer`` of which a pass, forward or backward, is one call of the CPU's library."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import backends
from ..backends import library
from ..ops._dispatch import PLAIN, plain_call
from ..ops._encoder_eager import Layer, encoder_layer
from ..ops._linear_eager import linear
from ..ops.types import Spec
from ._checks import public
from ._interop import Interop, as_leaf
from .attention import MultiheadAttention, hooked, warn_of_mixed

__all__ = ["TransformerEncoderLayer"]

_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "self_attn": (MultiheadAttention, nn.MultiheadAttention),
    "norm1": (nn.LayerNorm,),
    "norm2": (nn.LayerNorm,),
    "linear1": (nn.Linear,),
    "linear2": (nn.Linear,),
    **dict.fromkeys(("dropout", "dropout1", "dropout2"), (nn.Dropout, nn.Identity)),
}
_torch_sa_block: Any = nn.TransformerEncoderLayer._sa_block  # as torch has it, whatever `fastseq.patched` puts in its place


@public
class TransformerEncoderLayer(Interop, nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``: its constructor, parameters, ``state_dict``, ``forward`` and errors.

    An eager call on a CPU is one call of fastseq's library, and so are its gradients. Every other call is torch's forward, with
    fastseq's attention in it or, where torch has one, its own fused path (nested tensors, GPUs).
    A sequence that is all padding gives zeros for its attention, not NaN.

    Args:
        d_model: E, features of the input.
        nhead: number of heads, a divisor of E.
        dim_feedforward: width between the two linear layers.
        dropout: of attention's weights, of the feed-forward and of what each adds, in training.
        activation: "relu", "gelu" or a function.
        layer_norm_eps: of the layer norms.
        batch_first: sequences are [N, T, E].
        norm_first: norms come before attention and feed-forward, not after.
        bias: whether linear layers and norms have one.
        device, dtype: of the parameters.
    """

    __setattr__ = nn.Module.__setattr__  # quantization looks for its parts, which say for themselves what they are

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        if type(self.self_attn) is nn.MultiheadAttention:
            self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, shaped as ``src``.

        Args:
            src: [N, L, E] if ``batch_first``, else [L, N, E]; [L, E] without a batch; or a nested tensor.
            src_mask: [L, L] or [N * H, L, L]. bool: True hides; floating: added to the scores.
            src_key_padding_mask: [N, L] ([L] without a batch). bool: True hides a key; floating: added to the scores.
            is_causal: a promise that ``src_mask``, which must be given, is the causal mask.

        Raises:
            as ``torch.nn.TransformerEncoderLayer``.
        """
        if plain_call():
            out = self._in_one_call(src, src_mask, src_key_padding_mask, is_causal)
            if out is not None:
                warn_of_mixed(src_key_padding_mask, src_mask, "src_key_padding_mask and src_mask")
                return out
        if isinstance(src, Proxy):
            return as_leaf(self, src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal or None)
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    if TYPE_CHECKING:
        __call__ = forward

    def _ff_block(self, x: Tensor) -> Tensor:
        first, second = self._modules["linear1"], self._modules["linear2"]
        if not (plain_call() and _plain(first) and _plain(second) and type(x) in PLAIN and x.is_cpu) or library.reason():
            return super()._ff_block(x)
        hidden = self.dropout(self.activation(linear(x, *_parameters(first))))
        return self.dropout2(linear(hidden, *_parameters(second)))

    def _in_one_call(
        self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """None: the call is for another way, which also says what is wrong with it."""
        if type(src) not in PLAIN or src.is_nested:
            return None
        modules: dict[str, Any] = self._modules
        known, hooked_back = 0, False
        for name, module in modules.items():
            if module is None:
                continue
            own = module.__dict__
            # a scripted module does not say whether it trains; a forward may be replaced on the instance
            if "training" not in own or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return None
            if name in _KINDS:
                if type(module) not in _KINDS[name]:
                    return None
                known += 1
            hooked_back |= bool(own["_backward_hooks"] or own["_backward_pre_hooks"])
        kind, own = type(self), self.__dict__
        if known < len(_KINDS) or kind._sa_block is not _torch_sa_block or kind._ff_block is not _own_ff_block:
            return None
        if "_sa_block" in own or "_ff_block" in own:
            return None
        attention = modules["self_attn"]
        projection, norm1, norm2 = attention._modules["out_proj"], modules["norm1"], modules["norm2"]
        if type(projection) is not NonDynamicallyQuantizableLinear or hooked(projection):
            return None
        if norm1.eps != norm2.eps or attention.bias_k is not None or attention.add_zero_attn or library.reason():
            return None
        if self.activation is F.gelu or (type(self.activation) is nn.GELU and self.activation.approximate == "none"):
            gelu = True
        elif self.activation is F.relu or type(self.activation) is nn.ReLU:
            gelu = False
        else:
            return None
        parameters = [attention._parameters.get("in_proj_weight"), attention._parameters.get("in_proj_bias")]
        for module in (projection, norm1, norm2, modules["linear1"], modules["linear2"]):
            parameters += [module._parameters.get("weight"), module._parameters.get("bias")]
        masks = [mask for mask in (src_mask, src_key_padding_mask) if mask is not None]
        given = [src, *parameters, *masks]
        for tensor in given:
            if type(tensor) not in PLAIN or tensor.is_nested:
                return None
        gradients = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in given])
        dropouts = [attention.dropout if attention.training else 0.0]  # dropout alone may be in training
        dropouts += [_probability(modules[name]) for name in ("dropout1", "dropout", "dropout2")]
        if not any(dropouts):
            dropouts = []
        if gradients or dropouts:
            if type(attention) is not MultiheadAttention or hooked_back or backends.watched() or not src.is_cpu:
                return None
            if not all([0 <= p < 1 for p in dropouts]):
                return None
            if any([mask.requires_grad for mask in masks]):
                return None
        if src_key_padding_mask is not None and src_key_padding_mask.dim() != src.dim() - 1:
            return None
        steps = src.shape[1 if attention.batch_first and src.dim() == 3 else 0]
        if is_causal and (src_mask is None or tuple(src_mask.shape) != (steps, steps)):
            return None

        def meaning() -> Spec:
            batch, mask = src.numel() // (steps * src.shape[-1]), None if is_causal else src_mask
            hidden, added = attention._masks(src_key_padding_mask, mask, batch, (steps, steps), 0, src.dtype)
            return Spec(hidden, added, scale=attention.head_dim**-0.5, softcap=0.0, right=0 if is_causal else -1)

        rest = gelu, self.norm_first, norm1.eps, src_mask, src_key_padding_mask, attention.batch_first, is_causal, dropouts, None
        out = encoder_layer(src, parameters, Layer(attention.num_heads, *rest), gradients, meaning)
        if out is not None and backends.watched():
            backends.select(self._query(src, steps))
        return out

    def _query(self, src: Tensor, steps: int) -> backends.AttentionQuery:
        heads, features = self.self_attn.num_heads, self.self_attn.head_dim
        return backends.AttentionQuery(
            op="attention",
            call="forward",
            device=src.device,
            dtype=src.dtype,
            batch=src.numel() // (steps * src.shape[-1]),
            heads=(heads, heads),
            lengths=(steps, steps),
            features=(features, features),
            layout="padded",
            window=(-1, -1),
            offset=0,
            block_size=0,
            uses=(),
            gradients=(),
        )


_own_ff_block: Any = TransformerEncoderLayer._ff_block


def _parameters(module: Any) -> tuple[Tensor, Tensor | None]:
    return module._parameters["weight"], module._parameters["bias"]


def _probability(dropout: Any) -> float:
    return dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0


def _plain(module: Any) -> bool:
    """Whether a module does with its parameters what ``nn.Linear`` does, and nothing else."""
    if type(module) is not nn.Linear or hooked(module) or not module._parameters.keys() >= {"weight", "bias"}:
        return False
    return all([tensor is None or type(tensor) in PLAIN for tensor in _parameters(module)])
