"""Fast kernels for sequence models: drop-in recurrent modules, and what sequential recurrence costs against parallel attention.

``import fastseq`` needs neither a GPU, nor Triton, nor the compiled library; ``python -m fastseq info`` tells what is there.
"""

from . import functional
from .backends import explain, use_backend

__version__ = "0.1.0"

__all__ = ["explain", "functional", "use_backend"]
