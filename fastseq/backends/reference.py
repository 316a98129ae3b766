"""The reference, as a backend: runs everything, everywhere, slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..reference import recurrent

if TYPE_CHECKING:
    from . import Query

name = "reference"
devices = ("any",)
ops = ("recurrent",)

recurrent_forward = recurrent.forward
recurrent_backward = recurrent.backward


def available() -> str | None:
    return None


def why_not(query: Query) -> list[str]:
    return []
