"""Recurrent layers whose gates read the input alone: the steps are a scan, and nothing but it goes from one to the next.

With torch.nn's conventions: constructor, shapes, names of parameters, errors. What they give up is a gate that reads the state: a
parity of bits, which a GRU counts exactly, stays at chance with any number of such layers whose coefficients are positive.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastseq import functional
from fastseq._arguments import checked_int, checked_number
from fastseq.modules._checks import public

__all__ = ["MinGRU", "MinGRUCell"]


def _checked_size(name: str, value: int) -> int:
    if checked_int(name, value) <= 0:
        raise ValueError(f"{name} must be greater than zero, got {value}")
    return value


def _reset(module: nn.Module, hidden_size: int) -> None:
    bound = 1 / math.sqrt(hidden_size)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound)


@public
class MinGRU(nn.Module):
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

    Parameters are ``weight_ih_l0`` ``[2H, I]``, rows of W_z, then of W_h, ``bias_ih_l0`` ``[2H]``, and so for every layer, with
    ``_reverse`` at the end for its way back; uniform in +-1/sqrt(H).

    Raises:
        ValueError: if a size is not positive, or ``dropout`` is outside [0, 1].
        TypeError: if a number is none.
    """

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
        super().__init__()
        self.input_size, self.hidden_size = _checked_size("input_size", input_size), _checked_size("hidden_size", hidden_size)
        self.num_layers = _checked_size("num_layers", num_layers)
        if not 0 <= checked_number("dropout", dropout) <= 1:
            raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        self._names: list[str] = []
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * (2 if bidirectional else 1)
            for suffix in ("", "_reverse")[: 2 if bidirectional else 1]:
                shapes = {"weight": (2 * hidden_size, width), "bias": (2 * hidden_size,)}
                for kind in ("weight", "bias") if bias else ("weight",):
                    name = f"{kind}_ih_l{layer}{suffix}"
                    setattr(self, name, nn.Parameter(torch.empty(shapes[kind], device=device, dtype=dtype)))
                    self._names.append(name)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(H), as torch.nn.GRU's."""
        _reset(self, self.hidden_size)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(output, h_n)``, as `fastseq.functional.min_gru` describes them.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or unbatched ``[T, I]``.
            hx: ``[L*D, B, H]``, unbatched ``[L*D, H]``. None: zeros.
            lengths: ``[B]``, valid steps of each row.
            resets: bool ``[T, B]`` (``[B, T]``, ``[T]``): where a new segment begins.

        Returns:
            output ``[T, B, D*H]`` as the input, and the final states h_n as hx, in fp32 (fp64 for fp64).

        Raises:
            RuntimeError: if ranks, sizes, dtypes, devices, ``lengths`` or ``resets`` do not fit.
            TypeError: if an argument is no Tensor, a PackedSequence among them.
        """
        return functional.min_gru(
            input,
            hx,
            [getattr(self, name) for name in self._names],
            has_biases=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            lengths=lengths,
            resets=resets,
        )

    def extra_repr(self) -> str:
        said = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        said += [f"{name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default]
        return ", ".join(said)

    if TYPE_CHECKING:
        __call__ = forward


@public
class MinGRUCell(nn.Module):
    """One step of `fastseq.MinGRU`: h from h. Steps in turn are the sequence.

    Args:
        input_size: I.
        hidden_size: H.
        bias: whether there are b_z and b_h.

    Parameters are ``weight_ih`` ``[2H, I]`` and ``bias_ih`` ``[2H]``.

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
        _reset(self, self.hidden_size)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state after the step, ``[B, H]``, in fp32 (fp64 for fp64).

        Args:
            input: ``[B, I]``, or unbatched ``[I]``.
            hx: the state before, ``[B, H]`` or ``[H]``. None: zeros.

        Raises:
            RuntimeError: if ranks, sizes or dtypes do not fit.
            TypeError: if an argument is no Tensor.
        """
        return functional.min_gru_cell(input, hx, self.weight_ih, self.bias_ih)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")

    if TYPE_CHECKING:
        __call__ = forward
