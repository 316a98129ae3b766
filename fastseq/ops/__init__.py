"""The registered ops, one file each: schema, contract of the saved tensors, fake, autograd, call to a backend.

``types.py`` holds their arguments and results. Nothing is imported here, so that backends and the reference can import it.
"""

from __future__ import annotations

OPS = ("recurrent", "attention", "attention_decode", "scan")

__all__ = ["OPS"]
