"""RNNCell, LSTMCell and GRUCell: torch.nn's constructors, parameters and results, on fastseq's kernels.

Letters: B batch, I input_size, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fastseq import backends, functional
from fastseq.backends import library
from fastseq.backends.cpu import recurrent as native
from fastseq.backends.torch.recurrent import STEPS
from fastseq.choice import sources
from fastseq.choice.sources import memory
from fastseq.functional._native_layers import Lane, lane_of, native_lane, native_layers
from fastseq.functional._packing import PLACE, Packing, packing_of
from fastseq.modules._checks import as_plain_tuple, describe, kind_of, pair_of, public
from fastseq.modules._interop import Interop, as_leaf
from fastseq.modules._subclasses import as_subclass, subclass_of
from fastseq.ops._dispatch import PLAIN, autocasts, plain_call, recorded, transforming, wants_gradient
from fastseq.ops._recurrent_step import trained_step

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


@public
class RNNCell(Interop, nn.RNNCellBase):
    """`torch.nn.RNNCell`: one step, h' = act(W_ih x + b_ih + W_hh h + b_hh), act being tanh or ReLU.

    Constructor, parameters, initialization and state_dict are those of `torch.nn.RNNCell`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: False leaves out b_ih and b_hh.
        nonlinearity: "tanh" or "relu"; anything else raises RuntimeError at the first call, as in torch.
        device, dtype: of the parameters.
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: [B, I], or unbatched [I].
            hx: h [B, H], or unbatched [H]. None: zeros.

        Returns:
            h' [B, H], or unbatched [H].

        Raises:
            ValueError: input or hx neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices that do not fit each other, or an unknown nonlinearity.
        """
        name = _ELMAN.get(self.nonlinearity)
        if name is not None:
            done = None if torch.is_grad_enabled() else _short(self, name, input, hx)
            if done is not None:
                return done[0]
            h = None if hx is None or not torch.is_grad_enabled() else _trained(self, name, input, hx, (hx,))
            if h is not None:
                return h
            done = _step(self, name, input, None if hx is None else (hx,))
            if done is not None:
                return done[0]
        kind = subclass_of(input, hx)
        if kind is not None:
            return as_subclass(kind, lambda *given: RNNCell.forward(self, *given), input, hx)
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx)
        if name is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}. Select from 'tanh' or 'relu'.")
        if _as_torchs(self, name, input, hx):
            return _torch_rnn(self, input, hx)
        return _step_one_state(self, functional.rnn_cell, input, hx, nonlinearity=self.nonlinearity)

    if TYPE_CHECKING:
        __call__ = forward


@public
class LSTMCell(Interop, nn.RNNCellBase):
    """`torch.nn.LSTMCell`: one step of `fastseq.LSTM` without projection.

    Constructor, parameters, initialization and state_dict are those of `torch.nn.LSTMCell`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of both states.
        bias: False leaves out b_ih and b_hh.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, 4, device, dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: [B, I], or unbatched [I].
            hx: (h, c), each [B, H], or unbatched [H]. None: zeros.

        Returns:
            (h', c'), each [B, H], or unbatched [H].

        Raises:
            ValueError: input, h or c neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices that do not fit each other.
            TypeError: hx is no tuple.
        """
        if hx is not None and type(hx) is not tuple:
            hx = as_plain_tuple(hx, 2)
        if hx is None or (type(hx) is tuple and len(hx) == 2):
            done = None if torch.is_grad_enabled() else _short(self, "lstm", input, hx)
            if done is not None:
                return done[0], done[1]
            states = None if hx is None or not torch.is_grad_enabled() else _trained(self, "lstm", input, hx, hx)
            if states is not None:
                return states
            done = _step(self, "lstm", input, hx)
            if done is not None:
                return done[0], done[1]
            if _as_torchs(self, "lstm", input, *(hx or ())):
                return _torch_lstm(self, input, hx)
        kind = subclass_of(input, hx)
        if kind is not None:
            return as_subclass(kind, lambda *given: LSTMCell.forward(self, *given), input, hx)
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx)
        check_cell_input(self, input)
        if hx is not None:
            hx = pair_of(self, hx)
            for index, state in enumerate(hx):
                check_cell_rank(self, state, f"hx[{index}]")
            for index, state in enumerate(hx):
                check_cell_state(self, state, input, index)
        parameters = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if input.dim() == 2:
            return functional.lstm_cell(input, hx, *parameters)
        if hx is not None:
            hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = functional.lstm_cell(input.unsqueeze(0), hx, *parameters)
        return h.squeeze(0), c.squeeze(0)

    if TYPE_CHECKING:
        __call__ = forward


@public
class GRUCell(Interop, nn.RNNCellBase):
    """`torch.nn.GRUCell`: one step of `fastseq.GRU`.

    Constructor, parameters, initialization and state_dict are those of `torch.nn.GRUCell`.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: False leaves out b_ih and b_hh.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, 3, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step. Arguments, result and errors are those of `fastseq.RNNCell.forward`."""
        done = None if torch.is_grad_enabled() else _short(self, "gru", input, hx)
        if done is not None:
            return done[0]
        h = None if hx is None or not torch.is_grad_enabled() else _trained(self, "gru", input, hx, (hx,))
        if h is not None:
            return h
        done = _step(self, "gru", input, None if hx is None else (hx,))
        if done is not None:
            return done[0]
        if _as_torchs(self, "gru", input, hx):
            return _torch_gru(self, input, hx)
        kind = subclass_of(input, hx)
        if kind is not None:
            return as_subclass(kind, lambda *given: GRUCell.forward(self, *given), input, hx)
        if isinstance(input, Proxy):
            return as_leaf(self, input, hx)
        return _step_one_state(self, functional.gru_cell, input, hx)

    if TYPE_CHECKING:
        __call__ = forward


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_WEIGHTS = _NAMES[:2]
_ELMAN = {"tanh": "rnn_tanh", "relu": "rnn_relu"}
# As torch has them, whatever `fastseq.patched` puts in their place.
_torch_rnn: Any = nn.RNNCell.forward
_torch_lstm: Any = nn.LSTMCell.forward
_torch_gru: Any = nn.GRUCell.forward


_trainers = memory()
_lanes: dict[Any, Lane] = memory()


def _short(cell: nn.RNNCellBase, name: str, input: Any, hx: Any) -> Sequence[Tensor] | None:
    """The states after a step without gradients, if it is beyond question; None: it is for `_step`."""
    if type(input) is not Tensor or not plain_call(unseen=True):
        return None
    own = cell.__dict__  # by attribute, of a module, takes twice as long
    return _at_once(own, name, input, hx, None if own["training"] else own.get(PLACE))


def _at_once(own: dict[str, Any], name: str, input: Tensor, hx: Any, packing: Packing | None) -> Sequence[Tensor] | None:
    """`native_lane` of a cell with these attributes."""
    if sources._threads is not None:
        sources.heed_threads()
    key = name, own["bias"], own["hidden_size"]
    lane = _lanes.get(key)
    if lane is None:
        lane = sources.remember(_lanes, key, lane_of(name, True, bool(own["bias"]), False, own["hidden_size"]))
    return native_lane(lane, input, hx, own["_parameters"], packing)


def _trained(cell: nn.RNNCellBase, name: str, input: Any, hx: Any, states: tuple[Any, ...]) -> Any:
    """h, or of an LSTM h and c, after a step where gradients are on and whose kernel is known: what stands before it is a part of
    the time, and what there is to be asked of sizes and dtypes was asked of the first such call. None: it is for `_step`.
    """
    own: Any = cell._parameters
    w_ih, w_hh, b_ih, b_hh = own.get("weight_ih"), own.get("weight_hh"), own.get("bias_ih"), own.get("bias_hh")
    if type(input) is not Tensor or w_ih is None or type(w_ih) not in PLAIN or not w_ih.requires_grad:
        return None
    # parametrizations take parameters away from where they are looked for here
    if type(w_hh) not in PLAIN or (cell.bias and (type(b_ih) not in PLAIN or type(b_hh) not in PLAIN)):
        return None
    if not plain_call(unseen=True) or backends.forced_eagerly():
        return None
    if sources._threads is not None:
        sources.heed_threads()
    key: Any = (name, input.shape, input.dtype, input.is_cpu, w_ih.dtype, cell.hidden_size)
    for state in states:
        if type(state) is not Tensor:
            return None
        key += (state.shape, state.dtype)
    key += (states[0].is_leaf,)
    known = _trainers.get(key)
    if known is None:
        known = sources.remember(_trainers, key, _trainer(cell, name, input, states, w_ih.dtype))
    if known == "torch":
        return STEPS[name](input, hx, w_ih, w_hh, b_ih, b_hh)
    if known == "":
        return None
    if len(states) == 2:
        return trained_step(name, input, states[0], states[1], w_ih, w_hh, b_ih, b_hh)
    done = trained_step(name, input, hx, None, w_ih, w_hh, b_ih, b_hh)
    return done if done is None else done[0]


def _trainer(cell: nn.RNNCellBase, name: str, input: Tensor, states: tuple[Tensor, ...], dtype: torch.dtype) -> str:
    """Whose kernel takes such steps with gradients: "torch"'s, the "cpu" library's, or "" where more is to be asked."""
    if input.dim() != 2 or not input.is_cpu or input.dtype != dtype or input.shape[1] != cell.input_size:
        return ""
    shape = (input.shape[0], cell.hidden_size)
    if any(state.shape != shape or state.dtype != dtype or not state.is_cpu for state in states):
        return ""
    if backends.step_is_torchs(name, input.device, dtype, *shape, True, backends.steps_with(states[0], True)):
        return "torch"
    return "cpu" if dtype in native.DTYPES and not library.reason() else ""


def _step(cell: nn.RNNCellBase, name: str, input: Any, hx: tuple[Any, ...] | None) -> Sequence[Tensor] | None:
    """The states after a plain step, by the native kernels or, with gradients, by torch's; None: it goes another way.

    Nothing here is a check of its own: what is odd goes the long way, which says what is wrong with it.
    """
    if type(input) is not Tensor or not plain_call():
        return None
    own, names = cell._parameters, _NAMES if cell.bias else _WEIGHTS
    packing = None if cell.training else packing_of(cell)
    if input.dim() != 2:
        return None
    params: list[Any] = [own.get(key) for key in names]
    given: list[Any] = params if hx is None else [*params, *hx]
    for tensor in given:
        if type(tensor) not in PLAIN:
            return None
    if not torch.is_grad_enabled() or not (
        params[0].requires_grad or input.requires_grad or any([tensor.requires_grad for tensor in given])
    ):
        if backends.watched_eagerly():
            if packing is None:
                return None
            return native_layers(name, input, hx, params, cell.bias, 1, False, False, packing=packing)  # which says that it packs
        return _at_once(cell.__dict__, name, input, hx if hx is None or len(hx) == 2 else hx[0], packing)
    if backends.forced_eagerly() or backends.watched_eagerly():
        return None
    dtype, batch, hidden = input.dtype, input.size(0), cell.hidden_size
    if dtype != params[0].dtype:
        return None
    if hx is None:
        if input.layout != torch.strided:
            return None
        zeros = input.new_zeros(batch, hidden)
        hx = (zeros, zeros) if name == "lstm" else (zeros,)
    if backends.step_is_torchs(name, input.device, dtype, batch, hidden, True, backends.steps_with(hx[0], True)):
        for state in hx:
            if state.dim() != 2 or state.dtype != dtype:
                return None
        # which says itself of sizes that they do not fit
        return STEPS[name](input, hx, *params) if name == "lstm" else (STEPS[name](input, hx[0], *params),)
    if library.reason():
        return None
    return trained_step(name, input, hx[0], hx[1] if len(hx) == 2 else None, *params)


def _as_torchs(cell: nn.RNNCellBase, name: str, input: Any, *states: Any) -> bool:
    """Whether a call goes straight to torch's forward, whose kernel is the one for a step: if nothing about it is to be asked."""
    if type(input) is not Tensor or recorded() or backends.forced() or backends.watched() or transforming():
        return False
    dtype, dim, weight = input.dtype, input.dim(), cell._parameters.get("weight_ih")
    if weight is None:  # it is computed, and not for a question: what draws or iterates does it once a step
        return False
    if input.is_cpu and autocasts("cpu"):  # by one function after another, each with a rule for types: no kernel has its types
        return dim in (1, 2) and all(state is None or type(state) is Tensor for state in states)
    if dtype != weight.dtype or dim not in (1, 2) or input.shape[-1] != cell.input_size:
        return False
    shape = (*input.shape[:-1], cell.hidden_size)
    if not all(state is None or (type(state) is Tensor and state.dtype == dtype and state.shape == shape) for state in states):
        return False
    if dim == 1 or input.layout != torch.strided:  # a row that is no batch, sparse rows, which torch multiplies as such
        return True
    gradients = wants_gradient([input, *cell.parameters(), *[state for state in states if state is not None]])
    steps = backends.steps_with(states[0] if states else None, gradients)
    return backends.step_is_torchs(name, input.device, dtype, input.shape[0], cell.hidden_size, gradients, steps)


