"""Attention whose sequence lies on several ranks, each with its part of the queries and of the keys.

Three ways, which compute the same:

============  =====================================================  ========================================================
ring          keys and values go round, chunk by chunk, while the    what a rank holds and sends is that of its part; any
              chunk before is used; results are merged by their lse  feature
all_gather    a rank asks the others for the keys that the windows   few merges forward, or none; for windows that reach few
              of its queries reach, two ranks' at once               ranks, and for short sequences
all_to_all    heads are exchanged for steps: a rank has all steps    least traffic, whole kernels; the ranks share the heads,
              of some heads                                          so there must be as many
============  =====================================================  ========================================================

Backward, dK and dV follow their chunk round the ring and go home from its last stop, or go back the way the keys came.
Everything is summed in a fixed order, in fp32 (fp64 for fp64), so reruns give the same bits.

Letters: n ranks, t steps (packed: rows) of a rank, T of all; B, Hq, Hkv, E, Ev as in ``functional.attention``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Unpack

from .._arguments import checked_tensor, unknown
from ..functional._attention_call import (
    AttentionOptions,
    Options,
    checked_layout,
    heads_first,
    onto_scores,
    prepared,
    rows,
    takes_options,
)
from ..functional._autocast import autocast_dtype, lowered
from ..ops import attention as ops
from ..ops._attention_eager import random_seed
from ..ops._dispatch import transforming
from ..ops.types import GRADIENTS, Spec, empty_rows, state_dtype
from ..reference.attention import Gradients
from . import _exchange
from ._exchange import Pair, once_round, swap, trade
from ._parts import Held, Part, Whole, held
from ._ranks import Own, Ranks, common_turn, own_turn, require_plain
from .sequence import Run, Sharding, checked_sharding, held_runs, size_of

__all__ = ["context_parallel_attention"]

Method = Literal["ring", "all_gather", "all_to_all"]
METHODS = ("ring", "all_gather", "all_to_all")
_ROWWISE = ("attn_mask", "attn_bias")
_SHARED = ("alibi_slopes", "relative_bias", "relative_key", "sinks", "block_layout")  # that every rank has alike
Use = Callable[[Held, Pair], Pair | None]
Home = Callable[[Held, Pair], None]
_VALUES = ("cu_seqlens_q", "cu_seqlens_k", "seqlens_q", "seqlens_k")


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    method: Method = "ring",
    sharding: Sharding = "contiguous",
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    method: Method = "ring",
    sharding: Sharding = "contiguous",
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> Any: ...


@takes_options()
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    method: Method = "ring",
    sharding: Sharding = "contiguous",
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Any:
    """:func:`fastseq.functional.attention` over a sequence that the ranks of ``mesh`` share: each gives and gets its own part.

    All ranks call it together, and run its backward pass together, with results in the same order. Places, lengths and
    ``alignment`` are those of the whole sequence.

    Args:
        q, k, v: this rank's t of the T steps, shapes as in one process; parts may differ in length and be empty.
            Packed: its rows of the N of all sequences, which may cross from rank to rank.
        mesh: one dimension of a mesh, such as ``mesh["context"]``, or a process group.
        method: ``"ring"``: keys and values go round; ``"all_gather"``: they come from the ranks that a window reaches;
            ``"all_to_all"``: heads are exchanged for steps.
        sharding: which steps a rank holds: ``"contiguous"``, or ``"zigzag"`` as :func:`shard_sequence` cuts, which balances
            causal attention.
        return_lse: also return the lse, ``[B, Hq, t]`` or packed ``[Hq, n]``.
        options: as :func:`fastseq.functional.attention` takes them, with the same values on every rank, but for

            * ``attn_mask``, ``attn_bias``: this rank's rows of all columns, ``[.., t, T]``, columns in the order of the whole;
            * ``relative_query``: as q.

            ``cu_seqlens``, ``seqlens``, ``block_layout`` and the tables are those of the whole. ``dropout_p`` drops the weights
            that a single process with the first rank's generator would drop, whatever the number of ranks.

    Gradients of q, k, v, ``relative_query`` and the rows of ``attn_bias`` are those of this rank's part. Those of ``sinks``,
    ``relative_bias``, ``relative_key`` and a bias that all rows share are this rank's shares, as those of any parameter that all
    ranks have: their sum over the ranks is the gradient. There is no second derivative.

    Returns:
        ``out`` as q, with Ev features; or ``(out, lse)``.

    Nested tensors are refused: give packed sequences.

    Raises on every rank, before anything but a few integers is exchanged:
        as :func:`fastseq.functional.attention`;
        RuntimeError: if ranks differ in arguments, dtypes or shapes, or parts are not those of ``sharding``.
        ValueError: for a method that cannot do what is asked, with the one that can.
        NotImplementedError: for a second derivative, or within a transform (vmap, jvp).
    """
    ranks, own = Ranks.of(mesh), Own()
    local = own.run(_Local, q, k, v, Options(**options), method, sharding)
    facts: dict[str, object] = {"call": "attention"}
    numbers = [0] * 4
    if local is not None:
        facts |= local.facts()
        numbers = [local.q.shape[-2], local.k.shape[-2], local.drawn, own_turn(ranks)]
    told = own.settle(ranks, facts, numbers)
    assert local is not None
    turn = common_turn(ranks, [t[3] for t in told])
    call = local.call(ranks, turn, [t[0] for t in told], [t[1] for t in told], told[0][2])
    out, lse = _ContextParallel.apply(call, local.q, local.k, local.v, *call.spec[: ops.TENSORS])
    if call.whole.packed:
        out = out.transpose(0, 1)
    elif local.layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


class _Local:
    """What this rank was given, checked as far as it can be without the others."""

    def __init__(self, q: Any, k: Any, v: Any, given: Options, method: Any, sharding: Any) -> None:
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
        self.method, self.sharding, self.given = method, checked_sharding(sharding), given
        if transforming():
            raise NotImplementedError("context-parallel attention goes with no transform (vmap, jvp, torch.func)")
        packed = given.cu_seqlens_q is not None or given.cu_seqlens_k is not None
        self.layout = checked_layout(given.layout, packed)
        named = {"q": q, "k": k, "v": v, "relative_query": given.relative_query}
        for name, tensor in named.items():
            if tensor is None and name == "relative_query":
                continue
            if checked_tensor(name, tensor).is_nested:
                raise ValueError(f"{name} is a nested tensor: give packed sequences, with cu_seqlens")
            require_plain(tensor, name)
        lower = autocast_dtype(q.device.type)
        self.q, self.k, self.v = (rows(heads_first(n, lowered(named[n], lower), self.layout)) for n in "qkv")
        if self.k.shape[-2] != self.v.shape[-2]:
            raise RuntimeError(f"k and v must agree in length, got {self.k.shape[-2]} and {self.v.shape[-2]}")
        self.relative_q = None
        if given.relative_query is not None:
            self.relative_q = rows(heads_first("relative_query", lowered(given.relative_query, lower), self.layout))
            if self.relative_q.shape != self.q.shape:
                raise RuntimeError("relative_query must have the shape of q")
        self.rowwise = {name: lowered(getattr(given, name), lower) for name in _ROWWISE}
        self.own_rows = {name: self._own_rows(name) for name in _ROWWISE}
        self.drawn = 0
        if given.dropout_p:
            self.drawn = int(random_seed(q.device))

    def _own_rows(self, name: str) -> bool:
        """Whether a mask or bias has a row for each query of this rank."""
        tensor, t = self.rowwise[name], self.q.shape[-2]
        if tensor is None:
            return False
        if checked_tensor(name, tensor).dim() < 2 or tensor.shape[-2] not in (1, t):
            raise RuntimeError(f"{name} must hold this rank's rows, [.., {t} or 1, T], got {list(tensor.shape)}")
        if self.method == "all_to_all" and (tensor.shape[-2] != 1 or t == 1):
            raise ValueError(
                f"method='all_to_all' has all queries on every rank, for which {name} would be needed whole, [.., T, T]; "
                "method='ring' takes each rank's rows of it"
            )
        return tensor.shape[-2] == t

    def facts(self) -> dict[str, object]:
        """What must be the same on every rank."""
        facts: dict[str, object] = {"method": self.method, "sharding": self.sharding}
        of = {"q": self.q, "k": self.k, "v": self.v}
        facts |= {f"the shape of {name} but for steps": [*t.shape[:-2], t.shape[-1]] for name, t in of.items()}
        facts |= {f"the dtype of {name}": t.dtype for name, t in of.items()}
        facts |= {f"the device of {name}": t.device.type for name, t in of.items()}
        if self.relative_q is not None:
            of["relative_query"] = self.relative_q
        grad = torch.is_grad_enabled()
        facts |= {f"whether {name} wants a gradient": grad and t.requires_grad for name, t in of.items()}
        for field in fields(Options):
            value = getattr(self.given, field.name)
            if field.name in _ROWWISE:
                tensor = self.rowwise[field.name]
                value = None if tensor is None else (tensor.dtype, tensor.device.type, *tensor.shape[:-2], tensor.shape[-1])
            elif isinstance(value, Tensor):
                if field.name in _VALUES and (field.name.startswith("cu") or value.is_cpu):
                    value = (value.dtype, value.device.type, value.tolist())
                elif field.name == "relative_query":
                    value = value.dtype
                else:
                    value = (value.dtype, value.device.type, *value.shape, grad and value.requires_grad)
            facts[field.name] = value
        return facts

    def call(self, ranks: Ranks, turn: int, tq: Sequence[int], tk: Sequence[int], seed: int) -> _Call:
        """The call, checked as the one of a single process would be, on stand-ins for what the other ranks have."""
        all_q, all_k = sum(tq), sum(tk)
        q_runs, k_runs = held_runs(tq, self.sharding), held_runs(tk, self.sharding)
        packed = self.layout == "thd"

        def stand_in(tensor: Tensor, steps: int) -> Tensor:
            shape = (*tensor.shape[:-2], steps, tensor.shape[-1])
            whole = tensor.new_empty(tensor.shape[-1]).expand(shape)  # no memory but a row's
            return whole.transpose(0, 1) if packed else whole

        given = replace(self.given, layout="thd" if packed else "bhsd")
        given.relative_query = None if self.relative_q is None else stand_in(self.relative_q, all_q)
        for name, tensor in self.rowwise.items():
            if tensor is not None:
                tall = tensor.shape[-2] if not self.own_rows[name] or all_q == tq[ranks.rank] else all_q
                shape = (*tensor.shape[:-2], tall, tensor.shape[-1])
                setattr(given, name, tensor.new_empty(tensor.shape[-1]).expand(shape))
        spec = prepared(stand_in(self.q, all_q), stand_in(self.k, all_k), stand_in(self.v, all_k), given).spec
        batch = spec.cu_q.shape[0] - 1 if spec.cu_q is not None else self.q.shape[0]
        scores = (batch, self.q.shape[-3], self.q.shape[-2], all_k)
        mask, bias = (None if t is None else onto_scores(name, t, scores) for name, t in self.rowwise.items())
        spec = spec._replace(mask=mask, bias=bias, relative_q=self.relative_q)
        if spec.dropout:
            spec = spec._replace(seed=torch.tensor([seed], dtype=torch.int64, device=self.q.device))
        whole = Whole(spec, all_q, all_k, batch, self.q.shape[-3])
        kind = {"ring": _Ring, "all_gather": _Gather, "all_to_all": _Heads}[self.method]
        return kind(ranks, turn, whole, q_runs, k_runs, self.q, self.k, self.v)


_NO_TENSORS: dict[str, Any] = dict.fromkeys(Spec._fields[: ops.TENSORS])


class _ContextParallel(torch.autograd.Function):
    """out and lse, heads first."""

    @staticmethod
    def forward(ctx, call, q, k, v, *tensors):
        own = Own()
        with ops._plain_dtypes(q):
            out, lse, saved = call.forward(q, k, v, own)
        own.settle(call.ranks, {"call": f"the end of attention, number {call.turn}"})
        ctx.call, ctx.count = call, len(saved)
        ctx.save_for_backward(*saved, *tensors)
        call.whole.spec = call.spec._replace(**_NO_TENSORS)  # autograd has the tensors
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        call, own = ctx.call, Own()
        if torch.is_grad_enabled():
            own.error = NotImplementedError(
                "attention over several ranks has no second derivative (create_graph=True); fastseq.functional.attention has"
            )
        told = own.settle(call.ranks, {"call": f"backward of attention, number {call.turn}"}, [dlse is not None])
        every = ctx.saved_tensors  # once: torch's checkpoint computes them anew for that
        saved, tensors = every[: ctx.count], every[ctx.count :]
        call.whole.spec = Spec(*tensors, *call.spec[ops.TENSORS :])
        needs = ctx.needs_input_grad[1:]
        wanted = [needs[i] for i in ops._PLACES]
        with ops._plain_dtypes(saved[0]):
            grads, of_sinks = call.backward(dout, dlse, any(t[0] for t in told), saved, wanted, needs[3 + ops._SINKS], own)
        own.settle(call.ranks, {"call": f"the end of backward of attention, number {call.turn}"})
        call.whole.spec = call.spec._replace(**_NO_TENSORS)
        results: list[Tensor | None] = [None] * (3 + ops.FIELDS)
        for place, grad, want in zip(ops._PLACES, grads, wanted, strict=True):
            results[place] = grad if want else None
        results[3 + ops._SINKS] = of_sinks
        return None, *results[: 3 + ops.TENSORS]


class _Call:
    """An attention that all ranks have agreed on, and how it is computed."""

    def __init__(
        self,
        ranks: Ranks,
        turn: int,
        whole: Whole,
        q_runs: list[list[Run]],
        k_runs: list[list[Run]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> None:
        self.ranks, self.turn, self.whole, self.q_runs, self.k_runs = ranks, turn, whole, q_runs, k_runs
        self.wide = state_dtype(q.dtype)

    @property
    def spec(self) -> Spec:
        """With this rank's rows of what has rows."""
        return self.whole.spec

    def forward(self, q: Tensor, k: Tensor, v: Tensor, own: Own) -> tuple[Tensor, Tensor, list[Tensor]]:
        """out, lse and what backward needs."""
        raise NotImplementedError

    def backward(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        any_dlse: bool,
        saved: Sequence[Tensor],
        wanted: list[bool],
        of_sinks: bool,
        own: Own,
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """The gradients of ``GRADIENTS``, and that of the sinks. ``any_dlse``: some rank has one."""
        raise NotImplementedError


class _ByRows(_Call):
    """A rank computes its rows of the scores, block of keys by block of keys."""

    def forward(self, q, k, v, own):
        merged = _Merged(q, v, self.wide)

        def use(keys: Held, pair: Pair) -> None:
            for queries in self._queries(q):
                for part in self.whole.parts(queries, keys):
                    merged.add(part, *_attend(part, q, pair.k, pair.v))

        self._visit(k, v, lambda keys, pair: own.run(use, keys, pair))
        out, lse = merged.results(self.spec.sinks, q.dtype)
        return out, lse, [q, k, v, out, lse]

    def backward(self, dout, dlse, any_dlse, saved, wanted, of_sinks, own):
        q, k, v, out, lse = saved
        dout = torch.zeros_like(out) if dout is None else rows(dout.to(out.dtype))
        grads = Gradients(q, k, v, self.spec, wanted)
        of_keys = [name for name in ("k", "v") if name in grads.given]

        def use(keys: Held, pair: Pair) -> Pair:
            sums = Pair(torch.zeros_like(pair.flat, dtype=self.wide), pair.k.shape, pair.v.shape)
            for piece in _pieces(keys, _steps(k, v)):
                for queries in self._queries(q):
                    for part in self.whole.parts(queries, piece):
                        for name, grad, at in _gradients(part, dout, dlse, q, pair, out, lse, wanted):
                            if name in of_keys:
                                getattr(sums, name)[at] += grad
                            else:
                                grads.add(name, grad, at)
            return sums

        def home(keys: Held, pair: Pair) -> None:
            for name in of_keys:
                grads.add(name, getattr(pair, name), (..., slice(keys.at, keys.at + keys.size), slice(None)))

        self._visit(k, v, lambda keys, pair: own.run(use, keys, pair), self.wide if of_keys else None, home)
        dsinks = None
        if of_sinks and self.spec.sinks is not None:
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            dsinks = ops._sinks_grad(self.spec.sinks, lse, delta if dlse is None else delta - dlse)
        return grads.results(), dsinks

    def _queries(self, q: Tensor) -> list[Held]:
        """In pieces, so that what a call returns before it is added up is small."""
        return held(self.q_runs[self.ranks.rank], _steps(q))

    def _visit(self, k: Tensor, v: Tensor, use: Use, returns: torch.dtype | None = None, home: Home | None = None) -> None:
        """Calls ``use(keys, pair)`` with all keys that this rank's queries may see; ``keys.at``: where they lie in ``pair``.

        With ``returns`` a dtype, what ``use`` gives back on all ranks for keys of this one is summed and given to
        ``home(keys, pair)``; ``keys.at``: where they lie in k.
        """
        raise NotImplementedError


class _Ring(_ByRows):
    def _visit(self, k, v, use, returns=None, home=None):
        rank = self.ranks.rank
        reached = [[self.whole.reach(*run) for run in runs] for runs in self.q_runs]
        chunks = [held(runs, _steps(k, v)) for runs in self.k_runs]
        for c in range(max(map(len, chunks))):
            of = [own[c] if c < len(own) else Held(0, 0, 0) for own in chunks]
            last = [self._last(source, keys, reached) for source, keys in enumerate(of)]
            mine = of[rank]

            def shapes(source: int, of: Any = of) -> tuple[Sequence[int], Sequence[int]]:
                return _with_steps(k, of[source].size), _with_steps(v, of[source].size)

            def arrived(source: int, pair: Pair, of: Any = of) -> Pair | None:
                if not of[source].size:
                    return None
                result = use(of[source]._replace(at=0), pair)
                if source == rank and home is not None and result is not None:
                    home(of[rank], result)
                return result

            at = slice(mine.at, mine.at + mine.size)
            pair = Pair.of(k[..., at, :], v[..., at, :])
            back = once_round(self.ranks, pair, shapes, last, arrived, returns)
            if back is not None and home is not None:
                home(mine, Pair(back, pair.k.shape, pair.v.shape))

    def _last(self, source: int, keys: Held, reached: list[list[Run]]) -> int:
        """How many hops a chunk makes: to the last rank that may see it."""
        n = self.ranks.size
        for hop in range(n - 1, 0, -1):
            if any(max(low, keys.begin) < min(high, keys.end) for low, high in reached[(source + hop) % n]):
                return hop
        return 0


class _Message(NamedTuple):
    """Keys that a rank gets, and such that it gives at the same time."""

    source: int
    coming: list[Held]  # where they lie there
    to: int
    going: list[Held]  # where they lie here


class _Gather(_ByRows):
    """Forward keys come first, twice as many as a rank holds at once: with q, k, v and the output no more than the gradients
    take later. Backward sums need no merge: a message is done with before the next comes."""

    def _visit(self, k, v, use, returns=None, home=None):
        spans = [_united([self.whole.reach(*run) for run in runs]) for runs in self.q_runs]
        asked = [[_within(held(runs), of) for runs in self.k_runs] for of in spans]  # [who asks][whom]
        steps = _steps(k, v)
        if home is None:
            for some in self._some_at_once(asked, max(2 * -(-self.whole.tk // self.ranks.size), steps)):
                self._together(some, steps, k, v, use)
            return
        for message in self._messages(asked, steps):
            pair = self._fetched(message, k, v)
            sums = None if returns is None else Pair(torch.zeros_like(pair.flat, dtype=returns), pair.k.shape, pair.v.shape)
            for piece, at in _one_after_another(message.coming):
                result = use(piece._replace(at=0), _taken(pair.k, pair.v, [at]))
                if sums is not None and result is not None:
                    sums.k[..., at, :], sums.v[..., at, :] = result.k, result.v
            if sums is not None:
                back = self._traded(sums, message.source, _count(message.going), message.to)
                for piece, at in _one_after_another(message.going):
                    home(piece, _taken(back.k, back.v, [at]))

    def _together(self, asked: list[list[list[Held]]], steps: int, k: Tensor, v: Tensor, use: Use) -> None:
        """One use of each run of keys that this rank asks for."""
        coming = [(piece.begin, piece.end) for of in asked[self.ranks.rank] for piece in of]
        wholes = [Held(begin, end, 0) for begin, end in _united(coming)]
        found = [_empty_pair(k, v, of.size) for of in wholes]
        for message in self._messages(asked, steps):
            pair = self._fetched(message, k, v)
            for piece, at in _one_after_another(message.coming):
                run = next(i for i, of in enumerate(wholes) if of.begin <= piece.begin < of.end)
                own = wholes[run].steps(piece.begin, piece.end)
                found[run].k[..., own, :], found[run].v[..., own, :] = pair.k[..., at, :], pair.v[..., at, :]
        for keys in wholes:
            use(keys, found.pop(0))

    def _some_at_once(self, asked: list[list[list[Held]]], most: int) -> Iterator[list[list[list[Held]]]]:
        """What every rank asks for, ``most`` keys at a time: its own first, then those of the ranks before it, as in a ring, so
        that no rank is asked by all at once."""
        n = self.ranks.size
        before = [[0] * n for _ in range(n)]
        for who in range(n):
            for step in range(1, n):
                last = (who - step + 1) % n
                before[who][(who - step) % n] = before[who][last] + _count(asked[who][last])
        for first in range(0, max(sum(map(_count, of)) for of in asked), most):
            yield [
                [_stretch(of, first - at, first + most - at) for of, at in zip(asked[who], before[who], strict=True)]
                for who in range(n)
            ]

    def _messages(self, asked: list[list[list[Held]]], steps: int) -> Iterator[_Message]:
        """All that this rank gets and gives, one rank after the other, itself first: of two ranks both have the same order."""
        n, rank = self.ranks.size, self.ranks.rank
        for step in range(n):
            source, to = (rank - step) % n, (rank + step) % n
            coming, going = asked[rank][source], asked[to][rank]
            for first in range(0, max(_count(coming), _count(going)), steps):
                yield _Message(source, _stretch(coming, first, first + steps), to, _stretch(going, first, first + steps))

    def _fetched(self, message: _Message, k: Tensor, v: Tensor) -> Pair:
        outgoing = _taken(k, v, [slice(piece.at, piece.at + piece.size) for piece in message.going])
        return self._traded(outgoing, message.to, _count(message.coming), message.source)

    def _traded(self, outgoing: Pair, to: int, steps: int, source: int) -> Pair:
        shapes = _with_steps(outgoing.k, steps), _with_steps(outgoing.v, steps)
        return Pair(trade(self.ranks, outgoing.flat, to, (sum(shape.numel() for shape in shapes),), source), *shapes)


class _Side(NamedTuple):
    """Of the queries, or of the keys."""

    shares: list[Run]  # of the heads, for each rank
    runs: list[list[Run]]  # of the steps
    heads: int

    @property
    def steps(self) -> int:
        return sum(map(size_of, self.runs))

    @property
    def shared(self) -> bool:
        """Whether several ranks have the same head."""
        return sum(end - begin for begin, end in self.shares) > self.heads


class _Heads(_Call):
    """A rank computes some heads of all rows."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        q, k, _ = args[-3:]
        of_q, of_k = _shares(q.shape[-3], k.shape[-3], self.ranks.size)
        self.of_q, self.of_k = _Side(of_q, self.q_runs, q.shape[-3]), _Side(of_k, self.k_runs, k.shape[-3])
        self.sides = {"q": self.of_q, "k": self.of_k, "v": self.of_k, "relative_q": self.of_q}

    def forward(self, q, k, v, own):
        given = {"q": q, "k": k, "v": v}
        if self.spec.relative_q is not None:
            given["relative_q"] = self.spec.relative_q
        exchanged = self._to_heads(list(given.values()), [self.sides[name] for name in given])
        del given

        results = own.run(lambda q, k, v, *rest: ops.attention(q, k, v, self._own_heads(*rest)), *exchanged)
        if results is None:
            like = exchanged[0]
            results = empty_rows(like, v.shape[-1]).zero_(), like.new_zeros(like.shape[:-1], dtype=self.wide)
        (out,), (lse,) = (self._to_steps([x], [self.of_q]) for x in (results[0], results[1][..., None]))
        return out, lse[..., 0], [*exchanged, *results]

    def backward(self, dout, dlse, any_dlse, saved, wanted, of_sinks, own):
        exchanged = saved[:-2]
        found = self._gradients(dout, dlse, any_dlse, saved, wanted, of_sinks, own)
        grads = dict.fromkeys(GRADIENTS, saved[0].new_empty(0))
        of = dict(zip(self.sides, exchanged, strict=False))
        names = [name for name, want in zip(GRADIENTS, wanted, strict=True) if want and name in of]
        going = []
        for name in names:  # in fp32 where several ranks have a share of a head's gradient
            grad, side = found.pop(name, None), self.sides[name]
            grad = torch.zeros_like(of[name]) if grad is None else grad
            going.append(grad.to(self.wide) if side.shared else grad.to(of[name].dtype))
            del grad
        coming = self._to_steps(going, [self.sides[name] for name in names]) if names else []
        for name, grad in zip(names, coming, strict=True):
            grads[name] = grad.to(of[name].dtype)
        for name, want in zip(GRADIENTS, wanted, strict=True):
            if want and name not in of:
                grads[name] = self._share(name, found.get(name))
        return list(grads.values()), self._share("sinks", found.get("sinks")) if of_sinks else None

    def _gradients(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        any_dlse: bool,
        saved: Sequence[Tensor],
        wanted: list[bool],
        of_sinks: bool,
        own: Own,
    ) -> dict[str, Tensor]:
        """Of own heads, by name; after an error none."""
        *exchanged, out, lse = saved
        q, k, v, *relative_q = exchanged
        shape = (*q.shape[:-3], self.of_q.heads, size_of(self.q_runs[self.ranks.rank]))
        (d,) = self._to_heads([q.new_zeros(*shape, v.shape[-1]) if dout is None else dout.to(q.dtype)], [self.of_q])
        of_lse: Tensor | None = None
        if any_dlse:
            given = lse.new_zeros(shape) if dlse is None else dlse
            of_lse = self._to_heads([given[..., None]], [self.of_q])[0][..., 0].contiguous()
        spec = self._own_heads(*relative_q)

        def gradients() -> dict[str, Tensor]:
            grads = ops.attention_backward(d, of_lse, q, k, v, out, lse, spec, wanted)
            found = dict(zip(GRADIENTS, grads, strict=True))
            if of_sinks and spec.sinks is not None:
                delta = (d.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
                found["sinks"] = ops._sinks_grad(spec.sinks, lse, delta if of_lse is None else delta - of_lse)
            return found

        return own.run(gradients) or {}

    def _own_heads(self, relative_q: Tensor | None = None) -> Spec:
        """The spec of this rank's heads."""
        given = {name: getattr(self.spec, name) for name in _HEADS_AT}
        own = {name: tensor[self._heads_at(name, tensor)].contiguous() for name, tensor in given.items() if tensor is not None}
        seed = self.whole.seed(0, 0, 0, self.of_q.shares[self.ranks.rank][0])
        return self.spec._replace(relative_q=relative_q, seed=seed, **own)

    def _heads_at(self, name: str, tensor: Tensor) -> tuple[Any, ...]:
        """The index of this rank's heads in a tensor of the spec, which may have one for all."""
        dim = _HEADS_AT[name]
        own = slice(None) if tensor.shape[dim] == 1 else slice(*self.of_q.shares[self.ranks.rank])
        return (*[slice(None)] * dim, own)

    def _share(self, name: str, grad: Tensor | None) -> Tensor:
        """This rank's share of a gradient: zero for the heads of the others."""
        tensor = getattr(self.spec, name)
        share = torch.zeros_like(tensor)
        if grad is not None:
            share[self._heads_at(name, tensor)] = grad
        return share

    def _to_heads(self, tensors: list[Tensor], sides: list[_Side]) -> list[Tensor]:
        """Own heads of all steps, from all heads of own steps. ``tensors`` is emptied."""
        runs, rank = _runs(tensors, sides), self.ranks.rank
        if len(runs) > 1 and len(sides) > 1:
            return [result for of in sides for result in self._to_heads([tensors.pop(0)], [of])]
        given = list(zip(tensors, sides, strict=True))
        results = [empty_rows(x.new_empty((*_piece(x, of, rank, 0, (0, 0))[:-2], of.steps, 0)), x.shape[-1]) for x, of in given]
        for run in runs:
            outgoing = [
                _flat([x[..., slice(*of.shares[to]), slice(*run), :] for x, of in given]) for to in range(self.ranks.size)
            ]
            shapes = [[_piece(x, of, rank, source, run) for x, of in given] for source in range(self.ranks.size)]
            for source, pieces in enumerate(_swapped(self.ranks, outgoing, shapes)):
                for result, of, piece in zip(results, sides, pieces, strict=True):
                    for begin, end, at in _cut(of.runs[source], run):
                        result[..., begin:end, :] = piece[..., at : at + end - begin, :]
        tensors.clear()
        return results

    def _to_steps(self, tensors: list[Tensor], sides: list[_Side]) -> list[Tensor]:
        """All heads of own steps, from own heads of all steps; summed where several ranks had a head. ``tensors`` is emptied."""
        runs, rank = _runs(tensors, sides), self.ranks.rank
        if len(runs) > 1 and len(sides) > 1:
            return [result for of in sides for result in self._to_steps([tensors.pop(0)], [of])]
        given = list(zip(tensors, sides, strict=True))
        results = [
            empty_rows(x.new_empty((*x.shape[:-3], of.heads, size_of(of.runs[rank]), 0)), x.shape[-1]).zero_() for x, of in given
        ]
        for run in runs:
            outgoing = [
                _flat([_joined([x[..., begin:end, :] for begin, end, _ in _cut(of.runs[to], run)], x) for x, of in given])
                for to in range(self.ranks.size)
            ]
            shapes = [[_piece(x, of, source, rank, run) for x, of in given] for source in range(self.ranks.size)]
            for source, pieces in enumerate(_swapped(self.ranks, outgoing, shapes)):
                for result, of, piece in zip(results, sides, pieces, strict=True):
                    result[..., slice(*of.shares[source]), slice(*run), :] += piece
        tensors.clear()
        return results


def _runs(tensors: list[Tensor], sides: list[_Side]) -> list[Run]:
    """Of every rank's steps, counted from its first: as many as make a message, with these tensors together."""
    each = sum(x.shape[:-3].numel() * of.heads * x.shape[-1] * x.element_size() for x, of in zip(tensors, sides, strict=True))
    steps = max(_exchange.FEWEST, _exchange.MESSAGE // max(each, 1))
    longest = max(size_of(runs) for of in sides for runs in of.runs)
    return [(first, first + steps) for first in range(0, longest, steps)]


def _cut(runs: list[Run], own: Run) -> Iterator[tuple[int, int, int]]:
    """Steps ``own`` of a rank that holds these runs: where they begin and end in the whole, and their place among ``own``."""
    for of in held(runs):
        first, last = max(of.at, own[0]), min(of.at + of.size, own[1])
        if first < last:
            yield of.begin + first - of.at, of.begin + last - of.at, first - own[0]


def _piece(x: Tensor, of: _Side, heads: int, steps: int, run: Run) -> torch.Size:
    """The shape of the heads of one rank and, within a run, the steps of another."""
    begin, end = of.shares[heads]
    return torch.Size((*x.shape[:-3], end - begin, max(0, min(size_of(of.runs[steps]), run[1]) - run[0]), x.shape[-1]))


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts, -2) if parts else like[..., :0, :]


_HEADS_AT = {"mask": 1, "bias": 1, "blocks": 1, "slopes": 1, "relative_bias": 0, "relative_k": 0, "sinks": 0}


def _shares(q_heads: int, k_heads: int, n: int) -> tuple[list[Run], list[Run]]:
    """Which heads of queries, and of keys, each rank has."""
    group, own = (q_heads // k_heads if k_heads else 1), q_heads // n
    if q_heads % n or not own or (own % group and group % own):
        raise ValueError(
            f"method='all_to_all' shares the heads among the ranks: {q_heads} heads of queries and {k_heads} of keys cannot be "
            f"divided by {n}; method='ring' takes any number"
        )
    of_q = [(r * own, (r + 1) * own) for r in range(n)]
    return of_q, [(begin // group, (end - 1) // group + 1) for begin, end in of_q]


class _Merged:
    """Attentions over parts of the keys, becoming one."""

    def __init__(self, q: Tensor, v: Tensor, wide: torch.dtype) -> None:
        like = q.new_empty((*q.shape[:-1], 0), dtype=wide)
        self.out = empty_rows(like, v.shape[-1]).zero_()
        self.lse = q.new_full(q.shape[:-1], -torch.inf, dtype=wide)

    def add(self, part: Part, out: Tensor, lse: Tensor) -> None:
        own = self.lse[part.q]
        total = torch.logaddexp(own, lse)
        base = total.masked_fill(total == -torch.inf, 0)
        self.out[part.q].mul_(torch.exp(own - base)[..., None]).add_(out * torch.exp(lse - base)[..., None])
        self.lse[part.q] = total

    def results(self, sinks: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if sinks is None:
            return self.out.to(dtype), self.lse
        lse = torch.logaddexp(self.lse, sinks.to(self.lse.dtype)[:, None])
        self.out.mul_(torch.exp(self.lse - lse)[..., None])
        return self.out.to(dtype), lse


def _attend(part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of a part."""
    q, k, v = q[part.q], k[part.k], v[part.k]
    if part.alone:
        q, k, v = q[None], k[None], v[None]
    out, lse = ops.attention(q, k, v, part.spec)
    return (out[0], lse[0]) if part.alone else (out, lse)


def _gradients(
    part: Part,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    pair: Pair,
    out: Tensor,
    lse: Tensor,
    wanted: list[bool],
) -> Iterator[tuple[str, Tensor, Any]]:
    """The gradients of a part: of what, and where it belongs (of k and v in ``pair``)."""

    def own(tensor: Any, at: Any) -> Any:
        return None if tensor is None else tensor[at][None] if part.alone else tensor[at]

    dlse, lse = own(dlse, part.q), own(lse, part.q).contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    of_q, of_k = (own(dout, part.q), dlse, own(q, part.q)), (own(pair.k, part.k), own(pair.v, part.k))
    found = ops.attention_backward(*of_q, *of_k, own(out, part.q), lse, part.spec, wanted)
    places = {"q": part.q, "k": part.k, "v": part.k, "bias": part.bias, "relative_q": part.q}
    for name, grad, want in zip(GRADIENTS, found, wanted, strict=True):
        if want:
            yield name, grad[0] if part.alone and name in ("q", "k", "v", "relative_q") else grad, places.get(name, ())


def _steps(*tensors: Tensor) -> int:
    """How many steps of these tensors make a message."""
    each = sum(t.shape[:-2].numel() * t.shape[-1] * t.element_size() for t in tensors)
    return max(_exchange.FEWEST, _exchange.MESSAGE // max(each, 1))


def _with_steps(tensor: Tensor, steps: int) -> torch.Size:
    return torch.Size((*tensor.shape[:-2], steps, tensor.shape[-1]))


def _united(runs: list[Run]) -> list[Run]:
    """The same steps in runs that do not touch, in order."""
    found: list[Run] = []
    for begin, end in sorted(run for run in runs if run[0] < run[1]):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def _pieces(keys: Held, steps: int) -> list[Held]:
    """At most so many keys each."""
    return [
        Held(first, min(first + steps, keys.end), keys.at + first - keys.begin) for first in range(keys.begin, keys.end, steps)
    ]


def _within(holder: list[Held], runs: list[Run]) -> list[Held]:
    """What a rank holds of these runs."""
    found = []
    for of in holder:
        for begin, end in runs:
            begin, end = max(begin, of.begin), min(end, of.end)
            if begin < end:
                found.append(Held(begin, end, of.at + begin - of.begin))
    return found


def _count(pieces: list[Held]) -> int:
    return sum(piece.size for piece in pieces)


def _stretch(pieces: list[Held], first: int, last: int) -> list[Held]:
    """Steps first .. last of pieces, counted through all of them."""
    found, before = [], 0
    for piece in pieces:
        begin, end = max(first - before, 0), min(last - before, piece.size)
        if begin < end:
            found.append(Held(piece.begin + begin, piece.begin + end, piece.at + begin))
        before += piece.size
    return found


def _one_after_another(pieces: list[Held]) -> Iterator[tuple[Held, slice]]:
    """Pieces, and where they lie in a message of them."""
    at = 0
    for piece in pieces:
        yield piece, slice(at, at + piece.size)
        at += piece.size


def _taken(k: Tensor, v: Tensor, at: list[slice]) -> Pair:
    """These steps of k and v."""
    return Pair.of(*[torch.cat([t[..., own, :] for own in at], -2) if at else t[..., :0, :] for t in (k, v)])


def _empty_pair(k: Tensor, v: Tensor, steps: int) -> Pair:
    """Of as many steps."""
    shapes = _with_steps(k, steps), _with_steps(v, steps)
    return Pair(k.new_empty(shapes[0].numel() + shapes[1].numel()), *shapes)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _swapped(ranks: Ranks, outgoing: list[Tensor], shapes: list[list[torch.Size]]) -> list[list[Tensor]]:
    """Pieces of these shapes from each rank."""
    sizes = [[shape.numel() for shape in each] for each in shapes]
    came = swap(ranks, outgoing, [(sum(each),) for each in sizes])
    return [
        [piece.view(shape) for piece, shape in zip(flat.split(size), each, strict=True)]
        for flat, size, each in zip(came, sizes, shapes, strict=True)
    ]
