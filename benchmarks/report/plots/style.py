"""How figures look: colors, axes, labels at the ends of lines. Drawn by matplotlib, as SVG or PNG."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from ..model import Figure

# Stand-ins that the page replaces by its own colors, so that a figure follows light and dark mode.
_INK, _FAINT = "#010203", "#040506"


FONTS = "DejaVu Sans, Verdana, sans-serif"  # the first is what widths were computed with, the second is as wide
LEGIBLE, LARGE = 1.1, 1.8  # pixels for each point of a figure: it scrolls before it gets smaller, and does not get larger


@dataclass(frozen=True)
class Theme:
    ink: str
    faint: str
    paper: str | None  # None: transparent


LIGHT = Theme("#1f2430", "#d9dce3", "#ffffff")
DARK = Theme("#e6e8ee", "#3a4150", "#12151c")
PAGE = Theme(_INK, _FAINT, None)
AUTO = Theme(_INK, _FAINT, None)  # in a file of its own: light or dark as its reader's screen
THEMES = {"auto": AUTO, "light": LIGHT, "dark": DARK}
# On either background the colors of the lines have contrast.
_COLORS = [f"svg {{ color: {theme.ink}; --line: {theme.faint}; background: {theme.paper}; }}" for theme in (LIGHT, DARK)]
_STYLE = f"<style>{_COLORS[0]} @media (prefers-color-scheme: dark) {{ {_COLORS[1]} }}</style>"


def draw(figure: Figure, theme: Theme) -> Canvas:
    canvas = Canvas(figsize=figure.size, layout="constrained", facecolor=theme.paper or "none")
    figure.draw(canvas, theme)
    return canvas


def svg(figure: Figure, theme: Theme = PAGE, *, name: str = "figure") -> str:
    """An <svg> element without resources from elsewhere. The same figure gives the same text."""
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(settings):
        buffer = io.StringIO()
        draw(figure, theme).savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    found = buffer.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>\s*", "", found, flags=re.DOTALL)
    found = re.sub(r"font-family: [^;\"]*", f"font-family: {FONTS}", found)
    if theme is PAGE:
        found = re.sub(
            r'<g id="[^"]*"', "<g", found[found.index("<svg") :]
        )  # the same in every figure, and nothing refers to them
        title, alt = html.escape(figure.title), html.escape(figure.alt or figure.caption)
        least, most = (round(figure.size[0] * 72 * scale) for scale in (LEGIBLE, LARGE))
        found = re.sub(
            r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
            lambda m: (
                f'<svg class="figure" viewBox="{m[1]}" style="min-width: {least}px; max-width: {most}px" role="img" '
                f'aria-labelledby="{name}-t {name}-d">'
                f'<title id="{name}-t">{title}</title><desc id="{name}-d">{alt}</desc>'
            ),
            found,
            count=1,
        )
    elif theme is AUTO:
        found = re.sub(r"(<svg [^>]*>)", lambda m: m[1] + _STYLE, found, count=1)
    return found.replace(_INK, "currentColor").replace(_FAINT, "var(--line)")


def luminance(color: Sequence[float]) -> float:
    """Of red, green and blue from 0 to 1, as WCAG 2 has it."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """1 to 21; words need 4.5, lines 3 (WCAG 2, level AA)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def save(figure: Figure, path: Any, theme: Theme) -> None:
    """As SVG or PNG, by the suffix of `path`. Raises ValueError for another one."""
    suffix = str(path).rpartition(".")[2].lower()
    if suffix == "svg":
        with open(path, "w") as file:
            file.write(f"{svg(figure, theme, name='picture')}<!-- matplotlib {matplotlib.__version__} -->\n")
    elif suffix == "png":
        draw(figure, LIGHT if theme is AUTO else theme).savefig(path, dpi=160, metadata={"Software": None})
    else:
        raise ValueError(f"a picture ends in .svg or .png, not in {path}")


def log_axes(
    axes: Any,
    theme: Theme,
    *,
    title: str,
    x: list[float],
    y_format: Any,
    y_base: int = 10,
    x_label: str = "T, sequence length",
) -> None:
    """log-log axes with a tick at every measured x and at powers of `y_base`."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=y_base)
    plain(axes, theme, title)
    axes.set_xticks(x, [f"{v:g}" for v in x])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: y_format(v)))
    axes.set_xlabel(x_label, color=theme.ink, fontsize=9)
    axes.grid(True, which="major", color=theme.faint, linewidth=0.7)


def plain(axes: Any, theme: Theme, title: str) -> None:
    axes.set_facecolor("none")
    axes.set_title(title, color=theme.ink, fontsize=10.5, loc="left", pad=8)
    axes.tick_params(which="both", colors=theme.ink, labelsize=8.5, length=0)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.faint)


def end_labels(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """Labels beside the last points [(y, text, color)], pushed apart, in the ink of the axes' ticks, which words need to be read;
    what leads to them has the color of the line. The axis limits must be final."""
    ink = axes.yaxis.get_tick_params()["labelcolor"]
    low, high = (math.log(v) for v in axes.get_ylim())
    ends = sorted(ends)
    heights = [(math.log(y) - low) / (high - low) for y, _, _ in ends]
    gap = 0.2 / (axes.get_position().height * axes.figure.get_size_inches()[1])  # a line of text, in axes heights
    for at, y, (_, text, color) in zip(_apart(heights, gap), heights, ends, strict=True):
        line = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 1.4,
            "shrinkA": 0,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            text,
            xy=(1.0, y),
            xytext=(1.06, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8.5,
            va="center",
            color=ink,
            annotation_clip=False,
            arrowprops=line,
        )


def _apart(places: list[float], gap: float) -> list[float]:
    """Ascending places at least `gap` apart: the mean of pushing all of them up and all down, but none into the title above 1."""
    up, down = list(places), list(places)
    for i in range(1, len(places)):
        up[i] = max(up[i], up[i - 1] + gap)
    for i in range(len(places) - 2, -1, -1):
        down[i] = min(down[i], down[i + 1] - gap)
    found = [(a + b) / 2 for a, b in zip(up, down, strict=True)]
    most = 1.0
    for i in range(len(found) - 1, -1, -1):
        found[i] = min(found[i], most)
        most = found[i] - gap
    return found
