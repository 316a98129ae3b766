"""The registered ops, one file each: schema, contract of the saved tensors, fake, autograd, call to a backend."""

from __future__ import annotations

from . import recurrent

OPS = ("recurrent",)

__all__ = ["OPS", "recurrent"]
