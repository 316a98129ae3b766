"""``with context_parallel(mesh): model(x)``: what is inside is of the whole sequence, of which x is this rank's part."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._arguments import checked_int, checked_number, unknown
from ..ops._dispatch import share
from ._ranks import Own, Ranks, agree, known, make_known
from ._recurrences import Recurrences
from .attention import METHODS, Method, context_parallel_attention
from .sequence import Sharding, checked_sharding, unshard_sequence

__all__ = ["context_parallel"]


class _Inside:
    """A block once more, as often as somebody enters it, without what all ranks do at its ends."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(share(self.block))
        self._entered[-1].__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().__exit__(*raised)


def _check(method: Any, sharding: Any, micro_batches: Any) -> None:
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    checked_sharding(sharding)
    if checked_int("micro_batches", micro_batches) < 1:
        raise ValueError(f"micro_batches must be at least 1, got {micro_batches}")


class context_parallel(Recurrences):
    """A block in which ``fastseq.MultiheadAttention`` (in ``fastseq.TransformerEncoderLayer`` as well),
    ``fastseq.functional.attention`` and ``fastseq.functional.scaled_dot_product_attention`` are over the sequence that the ranks
    of ``mesh`` share, and in which recurrent modules, layers of linear recurrence, ``functional.recurrent`` (``lstm``, ``gru``,
    ``rnn``), ``functional.linear_recurrent`` and ``functional.scan`` hand their states from rank to rank; what works step by step
    (linear layers, norms, cells) needs no more.

    Args:
        mesh, method, sharding: as :func:`context_parallel_attention` takes them. Recurrence is for ``"contiguous"`` alone.
        micro_batches: M, of recurrent layers: into how many parts the rows of a batch are divided, so that ranks have more to do
            at the same time. L layers in one direction then take L * M + ranks - 1 rounds of B / M rows.

    Inside, masks have this rank's rows and the columns of the whole sequence; a ``key_padding_mask`` is this rank's part, as the
    keys are. ``need_weights`` must be False. Places that a model forms itself (position embeddings) are to be those of
    :func:`positions`. torch's own attention is not touched; its encoder layers' fused inference, which calls no module, is off.

    Of recurrence, input and ``resets`` are this rank's steps; ``hx``, ``reset_to`` and ``lengths``, of the whole sequence, are
    the same on every rank, and every rank is given the final states. A PackedSequence is a rank's part as :func:`shard_sequence`
    cuts it, with states of all sequences. Gradients are those of the sum of the ranks' losses: of the input a rank's own, whole;
    of parameters, hx and reset_to each rank's part, which :func:`sum_gradients` adds up, or DistributedDataParallel. All ranks
    must go backward; second derivatives are refused.

    A backward pass may come after the block, but what computes a part of the forward pass once more on the way back has to do so
    as inside: ``torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=block.checkpoint_contexts)`` with the
    block that ``with context_parallel(mesh) as block`` gives.

    All ranks enter and leave together, and an exception that a rank raises inside is raised on all of them: where they meet next,
    at an attention or at the end of the block.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`context_parallel_attention`, for these arguments.
    """

    def __init__(
        self,
        mesh: DeviceMesh | dist.ProcessGroup,
        *,
        method: Method = "ring",
        sharding: Sharding = "contiguous",
        micro_batches: int = 1,
    ) -> None:
        ranks, own = Ranks.of(mesh), Own()
        own.run(_check, method, sharding, micro_batches)
        if own.error is not None:  # the others are told when they enter
            own.settle(ranks)
        super().__init__(ranks, sharding, micro_batches)
        self.mesh, self.method = mesh, method
        self._entered: list[ExitStack] = []

    def __enter__(self) -> context_parallel:
        agree(self.ranks, {"call": "context_parallel", "method": self.method, "sharding": self.sharding})
        entered = ExitStack()
        entered.enter_context(share(self))
        entered.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        self._entered.append(entered)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._entered.pop().close()
        if error is None:
            agree(self.ranks, {"call": "the end of context_parallel"})
        elif isinstance(error, Exception) and not known(error, self.ranks):
            with suppress(Exception):  # it is this rank's own that goes on from here
                agree(self.ranks, {}, error=error)
            make_known(error, self.ranks)  # another block around this one need not tell them again

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For ``context_fn`` of ``torch.utils.checkpoint.checkpoint``: what is computed anew is so inside this block, wherever
        and in whatever thread its backward pass runs."""
        return nullcontext(), _Inside(self)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool, return_weights: Any, options: dict[str, Any]) -> Any:
        """``functional.attention``."""
        if return_weights:
            raise ValueError("return_weights is not available inside context_parallel: the weights are never formed")
        return context_parallel_attention(
            q, k, v, self.mesh, method=self.method, sharding=self.sharding, return_lse=return_lse, **options
        )

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        """``functional.scaled_dot_product_attention``."""
        if not 0 <= checked_number("dropout_p", dropout_p) <= 1:
            raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
        if attn_mask is not None and type(attn_mask) is not Tensor and not isinstance(attn_mask, torch.nn.Parameter):
            raise ValueError(f"inside context_parallel attn_mask must be a Tensor, not {type(attn_mask).__name__}: use is_causal")
        if is_causal and attn_mask is not None:
            raise RuntimeError("attn_mask and is_causal exclude each other: put the causal part into attn_mask")
        leading = query.shape[:-2]
        if min(query.dim(), key.dim(), value.dim()) < 3 or not query.dim() == key.dim() == value.dim():
            raise RuntimeError(
                f"inside context_parallel query, key and value must be [.., H, T, E], got {list(query.shape)}, {list(key.shape)} "
                f"and {list(value.shape)}"
            )
        heads = key.shape[-3]
        if query.shape[-3] != heads and not enable_gqa:
            raise RuntimeError(f"query has {query.shape[-3]} heads, key and value {heads}: give enable_gqa=True if that is meant")
        q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (query, key, value))
        options: dict[str, Any] = {"causal": is_causal, "dropout_p": dropout_p, "scale": scale, "alignment": "top_left"}
        if attn_mask is not None:
            if attn_mask.dim() == query.dim() > 4:
                attn_mask = attn_mask.expand(*leading[:-1], *attn_mask.shape[-3:]).reshape(-1, *attn_mask.shape[-3:])
            options["attn_mask" if attn_mask.dtype == torch.bool else "attn_bias"] = attn_mask
        out = self.attention(q, k, v, False, False, {"layout": "bhsd", **options})
        return out.reshape(*leading, *out.shape[-2:])

    def multihead_attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, None]:
        """``MultiheadAttention.forward``; tensors are not nested, and of one number of dimensions."""
        if need_weights:
            raise ValueError("need_weights must be False inside context_parallel: the weights are never formed")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError(
                "add_bias_kv and add_zero_attn do not go with context_parallel: every rank would append its own keys"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which must be given with it")
        batched = query.dim() == 3
        if not batched:
            q = query.unsqueeze(1)
            k = q if key is query else key.unsqueeze(1)
            query, key, value = q, k, q if value is query else k if value is key else value.unsqueeze(1)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        batch_dim, time_dim = (0, 1) if batched and module.batch_first else (1, 0)
        q, k, v = module._project(query, key, value, batch_dim)
        if key_padding_mask is not None:
            key_padding_mask = unshard_sequence(key_padding_mask, self.mesh, dim=1, sharding=self.sharding)
        sizes = query.shape[time_dim], key.shape[time_dim]
        mask, bias = module._masks(key_padding_mask, None if is_causal else attn_mask, q.shape[0], sizes, 0, q.dtype)
        options: dict[str, Any] = {"attn_mask": mask, "attn_bias": bias, "causal": is_causal, "alignment": "top_left"}
        options |= {"dropout_p": module.dropout if module.training else 0.0, "scale": module.head_dim**-0.5, "layout": "bhsd"}
        out = self.attention(q, k, v, False, False, options)
        out = module.out_proj((out.transpose(1, 2) if batch_dim == 0 else out.permute(2, 0, 1, 3)).flatten(-2))
        return out if batched else out.squeeze(1), None
