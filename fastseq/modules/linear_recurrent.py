"""Recurrent layers whose gates read the input alone: the steps are a scan, and nothing but it goes from one to the next.

With torch.nn's conventions: constructor, shapes, names of parameters, errors. What they give up is a gate that reads the state: a
parity of bits, which a GRU counts exactly, stays at chance with any number of such layers whose coefficients are positive.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastseq import functional
from fastseq._arguments import checked_int, checked_number, checked_tensor
from fastseq.functional._linear_recurrent import check_zoneout, projected_scans
from fastseq.modules._checks import kind_of, public
from fastseq.ops._dispatch import plain_call, unshared

__all__ = ["HGRN", "LRU", "QRNN", "RGLRU", "MinGRU", "MinGRUCell", "MinLSTM"]

Shapes = dict[str, tuple[int, ...]]


def _checked_size(name: str, value: int) -> int:
    if checked_int(name, value) <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")
    return value


class _Layers(nn.Module):
    """A stack of layers, in one direction or both. A subclass says what a lane's parameters are, and how they begin."""

    _CELL: ClassVar[str]  # of functional.linear_recurrent
    zoneout: float = 0.0  # of a QRNN
    _DEFAULTS: ClassVar[dict[str, Any]] = {
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)

    def _build(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.input_size, self.hidden_size = _checked_size("input_size", input_size), _checked_size("hidden_size", hidden_size)
        self.num_layers = _checked_size("num_layers", num_layers)
        if not 0 <= checked_number("dropout", dropout) <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        self._lanes: list[dict[str, str]] = []  # of each lane: a parameter's name in the layer, and in the module
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * (2 if bidirectional else 1)
            for suffix in ("", "_reverse")[: 2 if bidirectional else 1]:
                names = {}
                for name, shape in self._shapes(width).items():
                    if bias or not name.startswith("bias"):
                        names[name] = f"{name}_l{layer}{suffix}"
                        setattr(self, names[name], nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._lanes.append(names)
        self._more_parameters({"device": device, "dtype": dtype})
        self.reset_parameters()

    def _shapes(self, width: int) -> Shapes:
        """Of a lane's parameters, for an input of this width."""
        raise NotImplementedError

    def _more_parameters(self, place: dict[str, Any]) -> None:
        """Those of the stack."""

    def _parameters_of(self, lane: int) -> dict[str, Tensor]:
        kept: Any = self._parameters  # faster than by attribute; parametrizations take them away from there
        return {name: kept[own] if own in kept else getattr(self, own) for name, own in self._lanes[lane].items()}

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H), as torch.nn.GRU's."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """``(output, h_n)``, as `fastseq.functional.linear_recurrent` describes them.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or unbatched ``[T, I]``.
            hx: the states before, as h_n. None: a sequence begins.
            lengths: ``[B]``, valid steps of each row.
            resets: bool ``[T, B]`` (``[B, T]``, ``[T]``): where a new segment begins.

        Returns:
            output ``[T, B, D*H]`` as the input, and the final states h_n ``[L*D, B, H]``, unbatched ``[L*D, H]``, in fp32 (fp64
            for fp64).

        Raises:
            RuntimeError: if ranks, sizes, dtypes, devices, ``lengths`` or ``resets`` do not fit.
            TypeError: if an argument is no Tensor, a PackedSequence among them.
        """
        return functional.linear_recurrent(
            self._CELL,
            input,
            hx,
            [self._parameters_of(lane) for lane in range(len(self._lanes))],
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            lengths=lengths,
            resets=resets,
            zoneout=self.zoneout,
        )

    def step(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """One step of all layers: ``(output, h_n)``. Steps in turn, each from the states of the one before, are the sequence.

        Args:
            input: ``[B, I]`` or ``[I]``.
            hx: the states before it, as h_n. None: a sequence begins.

        Raises:
            RuntimeError: if the layers go both ways, or as ``forward`` does.
        """
        if self.bidirectional:
            raise RuntimeError(f"{kind_of(self)}: a bidirectional layer takes no single steps, its way back starts at the end")
        if checked_tensor("input", input).dim() not in (1, 2):
            raise RuntimeError(f"{kind_of(self)}: Expected a step's input to be 1D or 2D, got {input.dim()}D instead")
        time = 1 if self.batch_first and input.dim() == 2 else 0
        with unshared():
            output, states = self(input.unsqueeze(time), hx)
        return output.squeeze(time), states

    def extra_repr(self) -> str:
        said = [f"{self.input_size}, {self.hidden_size}"]
        said += [f"{name}={getattr(self, name)}" for name, default in self._DEFAULTS.items() if getattr(self, name) != default]
        return ", ".join(said)

    if TYPE_CHECKING:
        __call__ = forward


class _Gated(_Layers):
    """Of gates that are rows of one weight and one bias."""

    _GATES: ClassVar[int]

    def forward(
        self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        odd = self.bidirectional or (self.dropout and self.training)
        if lengths is None and resets is None and not odd and plain_call(unseen=True):
            kept = self._parameters  # parametrizations take them away from there
            params = [kept.get(own) for names in self._lanes for own in names.values()]
            done = projected_scans(self._CELL, input, hx, params, self.bias, self.batch_first)
            if done is not None:
                return done[0], done[1]
        return super().forward(input, hx, lengths=lengths, resets=resets)

    forward.__doc__ = _Layers.forward.__doc__

    def _shapes(self, width: int) -> Shapes:
        rows = self._GATES * self.hidden_size
        return {"weight_ih": (rows, width), "bias_ih": (rows,)}


@public
class MinGRU(_Gated):
    """minGRU (Feng et al. 2024, "Were RNNs all we needed?") over sequences, ``torch.nn.GRU``'s interface.

        z_t = sigmoid(W_z x_t + b_z)
        h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t + b_h),    g(v) = v + 1/2 where v >= 0, else sigmoid(v)

    The gates and the scan are one pass over their logits, forward and back. h is kept in fp32 (fp64 for fp64) whatever the dtype.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L; each layer after the first reads the outputs of the one before.
        bias: whether there are b_z and b_h.
        batch_first: sequences are ``[B, T, I]``.
        dropout: probability with which, in training, elements of every layer's output but the last's are zeroed.
        bidirectional: a second lane of every layer goes from the last step to the first; outputs are side by side.
        device, dtype: of the parameters.

    Parameters are ``weight_ih_l0`` ``[2H, I]``, rows of W_z, then of W_h, ``bias_ih_l0`` ``[2H]``, and so for every layer, with
    ``_reverse`` at the end for its way back; uniform in +-1/sqrt(H).

    Raises:
        ValueError: if a size is not positive, or ``dropout`` is outside [0, 1].
        TypeError: if a number is none.
    """

    _CELL, _GATES = "min_gru", 2


@public
class MinGRUCell(nn.Module):
    """One step of `fastseq.MinGRU`: h from h. Steps in turn are the sequence.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether there are b_z and b_h.
        device, dtype: of the parameters.

    Parameters are ``weight_ih`` ``[2H, I]`` and ``bias_ih`` ``[2H]``, uniform in +-1/sqrt(H).

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = _checked_size("input_size", input_size), _checked_size("hidden_size", hidden_size)
        self.bias = bias
        self.weight_ih = nn.Parameter(torch.empty(2 * hidden_size, input_size, device=device, dtype=dtype))
        self.bias_ih = nn.Parameter(torch.empty(2 * hidden_size, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H), as torch.nn.GRUCell's."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state after the step, ``[B, H]``, in fp32 (fp64 for fp64).

        Args:
            input: ``[B, I]``, or unbatched ``[I]``.
            hx: the state before, ``[B, H]`` or ``[H]``. None: zeros.

        Raises:
            RuntimeError: if ranks, sizes or dtypes do not fit.
            TypeError: if an argument is no Tensor.
        """
        if checked_tensor("input", input).dim() not in (1, 2):
            raise RuntimeError(f"MinGRUCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        state = None if hx is None else checked_tensor("hx", hx).unsqueeze(0)
        with unshared():
            _, h_n = functional.linear_recurrent("min_gru", input.unsqueeze(0), state, [dict(self.named_parameters())])
        return h_n[0]

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")

    if TYPE_CHECKING:
        __call__ = forward


@public
class MinLSTM(_Gated):
    """minLSTM (Feng et al. 2024, "Were RNNs all we needed?") over sequences, `fastseq.MinGRU`'s interface.

        f_t = sigmoid(W_f x_t + b_f),    i_t = sigmoid(W_i x_t + b_i)
        h_t = (f_t h_{t-1} + i_t g(W_h x_t + b_h)) / (f_t + i_t),    g(v) = v + 1/2 where v >= 0, else sigmoid(v)

    The gates' shares are formed from exponentials no larger than 1, so none is lost where both gates are all but shut.

    Args: as of `fastseq.MinGRU`.

    Parameters are ``weight_ih_l0`` ``[3H, I]``, rows of W_f, W_i, W_h, ``bias_ih_l0`` ``[3H]``, and so on, uniform in
    +-1/sqrt(H).

    Raises:
        ValueError: if a size is not positive, or ``dropout`` is outside [0, 1].
        TypeError: if a number is none.
    """

    _CELL, _GATES = "min_lstm", 3


@public
class HGRN(_Layers):
    """HGRN (Qin et al. 2023, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling") over sequences, with real
    states, `fastseq.MinGRU`'s interface.

        f_t = l + (1 - l) sigmoid(W_f x_t + b_f)
        h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t + b_i)
        y_t = rms_norm(h_t) silu(W_g x_t + b_g)

    The lower bound l rises from layer to layer, so that upper layers remember longer: a softmax over all layers, summed over the
    layers up to this one but the first, where l is zero.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional: as of `fastseq.MinGRU`.
        lower_bound: whether there is one; else l is zero.
        output_gate: whether y is normalized and gated; else it is h.
        device, dtype: of the parameters.

    Parameters are ``weight_ih_l0`` ``[3H, I]``, rows of W_f, W_i, W_g (``[2H, I]`` without output gate), ``bias_ih_l0``, the
    norm's ``weight_norm_l0`` ``[H]``, and so on; ``lower_bounds`` ``[L, H]``, logits of the softmax, ``lower_bounds_reverse``.
    Uniform in +-1/sqrt(H); the norm's weights are ones, the logits zeros. The paper's last projection is left to what reads y.

    Raises:
        ValueError: if a size is not positive, or ``dropout`` is outside [0, 1].
        TypeError: if a number is none.
    """

    _CELL = "hgrn"
    _DEFAULTS: ClassVar[dict[str, Any]] = _Layers._DEFAULTS | {"lower_bound": True, "output_gate": True}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        lower_bound: bool = True,
        output_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.lower_bound, self.output_gate = lower_bound, output_gate
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)

    def _shapes(self, width: int) -> Shapes:
        rows = (3 if self.output_gate else 2) * self.hidden_size
        norm: Shapes = {"weight_norm": (self.hidden_size,)} if self.output_gate else {}
        return {"weight_ih": (rows, width), "bias_ih": (rows,), **norm}

    def _more_parameters(self, place: dict[str, Any]) -> None:
        self._bounds = [f"lower_bounds{suffix}" for suffix in ("", "_reverse")[: 2 if self.bidirectional else 1]]
        for name in self._bounds if self.lower_bound else ():
            setattr(self, name, nn.Parameter(torch.empty(self.num_layers, self.hidden_size, **place)))

    def _parameters_of(self, lane: int) -> dict[str, Tensor]:
        found = super()._parameters_of(lane)
        if self.lower_bound:
            layer, direction = divmod(lane, len(self._bounds))
            logits = getattr(self, self._bounds[direction])
            wide = torch.promote_types(logits.dtype, torch.float32)
            found["lower_bound"] = logits.softmax(0, dtype=wide)[1 : layer + 1].sum(0)
        return found

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H); ones for norms, zeros for the lower bounds' logits."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("weight_norm"):
                nn.init.ones_(parameter)
            elif name in self._bounds:
                nn.init.zeros_(parameter)


@public
class RGLRU(_Layers):
    """RG-LRU, the real-gated linear recurrent unit of Griffin (De et al. 2024) and RecurrentGemma, over sequences,
    `fastseq.MinGRU`'s interface.

        r_t = sigmoid(W_r x_t + b_r),    i_t = sigmoid(W_i x_t + b_i)
        log a_t = -8 r_t softplus(Lambda)
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t

    W_r and W_i are block-diagonal. Where a sequence or a segment begins, and no state is given, the root is 1, as there. Neither
    it nor its gradient cancels where a_t nears 1. An input of another width than H is projected to H first.

    Args:
        input_size, hidden_size, num_layers, batch_first, dropout, bidirectional: as of `fastseq.MinGRU`.
        bias: whether there are b_r, b_i, and that of a projection.
        heads: number of blocks of W_r and W_i; it divides H.
        device, dtype: of the parameters.

    Parameters are ``weight_r_l0``, ``weight_i_l0`` ``[heads, H/heads, H/heads]``, ``bias_r_l0``, ``bias_i_l0`` ``[H]``,
    ``decay_l0`` ``[H]`` (Lambda), and, where a layer's input is not H wide, ``weight_ih_l0`` ``[H, I]``, ``bias_ih_l0`` ``[H]``.
    They begin with a^8 uniform in (0.9, 0.999) at r = 1, biases of zero, gates' weights normal with variance heads/H, projections
    uniform in +-1/sqrt(H).

    Raises:
        ValueError: if a size is not positive, ``heads`` does not divide H, or ``dropout`` is outside [0, 1].
        TypeError: if a number is none.
    """

    _CELL = "rg_lru"
    _DEFAULTS: ClassVar[dict[str, Any]] = _Layers._DEFAULTS | {"heads": 1}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.heads = _checked_size("heads", heads)
        if _checked_size("hidden_size", hidden_size) % heads:
            raise ValueError(f"heads must divide hidden_size, got {heads} and {hidden_size}")
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)

    def _shapes(self, width: int) -> Shapes:
        H, block = self.hidden_size, self.hidden_size // self.heads
        projection: Shapes = {} if width == H else {"weight_ih": (H, width), "bias_ih": (H,)}
        gates: Shapes = {f"weight_{gate}": (self.heads, block, block) for gate in "ri"} | {f"bias_{gate}": (H,) for gate in "ri"}
        return {**projection, **gates, "decay": (H,)}

    def reset_parameters(self) -> None:
        """As the class says."""
        bound = 1 / math.sqrt(self.hidden_size)
        for lane in range(len(self._lanes)):
            for name, parameter in self._parameters_of(lane).items():
                if name == "decay":
                    with torch.no_grad():
                        power = torch.empty(parameter.shape, dtype=torch.float64, device=parameter.device).uniform_(0.9, 0.999)
                        parameter.copy_((-power.log() / 8).expm1().log())
                elif name == "weight_ih":
                    nn.init.uniform_(parameter, -bound, bound)
                elif name.startswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=math.sqrt(self.heads / self.hidden_size))


@public
class QRNN(_Layers):
    """QRNN (Bradbury et al. 2016, "Quasi-Recurrent Neural Networks") over sequences, `fastseq.MinGRU`'s interface.

    Gates are causal convolutions of the input, of one step or two: W x_t, or W x_t + V x_{t-1}.

        z_t = tanh(W_z * x),    f_t, i_t, o_t = sigmoid(W_f * x), sigmoid(W_i * x), sigmoid(W_o * x)
        "f":    h_t = f_t h_{t-1} + (1 - f_t) z_t
        "fo":   c_t = f_t c_{t-1} + (1 - f_t) z_t,    h_t = o_t c_t
        "ifo":  c_t = f_t c_{t-1} + i_t z_t,          h_t = o_t c_t

    Args:
        input_size, hidden_size, num_layers, batch_first, dropout, bidirectional: as of `fastseq.MinGRU`.
        bias: whether the convolutions have one.
        window: steps of a convolution, 1 or 2. A segment's first step (backwards: its last) has zeros before it.
        pooling: ``"f"``, ``"fo"`` or ``"ifo"``.
        zoneout: probability with which f is one in a step of training, so that the state is kept; of ``"ifo"`` what i lets in is
            added to it, as the paper has it. At inference f is p + (1 - p) f, the mean.
        device, dtype: of the parameters.

    States are c (h of ``"f"``). With two steps hx and h_n are a pair, the states and the last inputs of all layers side by side,
    ``[D, B, I + (L-1)*D*H]`` in the input's dtype: with both a sequence goes on where it was cut.

    Parameters are ``weight_ih_l0`` ``[G*H, window, I]``, rows of W_f, W_i (``"ifo"``), W_z, W_o (but of ``"f"``), V after W in
    each; ``bias_ih_l0`` ``[G*H]``, and so on, uniform in +-1/sqrt(H).

    Raises:
        ValueError: if a size is not positive, ``window`` or ``pooling`` is none of these, ``dropout`` or ``zoneout`` is outside
            [0, 1].
        TypeError: if a number is none.
    """

    _DEFAULTS: ClassVar[dict[str, Any]] = _Layers._DEFAULTS | {"window": 1, "pooling": "fo", "zoneout": 0.0}

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        window: int = 1,
        pooling: str = "fo",
        zoneout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if checked_int("window", window) not in (1, 2):
            raise ValueError(f"window must be 1 or 2, got {window}")
        if pooling not in ("f", "fo", "ifo"):
            raise ValueError(f"pooling must be 'f', 'fo' or 'ifo', got {pooling!r}")
        check_zoneout(zoneout)
        self.window, self.pooling, self.zoneout = window, pooling, zoneout
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)

    @property
    def _CELL(self) -> str:  # type: ignore[override]
        return f"qrnn_{self.pooling}"

    def _shapes(self, width: int) -> Shapes:
        rows = (1 + len(self.pooling)) * self.hidden_size
        return {"weight_ih": (rows, self.window, width), "bias_ih": (rows,)}


@public
class LRU(_Layers):
    """LRU, the linear recurrent unit (Orvieto et al. 2023, "Resurrecting Recurrent Neural Networks for Long Sequences"), over
    sequences, `fastseq.MinGRU`'s interface: states are complex, and no gate reads anything.

        h_t = lambda h_{t-1} + gamma B x_t,    lambda = exp(-exp(nu) + i exp(theta))
        y_t = Re(C h_t) + D x_t

    |lambda| is below 1 whatever nu is. Nonlinearities between layers, if any, are what reads y.

    Args:
        input_size: I.
        hidden_size: H, the width of y.
        num_layers, batch_first, dropout, bidirectional: as of `fastseq.MinGRU`.
        bias: whether a bias joins y; the paper has none.
        state_size: N, of complex numbers. None: H.
        r_min, r_max, max_phase: lambda begins uniform in this ring and these angles from 0.
        device, dtype: of the parameters.

    Parameters are ``nu_log_l0`` and ``theta_log_l0`` (nu and theta above), ``gamma_log_l0`` ``[N]``, ``weight_b_l0`` ``[2N, I]``,
    ``weight_c_l0`` ``[H, 2N]`` (real and imaginary part in turn), ``weight_d_l0`` ``[H, I]``, ``bias_out_l0`` ``[H]``, and so on.
    They begin with gamma = sqrt(1 - |lambda|^2), B and C normal with variances 1/(2I) and 1/N of each part, D normal with
    variance 1/I, biases of zero. h_n is complex64 (complex128 for fp64).

    Raises:
        ValueError: if a size is not positive, ``dropout`` is outside [0, 1], or not 0 <= r_min < r_max <= 1 or 0 < max_phase.
        TypeError: if a number is none.
    """

    _CELL = "lru"
    _DEFAULTS: ClassVar[dict[str, Any]] = _Layers._DEFAULTS | {
        "bias": False,
        "state_size": None,
        "r_min": 0.0,
        "r_max": 1.0,
        "max_phase": 2 * math.pi,
    }

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        state_size: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.state_size = state_size if state_size is None else _checked_size("state_size", state_size)
        self.r_min, self.r_max = checked_number("r_min", r_min), checked_number("r_max", r_max)
        self.max_phase = checked_number("max_phase", max_phase)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"0 <= r_min < r_max <= 1 must hold, got {r_min} and {r_max}")
        if not max_phase > 0:
            raise ValueError(f"max_phase must be greater than zero, got {max_phase}")
        self._build(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype)

    def _shapes(self, width: int) -> Shapes:
        N, H = self.state_size or self.hidden_size, self.hidden_size
        rates: Shapes = {f"{name}_log": (N,) for name in ("nu", "theta", "gamma")}
        return {**rates, "weight_b": (2 * N, width), "weight_c": (H, 2 * N), "weight_d": (H, width), "bias_out": (H,)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the class says."""
        for lane in range(len(self._lanes)):
            found = self._parameters_of(lane)
            N, width = found["nu_log"].shape[0], found["weight_b"].shape[1]
            areas, phases = torch.rand(2, N, dtype=torch.float64, device=found["nu_log"].device).clamp(min=1e-12)
            nu = -(areas * (self.r_max**2 - self.r_min**2) + self.r_min**2).log() / 2
            found["nu_log"].copy_(nu.log())
            found["theta_log"].copy_((self.max_phase * phases).log())
            found["gamma_log"].copy_((-torch.expm1(-2 * nu)).log() / 2)
            for name, variance in (("weight_b", 1 / (2 * width)), ("weight_c", 1 / N), ("weight_d", 1 / width)):
                nn.init.normal_(found[name], std=math.sqrt(variance))
            if self.bias:
                nn.init.zeros_(found["bias_out"])
