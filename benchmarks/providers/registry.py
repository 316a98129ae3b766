"""Every program that a suite can ask for, by name."""

from __future__ import annotations

from .attention import ATTENTION_PROVIDERS
from .base import PROVIDERS
from .cells import CELL_PROVIDERS
from .decode import DECODE_PROVIDERS
from .limits import LIMIT_PROVIDERS
from .linear import LINEAR_PROVIDERS
from .models import MODEL_PROVIDERS
from .onnx_attention import ONNX_ATTENTION_PROVIDERS
from .onnx_runtime import ONNX_PROVIDERS
from .pack import PACK_PROVIDERS
from .ranks import RANK_PROVIDERS
from .recurrent import RECURRENT_PROVIDERS
from .resets import RESET_PROVIDERS
from .scan import SCAN_PROVIDERS
from .stacks import STACK_PROVIDERS
from .systems import SYSTEM_PROVIDERS
from .variable_length import VARIABLE_PROVIDERS

EVERY_PROVIDER = PROVIDERS | RECURRENT_PROVIDERS | CELL_PROVIDERS | ATTENTION_PROVIDERS | DECODE_PROVIDERS | VARIABLE_PROVIDERS
EVERY_PROVIDER |= (
    SCAN_PROVIDERS
    | LINEAR_PROVIDERS
    | RESET_PROVIDERS
    | MODEL_PROVIDERS
    | LIMIT_PROVIDERS
    | STACK_PROVIDERS
    | ONNX_PROVIDERS
    | ONNX_ATTENTION_PROVIDERS
    | PACK_PROVIDERS
    | RANK_PROVIDERS
    | SYSTEM_PROVIDERS
)
