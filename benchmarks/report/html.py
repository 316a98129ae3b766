"""The report as one HTML page that needs nothing but itself, and the page that lists several reports."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from ..measure.environment import dates
from ..measure.results import Results
from . import reproduce
from .findings import Verdict
from .model import NARROW, Card, Curve, Figure, Section, as_cell, sides
from .plots import finding, style
from .quality import Status, notes, status

CARDS = 3  # headline figures under the title
PICTURE = "summary.png"  # beside the page: what is shown where somebody shares it
TEMPLATES = Path(__file__).resolve().parent / "templates"


class Listed(NamedTuple):
    """A report in a list of them: its folder, and what its page says first."""

    folder: str
    title: str
    where: str
    status: Status
    suites: list[str]


def page(title: str, results: Results, sections: Sequence[Section], verdicts: Sequence[Verdict], headline: Figure | None) -> str:
    """The HTML page; `headline` is the figure on top."""
    anchors = _Anchors()
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            title=title,
            results=results,
            env=results.environment,
            sections=sections,
            picture=_Pictures(
                [*([headline] if headline else []), *(figure for section in sections for figure in section.figures)]
            ),
            headline=headline,
            verdicts=verdicts,
            claim_figures=finding.figures,
            status=status(results),
            notes=notes(results),
            cards=cards(sections),
            missing=list(dict.fromkeys(name for v in verdicts if not v.measured for name in v.missing)),
            ids=[anchors(section.title) for section in sections],
            anchor=anchors,
            summary=PICTURE,
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
    )


def cards(sections: Sequence[Section]) -> list[Card]:
    """The headline figures of a run."""
    return [card for section in sections for card in section.cards][:CARDS]


def index(title: str, reports: Sequence[Listed]) -> str:
    """A page with a picture of each report and a link to it."""
    return _templates().get_template("index.html.j2").render(title=title, reports=reports, summary=PICTURE)


def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )


class _Pictures:
    """Figures as they are placed on a page. A curve has one figure, the first of `first` that has it or else the first that is
    placed: a figure whose curves are all elsewhere is a link to there."""

    def __init__(self, first: Sequence[Figure]) -> None:
        self.of_curve: dict[Curve, tuple[str, str]] = {}  # id and title of a figure
        self.names: dict[int, str] = {}  # of the figures that are drawn, by identity
        for figure in first:
            self._name(figure)

    def _name(self, figure: Figure) -> str | None:
        """Its id; None: there is nothing new in it."""
        new = figure.curves - self.of_curve.keys()
        if id(figure) not in self.names and (new or not figure.curves):
            self.names[id(figure)] = name = f"figure-{len(self.names) + 1}"
            self.of_curve |= dict.fromkeys(new, (name, figure.title))
        return self.names.get(id(figure))

    def __call__(self, figure: Figure) -> Markup:
        name = self._name(figure)
        if name is None:
            places = dict.fromkeys(self.of_curve[curve] for curve in sorted(figure.curves))
            links = (Markup('<a href="#{}">{}</a>').format(*place) for place in places)
            return Markup('<p class="soft">These curves are in {}.</p>').format(Markup(" and ").join(links))
        return Markup('<figure id="{}"><div class="scroll">{}</div><figcaption>{}</figcaption></figure>').format(
            name, Markup(style.svg(figure, name=name)), figure.caption
        )


class _Anchors:
    """Ids of headings, each once on a page."""

    def __init__(self) -> None:
        self.given: Counter[str] = Counter()

    def __call__(self, *titles: str) -> str:
        name = anchor(" ".join(titles))
        self.given[name] += 1
        return name if self.given[name] == 1 else f"{name}-{self.given[name]}"


def anchor(title: str) -> str:
    """For a link to a heading."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name} · ")
        elif value is not None:
            yield f"{prefix}{name}", str(value)
