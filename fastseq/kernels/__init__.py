"""Triton kernels. In a checkout they live in the top-level folder `kernels/`."""

from fastseq import _checkout

__path__ = _checkout.extend(__path__, "kernels")
