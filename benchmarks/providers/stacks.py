"""Stacks of fastseq.models, of as many parameters: LSTMs, attention blocks that see all or what came before, one of each."""

from __future__ import annotations

from ..workloads.statements import own_stack
from .base import Provider, fastseq_chose, fastseq_missing

LSTMS, ENCODER, DECODER, HYBRID = ("fastseq LSTMs", "fastseq encoder", "fastseq decoder", "fastseq LSTM and block")

STACK_PROVIDERS = {
    name: Provider(name, function, "batch", own_stack, fastseq_missing("models"), fastseq_chose, color)
    for name, function, color in (
        (LSTMS, "lstms", "#1e88e5"),
        (ENCODER, "encoder", "#9467d6"),
        (DECODER, "decoder", "#c454b8"),
        (HYBRID, "both", "#d55e00"),
    )
}
