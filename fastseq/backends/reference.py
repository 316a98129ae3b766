"""The reference, as a backend: runs everything, everywhere, slowly."""

from __future__ import annotations

from ..reference import recurrent

name = "reference"
devices = ("any",)
ops = ("recurrent",)

recurrent_forward = recurrent.forward
recurrent_backward = recurrent.backward


def available() -> str | None:
    return None


def why_not(query) -> list[str]:
    return []
