"""What PyTorch's tools that look at modules are to find: torch.fx, torch.jit.script, eager-mode quantization."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.fx import Proxy

# As torch has them, whatever `fastseq.patched` puts in their place.
TORCH_CLASSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.RNN,
        nn.LSTM,
        nn.GRU,
        nn.RNNCell,
        nn.LSTMCell,
        nn.GRUCell,
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
    )
}


def as_leaf(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The node of a graph that torch.fx traces: a call of the whole module, as of torch.nn's modules.

    Arguments are those of `forward`, of which one is a `Proxy`; None is what is not given.
    """
    given = list(args)
    while given and given[-1] is None:
        given.pop()
    named = {name: value for name, value in kwargs.items() if value is not None}
    tracer: Any = next(value for value in (*given, *named.values()) if isinstance(value, Proxy)).tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), tuple(given), named)


class Interop(nn.Module):
    """A module that torch.jit.script and eager-mode quantization find out about."""

    # Whether torch.ao would quantize torch.nn's class dynamically too.
    _quantized_dynamically = True

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script, which compiles the source of `forward`, takes instead: torch.nn's class, on the same parameters.

        It also stands in the module that holds this one then.

        Raises:
            NotImplementedError: for what torch.nn does not have.
        """
        kind = type(self)
        torch_class = vars(kind).get("stands_for")
        if torch_class is None and kind.__module__.startswith("fastseq."):
            torch_class = TORCH_CLASSES.get(kind.__name__)
        own = [option for option in ("zoneout", "weight_dropout", "solver") if getattr(self, option, 0)]
        own += ["num_heads"] if isinstance(self, nn.RNNBase) and self.num_heads != 1 else []
        if torch_class is None or own:
            what = f"{kind.__name__} with {', '.join(own)}" if own else kind.__name__
            raise NotImplementedError(
                f"torch.jit.script: torch.nn has no {what}, and TorchScript cannot compile fastseq's; "
                "torch.export and torch.jit.trace take it"
            )
        warnings.warn(
            "torch.jit.script compiles torch.nn's modules in the place of fastseq's, with the same parameters, and leaves them "
            "in the model: fastseq.convert it again if it goes on without TorchScript",
            stacklevel=2,
        )
        twin = torch_class.__new__(torch_class)
        object.__setattr__(twin, "__dict__", self.__dict__)  # so that both stay one module, whatever becomes of it
        return twin

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig" and (value is not None or self._quantized_dynamically):  # quantization begins so
            warnings.warn(
                f"torch.ao.quantization knows torch.nn's classes alone and leaves {type(self).__name__} in floating point: "
                "fastseq.revert(model) first, if it is to be quantized",
                stacklevel=2,
            )
        super().__setattr__(name, value)
