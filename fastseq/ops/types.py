"""Arguments and results of the registered ops: facts, from which every backend and the reference may import.

The meaning of each tensor stands in the contract at the head of the op's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS, Cell


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of c, of lse and of accumulators: fp32, or wider if the input is."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class States(NamedTuple):
    """What a layer starts from, and what it starts anew from at a reset; None: zeros."""

    h0: Tensor | None  # [D, B, P]
    c0: Tensor | None  # [D, B, K*H]
    reset_h: Tensor | None = None  # alike, or with B = 1
    reset_c: Tensor | None = None


class Walk(NamedTuple):
    """How a layer is walked: what the recurrent ops take beside states and weights."""

    lengths: Tensor | None
    batch_sizes: Tensor | None
    hold_h: Tensor | None
    hold_c: Tensor | None
    cell: str
    reverse: list[int]
    zoneout_h: float
    zoneout_c: float
    resets: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self[:4], self.resets

    def with_tensors(self, *tensors: Tensor | None) -> Walk:
        """Of ``tensors`` as the property has them."""
        lengths, batch_sizes, hold_h, hold_c, resets = tensors or (None,) * 5
        return self._replace(lengths=lengths, batch_sizes=batch_sizes, hold_h=hold_h, hold_c=hold_c, resets=resets)


class Weights(NamedTuple):
    """The parameters of a layer: of each kind a tensor for every lane, or none."""

    w_ih: Sequence[Tensor]  # [G*H, I]
    w_hh: Sequence[Tensor]  # [G*H, P]
    b_ih: Sequence[Tensor]  # [G*H]
    b_hh: Sequence[Tensor]  # [G*H]
    w_hr: Sequence[Tensor]  # [P, H]
    vectors: Sequence[Tensor]  # [V*H]: what acts inside a step, but for a bias

    def arguments(self, x: Tensor, states: States, walk: Walk, save_c: bool, save_gates: bool) -> tuple[Any, ...]:
        """Of the forward op."""
        return x, *self.stacked(CELLS[walk.cell]), *states[:2], *walk[:8], save_c, save_gates, walk.resets, *states[2:]

    def stacked(self, row: Cell) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """``w_ih, b_ih, weight, vectors, projection`` of the forward op: every bias that can be is folded into ``b_ih``."""
        w_ih, _, b_ih, b_hh, _, _ = self
        if b_hh and row.recurrent_bias is not None:
            size = b_hh[0].shape[0] // len(row.gates)
            b_hh = [torch.nn.functional.pad(b[:-size], (0, size)) for b in b_hh]
        biases = [a + b for a, b in zip(b_ih, b_hh, strict=True)] if b_ih and b_hh else b_ih or b_hh
        return _joined(w_ih), _joined(biases), *self.recurrent(row)

    def recurrent(self, row: Cell) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``weight, vectors, projection`` of both ops."""
        w_hh, inside, w_hr = self.w_hh, self.inside(row), self.w_hr
        if len(w_hh) == 1:
            return (
                w_hh[0].unsqueeze(0),
                inside[0].unsqueeze(0) if inside else None,
                w_hr[0].unsqueeze(0) if w_hr else None,
            )
        return (
            torch.stack(list(w_hh)),
            torch.stack(list(inside)) if inside else None,
            torch.stack(list(w_hr)) if w_hr else None,
        )

    def inside(self, row: Cell) -> Sequence[Tensor]:
        """Of every lane ``vectors`` of the ops, whatever parameter they come from; none where there are none."""
        if not self.b_hh or row.recurrent_bias is None:
            return self.vectors
        size = self.b_hh[0].shape[0] // len(row.gates)
        return [b[-size:] for b in self.b_hh]


def _joined(of_lanes: Sequence[Tensor]) -> Tensor | None:
    """One under the other, if there are any."""
    return None if not of_lanes else of_lanes[0] if len(of_lanes) == 1 else torch.cat(list(of_lanes))


