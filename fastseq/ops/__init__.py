"""The registered ops, one file each: schema, contract of the saved tensors, fake, autograd, call to a backend."""

from __future__ import annotations

from . import attention, attention_decode, recurrent

OPS = ("recurrent", "attention", "attention_decode")

__all__ = ["OPS", "attention", "attention_decode", "recurrent"]
