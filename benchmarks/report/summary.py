"""A run in one picture, 1200 by 630 pixels: what is shown where somebody shares the report."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas

from ..measure.environment import where
from ..measure.results import Results
from .model import Card, Figure
from .plots import style
from .quality import status

SIZE = (12.0, 6.3)  # inches
DPI = 100
TONES = {"good": "#0a5c9c", "bad": "#a84300", "part": "#55408a", "": style.LIGHT.ink}
SOFT = "#5b6478"
FINER = 1.25  # how much smaller a figure is than drawn alone
WRAP = 34  # letters of a card's label in a line
LEFT = 0.035  # where lines begin, and how far from the right edge they end at the latest, in widths of the picture


def save(path: Path, title: str, results: Results, cards: Sequence[Card], figure: Figure | None) -> None:
    draw(title, results, cards, figure).savefig(path, metadata={"Software": None})


def draw(title: str, results: Results, cards: Sequence[Card], figure: Figure | None) -> Canvas:
    """Title, device, commit, date and versions, headline figures, one plot, how far all that may be trusted."""
    canvas = Canvas(figsize=SIZE, dpi=DPI, facecolor=style.LIGHT.paper)
    left, top = LEFT, 0.93
    _line(canvas, top, title, 24, weight="bold", color=style.LIGHT.ink)
    versions = results.environment.get("versions", {})
    told = [f"{name} {versions[name]}" for name in ("fastseq", "torch") if name in versions]
    line = ", ".join([where(results.environment), *told])
    _line(canvas, top - 0.075, line, 13, color=SOFT)
    for place, card in enumerate(cards):
        height = 0.75 - 0.25 * place
        canvas.text(
            left, height, card.value, fontsize=27, weight="bold", color=TONES.get(card.tone, style.LIGHT.ink), va="center"
        )
        label = textwrap.fill(card.label, WRAP)
        canvas.text(left, height - 0.05, label, fontsize=10.5, color=SOFT, va="top", linespacing=1.35)
    quality = status(results)
    _line(canvas, 0.035, quality.text, 11.5, color=TONES[quality.tone])
    if figure is not None:
        _place(canvas, figure, (0.3 if cards else left, 0.08, 0.68 if cards else 0.93, 0.74))
    return canvas


def _line(canvas: Any, height: float, words: str, size: float, **look: Any) -> None:
    """A line across the picture, in smaller letters if it were too long."""
    text = canvas.text(LEFT, height, words, fontsize=size, va="center", **look)
    width = text.get_window_extent(FigureCanvasAgg(canvas).get_renderer()).width
    text.set_fontsize(size * min(1.0, (1 - 2 * LEFT) * SIZE[0] * DPI / width))


def _place(canvas: Any, figure: Figure, box: tuple[float, float, float, float]) -> None:
    """The figure drawn to fill a box, which is in fractions of the picture."""
    shape = (box[2] * SIZE[0] * FINER, box[3] * SIZE[1] * FINER)
    buffer = io.BytesIO()
    style.draw(replace(figure, size=shape), style.LIGHT).savefig(buffer, format="png", dpi=2 * DPI)
    buffer.seek(0)
    axes = canvas.add_axes(box)
    axes.imshow(matplotlib.image.imread(buffer), interpolation="antialiased")
    axes.set_anchor("N")
    axes.axis("off")
