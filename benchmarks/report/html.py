"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..measure.environment import dates
from ..measure.results import Results
from . import reproduce
from .findings import Verdict
from .model import NARROW, Figure, Section, as_cell, sides
from .plots import finding, style
from .quality import notes, status

CARDS = 3  # headline figures under the title
TEMPLATES = Path(__file__).resolve().parent / "templates"


def page(title: str, results: Results, sections: Sequence[Section], verdicts: Sequence[Verdict], headline: Figure | None) -> str:
    """The HTML page; `headline` is the figure on top."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    names = (f"figure-{n}" for n in count(1))
    return templates.get_template("report.html.j2").render(
        title=title,
        results=results,
        env=results.environment,
        sections=sections,
        svg=lambda figure: Markup(style.svg(figure, name=next(names))),
        headline=headline,
        verdicts=verdicts,
        claim_figures=finding.figures,
        status=status(results),
        notes=notes(results),
        cards=[card for section in sections for card in section.cards][:CARDS],
        missing=list(dict.fromkeys(name for v in verdicts if not v.measured for name in v.missing)),
        anchor=anchor,
        dates=dates(results.environment.get("time", "")),
        restarts=max((row.restarts["count"] for row in results.rows if row.restarts), default=1),
        watched=any(row.contention for row in results.rows),
        wrong=[r for r in results.rows if r.status == "wrong"],
        as_cell=as_cell,
        sides=sides,
        narrow=NARROW,
        environment_rows=list(_flatten(results.environment)),
        commands=reproduce.commands(results),
    )


def anchor(title: str) -> str:
    """For a link to a section."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name} · ")
        elif value is not None:
            yield f"{prefix}{name}", str(value)