def _step_one_state(
    cell: RNNCell | GRUCell, function: Callable[..., Tensor], input: Tensor, hx: Tensor | None, **options: Any
) -> Tensor:
    """`function` of a cell whose only state is h, batched or not."""
    check_cell_input(cell, input)
    if hx is not None:
        if not isinstance(hx, Tensor):
            raise AttributeError(f"{kind_of(cell)}: hx should be one Tensor h, got {describe(hx)}")
        check_cell_rank(cell, hx, "hidden")
        check_cell_state(cell, hx, input, 0)
    parameters = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    if input.dim() == 2:
        return function(input, hx, *parameters, **options)
    if hx is not None:
        hx = hx.unsqueeze(0)
    return function(input.unsqueeze(0), hx, *parameters, **options).squeeze(0)


def check_cell_input(cell: nn.RNNCellBase, input: Tensor) -> None:
    if not isinstance(input, Tensor):  # torch raises the same type, from inside
        raise AttributeError(f"{kind_of(cell)}: input must be a Tensor, not {describe(input)}")
    check_cell_rank(cell, input, "input")
    if input.size(-1) != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)} expected {cell.input_size}")


def check_cell_rank(cell: nn.RNNCellBase, value: Tensor, name: str) -> None:
    if value.dim() not in (1, 2):
        raise ValueError(f"{kind_of(cell)}: Expected {name} to be 1D or 2D, got {value.dim()}D instead")


def check_cell_state(cell: nn.RNNCellBase, state: Tensor, input: Tensor, index: int) -> None:
    if state.dim() != input.dim():
        raise RuntimeError(
            f"For {input.dim()}-D input, hidden{index} should also be {input.dim()}-D but got {state.dim()}-D tensor"
        )
    if input.dim() == 2 and state.size(0) != input.size(0):
        raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{index} batch size {state.size(0)}")
    if state.size(-1) != cell.hidden_size:
        raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.size(-1)}, expected {cell.hidden_size}")