@dataclass(slots=True)
class Call:
    """What the sizes and facts of a recurrent call, forward or backward, follow from; formed once, as a short call asks often."""

    ROWS: ClassVar[str]  # the tensor whose leading dimensions are the rows

    rows: Tensor = field(init=False)
    row: Cell = field(init=False)
    dtype: torch.dtype = field(init=False)
    wide: torch.dtype = field(init=False)
    lanes: int = field(init=False)
    gates_width: int = field(init=False)  # G*H
    hidden: int = field(init=False)  # H
    width: int = field(init=False)  # P
    steps: int = field(init=False)
    zoned: bool = field(init=False)  # whether zoneout does anything
    saved: int = field(init=False)  # S: activations of ``gates``; a cell without any keeps its output if zoneout hides it
    output_gradient: bool = field(init=False)  # whether the backward pass gives ``doutput``

    # of Forward and Backward
    if TYPE_CHECKING:
        cell: str
        weight: Tensor
        vectors: Tensor | None
        projection: Tensor | None
        h0: Tensor | None
        c0: Tensor | None
        lengths: Tensor | None
        batch_sizes: Tensor | None
        hold_h: Tensor | None
        hold_c: Tensor | None
        reverse: list[int]
        zoneout_h: float
        zoneout_c: float

        # not as fields, which would come before those that have no default
        @property
        def resets(self) -> Tensor | None: ...
        @property
        def reset_h(self) -> Tensor | None: ...
        @property
        def reset_c(self) -> Tensor | None: ...

    def __post_init__(self) -> None:
        self.rows = rows = getattr(self, self.ROWS)
        self.row = row = CELLS[self.cell]
        self.dtype = rows.dtype
        self.wide = state_dtype(self.dtype)
        self.lanes, self.gates_width, self.width = self.weight.shape
        self.hidden = self.gates_width // len(row.gates)
        self.steps = rows.shape[0] if self.batch_sizes is None else self.batch_sizes.shape[0]
        self.zoned = self.hold_h is not None or self.hold_c is not None or self.zoneout_h > 0 or self.zoneout_c > 0
        self.saved = len(row.saved) or int(self.zoned)
        self.output_gradient = self.projection is not None or row.normalized

    @property
    def batch(self) -> int:
        return self.rows.shape[1] if self.batch_sizes is None else int(self.batch_sizes[0])

    @property
    def reverse_bits(self) -> int:
        """Bit d: lane d goes backwards."""
        bits = 0
        for lane, backwards in enumerate(self.reverse):
            bits |= bool(backwards) << lane
        return bits

    def spread_reset_states(self) -> None:
        """Gives each row its own of states that are alike for all."""
        if self.reset_h is None and self.reset_c is None:
            return
        for name in ("reset_h", "reset_c"):
            state = getattr(self, name)
            if state is not None and state.shape[1] != self.batch:
                if state.shape[1] != 1:
                    raise RuntimeError(f"Expected reset_to for a batch of {self.batch} or 1, got {list(state.shape)}")
                setattr(self, name, state.expand(-1, self.batch, -1))

    def row_offsets(self) -> tuple[Tensor | None, Tensor | None]:
        """On the device, the first row of every step of packed rows, [T], and the steps of every sequence, [B].

        None where T x B rows need none.
        """
        if self.batch_sizes is None:
            return None, None if self.lengths is None else self.lengths.to(torch.int64).contiguous()
        sizes = self.batch_sizes
        starts = sizes.cumsum(0) - sizes
        # sequence b has a step t if batch_sizes[t] > b, and the sizes do not increase
        ends = (sizes[None, :] > torch.arange(self.batch)[:, None]).sum(1)
        # these live in pageable memory, which is read before the call returns: nothing to wait for
        return starts.to(self.rows.device, non_blocking=True), ends.to(self.rows.device, non_blocking=True)


