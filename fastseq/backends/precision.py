"""Which products of fp32 numbers a recurrence on a GPU may round to TF32."""

from __future__ import annotations

import torch


def fp32_precision() -> str:
    """As torch's own flag for cuDNN's RNNs says: "tf32" or "ieee"."""
    return "tf32" if getattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32") == "tf32" else "ieee"