@dataclass(slots=True)
class Forward(Call):
    """Arguments of ``fastseq::recurrent_forward``, in the order of its schema."""

    ROWS = "x"

    x: Tensor
    w_ih: Tensor | None
    b_ih: Tensor | None
    weight: Tensor
    vectors: Tensor | None
    projection: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None
    batch_sizes: Tensor | None
    hold_h: Tensor | None
    hold_c: Tensor | None
    cell: str
    reverse: list[int]
    zoneout_h: float
    zoneout_c: float
    save_c: bool
    save_gates: bool
    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None

    def input_gates(self) -> Tensor:
        """The projected input [.., D, G*H]."""
        shape = (*self.x.shape[:-1], self.lanes, self.gates_width)
        if self.w_ih is None:
            return self.x.reshape(shape)
        flat = self.x.flatten(0, -2)
        gates = flat @ self.w_ih.t() if self.b_ih is None else torch.addmm(self.b_ih, flat, self.w_ih.t())
        return gates.view(shape)

    def empty_results(self, batch: Any = None, zeros: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Room for y, h_n, c_n, c, gates; with ``zeros`` for a kernel that does not visit what lies beyond a row's length."""
        empty, leading = self.rows.new_empty, (*self.rows.shape[:-1], self.lanes)
        of_rows = self.rows.new_zeros if zeros and self.lengths is not None else empty
        batch, states = self.batch if batch is None else batch, self.row.wide_states * self.hidden
        return (
            of_rows((*leading, self.width)),
            empty((self.lanes, batch, self.width)),
            empty((self.lanes, batch, states) if self.row.has_c else (0,), dtype=self.wide),
            of_rows((*leading, states) if self.row.has_c and self.save_c else (0,), dtype=self.wide),
            of_rows((*leading, self.saved * self.hidden) if self.saved and self.save_gates else (0,)),
        )


@dataclass(slots=True)
class Backward(Call):
    """Arguments of ``fastseq::recurrent_backward``, in the order of its schema."""

    ROWS = "y"

    dy: Tensor | None
    dh_n: Tensor | None
    dc_n: Tensor | None
    dc: Tensor | None
    weight: Tensor
    vectors: Tensor | None
    projection: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None
    batch_sizes: Tensor | None
    hold_h: Tensor | None
    hold_c: Tensor | None
    y: Tensor
    c: Tensor
    gates: Tensor
    cell: str
    reverse: list[int]
    zoneout_h: float
    zoneout_c: float
    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None

    def empty_results(self, batch: Any = None, zeros: bool = False) -> tuple[Tensor, ...]:
        """Room for dgates, drecurrent, doutput, dh0, dc0, dreset_h, dreset_c; with ``zeros`` as ``Forward.empty_results``.

        The last two, sums to which every reset adds, are zero.
        """
        empty, leading, own = self.rows.new_empty, self.y.shape[:-1], self.row.own_recurrent
        of_rows = self.rows.new_zeros if zeros and self.lengths is not None else empty
        batch = self.batch if batch is None else batch
        return (
            of_rows((*leading, self.gates_width)),
            of_rows((*leading, own * self.hidden) if own else (0,)),
            of_rows((*leading, self.width) if self.output_gradient else (0,)),
            empty((self.lanes, batch, self.width)),
            empty((self.lanes, batch, self.row.wide_states * self.hidden) if self.row.has_c else (0,), dtype=self.wide),
            *[self.rows.new_zeros((0,) if of is None else of.shape, dtype=self.wide) for of in (self.reset_h, self.reset_c)],
        )


class Spec(NamedTuple):
    """What shapes an attention beside q, k and v; the arguments of the ops after them, in this order.

    Padded: q ``[B, Hq, Tq, E]``, k ``[B, Hkv, Tk, E]``, v ``[B, Hkv, Tk, Ev]``. Packed (``cu_q``): ``[H, N, E]``, sequence b in
    rows cu_q[b] .. cu_q[b + 1] of q and cu_k[b] .. cu_k[b + 1] of k and v; cu[0] = 0, cu[B] = N. Any strides.
    """

    mask: Tensor | None = None  # bool, 4-D, each dimension that of [B, Hq, Tq, Tk] or 1; True: attend. Padded only
    bias: Tensor | None = None  # floating, likewise. Padded only
    relative_bias: Tensor | None = None  # [Hq, L] floating
    relative_q: Tensor | None = None  # as q
    relative_k: Tensor | None = None  # [Hq, M, E]
    slopes: Tensor | None = None  # fp32 or wider [B or 1, Hq], ALiBi
    sinks: Tensor | None = None  # [Hq] floating
    q_lengths: Tensor | None = None  # int32 [B]: valid queries and keys of each sequence. Padded only
    k_lengths: Tensor | None = None
    cu_q: Tensor | None = None  # int32 [B + 1], both or none: packed
    cu_k: Tensor | None = None
    blocks: Tensor | None = None  # bool [B or 1, Hq or 1, ceil(Tq / block_size), ceil(Tk / block_size)]: False hides a block
    # int64 [1], of the dropout; [5], of a part of a larger attention: then follow its first query and key there, b Hq + h of its
    # first head, and what b Hq + h grows by from a sequence to the next
    seed: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0  # 0: none; else softcap tanh(s / softcap)
    dropout: float = 0.0
    left: int = -1  # keys that a query sees before and after its place; -1: all. Causal: right = 0
    right: int = -1
    bottom_right: bool = False
    offset: int = 0
    relative_bias_zero: int = 0
    relative_k_zero: int = 0
    block_size: int = 0
    max_q: int = 0  # packed: the longest sequence
    max_k: int = 0


class DecodeSpec(NamedTuple):
    """A call but for q and the caches. Shapes: ``ops/attention_decode.py``."""

    lengths: Tensor
    block_table: Tensor | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    left: int = -1
    right: int = 0
    num_splits: int = 0


# What may want a gradient, in the order of the results of the attention ops' backward.
GRADIENTS = ("q", "k", "v", "bias", "relative_bias", "relative_q", "relative_k")


def empty_rows(like: Tensor, features: int) -> Tensor:
    """[.., H, T, features], time before heads in memory: what follows attention flattens the heads without a copy."""
    *leading, heads, time, _ = like.shape
    return like.new_empty(*leading, time, heads, features).transpose(-3, -2)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, spec: Spec, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Room for the gradients of ``GRADIENTS``; (0,) where not wanted."""
    given = (q, k, v, spec.bias, spec.relative_bias, spec.relative_q, spec.relative_k)
    results = []
    for name, tensor, want in zip(GRADIENTS, given, wanted, strict=True):
        if not want or tensor is None:
            results.append(q.new_empty(0))
        elif name in ("q", "k", "v", "relative_q"):
            results.append(empty_rows(tensor, tensor.shape[-1]))
        else:
            results.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))
    return tuple(results)


class ScanCell(NamedTuple):
    """What makes coefficients and addends of a scan reads; ``reference/scan.py`` says what it makes of it."""

    reads_b: bool = False  # every step is made of all inputs, and the backward pass reads b again
    gate: bool = False  # beside a and b another such tensor
    vector: bool = False  # a number of each channel, which all steps share


SCAN_CELLS = {
    "given": ScanCell(),
    "log": ScanCell(),
    "min_gru": ScanCell(reads_b=True),
    "min_lstm": ScanCell(reads_b=True, gate=True),
    "hgrn": ScanCell(reads_b=True, vector=True),
    "rg_lru": ScanCell(reads_b=True, gate=True, vector=True),
    "qrnn": ScanCell(reads_b=True),
    "qrnn_ifo": ScanCell(reads_b=True, gate=True),
}


class ScanSpec(NamedTuple):
    """How a scan is walked: what its ops take beside b, a, gate, vector and the initial states."""

    resets: Tensor | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None
    cell: str  # of SCAN_CELLS
    reverse: bool


def scan_kind(states: Tensor, a: Tensor) -> str:
    """``"real"``, ``"complex"`` or ``"blocks"``."""
    return "blocks" if a.dim() > states.dim() else "complex" if states.is_complex() else "real"


def empty_states(like: Tensor, kind: str) -> Tensor:
    """Room for h or its gradient: the layout of ``like`` where a step's channels lie side by side, else contiguous."""
    dense = like.stride(-1) == 1 and (kind != "blocks" or like.stride(-2) == like.shape[-1])
    return torch.empty_like(like) if dense else like.new_empty(like.shape)


def empty_scan(b: Tensor, kind: str, spec: ScanSpec) -> tuple[Tensor, Tensor]:
    """Room for h and the final states."""
    states = b.shape[1] if spec.cu_seqlens is None else spec.cu_seqlens.shape[0] - 1
    return empty_states(b, kind), b.new_empty((states, *b.shape[2:]), dtype=state_dtype(b.dtype))


def empty_scan_gradients(
    a: Tensor, h: Tensor, kind: str, spec: ScanSpec, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of b, a, gate, vector and the initial states; (0,) for those of the first four where not wanted."""
    states = h.shape[1] if spec.cu_seqlens is None else spec.cu_seqlens.shape[0] - 1
    rows = states if a.shape[0] != h.shape[0] else h.shape[1]
    db = empty_states(h, kind) if wanted[0] else h.new_empty(0)
    da = a.new_empty((a.shape[0], rows, h.shape[2], *a.shape[3:])) if wanted[1] else a.new_empty(0)
    wide, cell = state_dtype(h.dtype), SCAN_CELLS[spec.cell]
    dgate = empty_states(h, kind) if wanted[2] and cell.gate else h.new_empty(0)
    dvector = h.new_empty(h.shape[2] if wanted[3] and cell.vector else 0, dtype=wide)
    return db, da, dgate, dvector, h.new_empty((states, *h.shape[2:]), dtype=wide)
