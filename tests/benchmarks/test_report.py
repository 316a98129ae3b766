from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO

import matplotlib.image
import numpy as np
import pytest
from markupsafe import escape
from rich.console import Console

from fastseq.benchmarks import assembly, publish
from fastseq.benchmarks.claims import table as claims
from fastseq.benchmarks.measure import environment
from fastseq.benchmarks.measure.results import Results, write_csv
from fastseq.benchmarks.report import html, quality, summary
from fastseq.benchmarks.report.findings import Finding, Part, Verdict
from fastseq.benchmarks.report.model import Figure, Table, curve_of, sides
from fastseq.benchmarks.report.plots import finding, style
from fastseq.benchmarks.suites import SUITES


@pytest.fixture(scope="module")
def results(synthetic):
    providers = (
        "eager LSTMCell loop",
        "torch.nn.LSTM",
        "torch.nn.GRU",
        "fused attention",
        "naive attention",
        "attention block",
    )
    found = synthetic.lengths({name: (lambda T, k=k: k * 1e-5 * T**1.2) for k, name in enumerate(providers, 1)})
    other = synthetic.grid(lambda group, mode, cell, B, H: 0.8 if B == 1 else 2.5)
    found.rows += [row for row in other.rows if row.group != "data"]
    found.rows += synthetic.alone(lambda kind, provider, T: 1e-8 * T**1.5 + 1e-6 * len(provider)).rows
    single = synthetic.single(lambda group, w: w.H / 256)
    found.rows += [row for row in single.rows if row.group == "step"]
    found.rows += synthetic.machine(lambda w: 1e10).rows
    wrong = found.rows[3]
    wrong.status, wrong.reason, wrong.time = "wrong", "output is off by 1 <b>", None
    return found


@pytest.fixture(scope="module")
def page(results):
    """Drawn once: it has many pictures."""
    return assembly.page(results)


class Page(HTMLParser):
    VOID = {"meta", "br", "link", "img", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                self.resources.append(value or "")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(results, page):
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    assert [r for r in parsed.resources if not r.startswith(("#", "data:"))] == []
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", page)
    assert page.count("<svg") + page.count("These curves are in") == len(report_figures(results))
    references = set(re.findall(r"url\(#([^)]+)\)", page)) | {r[1:] for r in parsed.resources if r.startswith("#")}
    assert references <= set(re.findall(r'\bid="([^"]+)"', page))


def test_no_plot_is_drawn_twice(results, page):
    """A training step is the figure on top; claims and the suite's own section lead there."""
    links = re.findall(r'These curves are in <a href="#([\w-]+)">', page)
    assert len(links) >= 5 and links.count("figure-1") >= 4
    assert set(links) <= set(re.findall(r'<figure id="([\w-]+)"', page))
    pictures = html._Pictures([])
    lines = {name: curve_of(name, {1: k, 2: 2 * k}) for k, name in enumerate("abc", 1)}
    figures = [
        Figure(names, "", lambda canvas, theme: canvas.subplots(), (3, 2), curves=frozenset(lines[n] for n in names))
        for names in ("ab", "b", "bc", "ac", "a")
    ]
    placed = [str(pictures(figure)) for figure in figures]
    assert ["<svg" in text for text in placed] == [True, False, True, False, False]
    assert '#figure-1">ab</a>.' in placed[1] and '">ab</a> and <a href="#figure-2">bc</a>' in placed[3]
    assert "<svg" in str(html._Pictures(figures[::-1])(figures[4])), "those that come first in the order have the curve"


def test_contents_and_permalinks(page):
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    (contents,) = re.findall(r'<nav aria-label="Contents">.*?</nav>', page)
    titles = re.findall(r'<h2 id="([^"]+)">', page)
    assert re.findall(r'href="#([^"]+)"', contents) == titles and len(titles) > 8
    for name in re.findall(r'<h[23] id="([^"]+)">', page):
        assert f'<a class="here" href="#{name}"' in page


def test_a_verdict_is_twelve_words_and_the_rest_is_folded(results, page):
    open_text = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    measured = [v for v in claims.verdicts(results) if v.measured]
    assert len(measured) > 3
    for v in measured:
        assert len(v.brief.split()) <= 12
        for found in v.findings:
            if not found.void:
                figures = str(escape(found.figures))
                assert figures in page and figures not in open_text
    long = Part("fails", "fails since " + "word " * 20)
    assert Verdict("", "", "", "", (Finding("", (long,), ""),), ()).brief == "fails"


def test_nothing_about_kernels_of_gpus_on_a_cpu(results, page):
    """But for a GPU, where the row says why it could not run."""
    assert "(cuda)" not in page and any("(cuda)" in row.provider for row in results.rows)
    on_gpu = Results(
        results.environment | {"device": "cuda"}, results.options, [r for r in results.rows if "(cuda)" in r.provider]
    )
    assert assembly.shown(on_gpu).rows == on_gpu.rows != assembly.shown(replace(on_gpu, environment=results.environment)).rows


def test_the_summary_tells_title_device_and_date(results, tmp_path):
    assembly.picture(results, tmp_path / "a.png")
    image = matplotlib.image.imread(tmp_path / "a.png")
    assert image.shape[:2] == (630, 1200) and len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 50
    assembly.picture(results, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    parts = assembly.sections(results)
    said = " ".join(text.get_text() for text in summary.draw(assembly.title(results), results, html.cards(parts), None).texts)
    for part in ("RNN vs attention on A <fast> CPU & more (2 vCPU)", "2030-01-01", "torch 2.13.0"):
        assert part in said
    assert html.cards(parts)[0].value in said and quality.status(results).text in said


def test_a_site_of_committed_results(results, synthetic, tmp_path, capsys):
    """Files that belong together make one report, those of another version their own."""
    single = synthetic.single(lambda group, w: 1.5)
    single.rows = [row for row in single.rows if (row.group, row.mode) == ("step", "inference")]
    grid = replace(single, rows=[row for row in single.rows if row.function == "grucell"])
    other = replace(grid, environment=grid.environment | {"versions": {"python": "3.12.0", "torch": "2.12.0"}})
    for name, found in (("alone/results.json", single), ("mixed/one/results.json", grid), ("mixed/two/results.json", other)):
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        found.save(tmp_path / "results" / name)
    assert publish.main([str(tmp_path / "site"), "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "site/index.html").read_text()
    links = set(re.findall(r'(?:href|src)="([^"#]+)"', text))
    assert {link for link in links if link.endswith("report.html")} == {
        "alone/report.html",
        "mixed-one/report.html",
        "mixed-two/report.html",
    }
    assert len(links) == 12 and all((tmp_path / "site" / link).is_file() for link in links)
    assert "fastseq benchmarks on A &lt;fast&gt; CPU &amp; more (2 vCPU), float32" in text and "2030-01-01" in text
    with pytest.raises(SystemExit):
        publish.main([str(tmp_path / "site"), "--results", str(tmp_path / "nowhere")])
    assert "there is no results.json under" in capsys.readouterr().err


def report_figures(results):
    """The headline, those of the claims, those of the sections."""
    of_claims = [f for v in claims.verdicts(results) for found in v.findings for f in finding.figures(found)]
    return ["headline", *of_claims, *(f for section in assembly.sections(results) for f in section.figures)]


def test_every_picture_is_described(page):
    found = re.findall(r'<svg class="figure"[^>]* role="img" aria-labelledby="([\w-]+) ([\w-]+)"><title id="([\w-]+)">([^<]+)'
                       r'</title><desc id="([\w-]+)">([^<]+)</desc>', page)  # fmt: skip
    assert len(found) == page.count("<svg") and len({f[0] for f in found}) == len(found)
    for title_label, alt_label, title_id, title, alt_id, alt in found:
        assert (title_label, alt_label) == (title_id, alt_id) and len(title) > 3 and len(alt) > 20


def test_the_page_shows_claims_maps_rooflines_and_how_to_reproduce(results, page):
    for part in (
        "Speed-up over batch and width, rows of equal length, forward",
        "Distance to the roofline, forward",
        "How to reproduce it",
    ):
        assert part in page
    assert "python -m fastseq bench --suite sequential-vs-parallel --suite recurrent" in page
    assert page.count('<article class="claim"') == sum(v.measured for v in claims.verdicts(results))
    assert "python -m fastseq bench --suite decode" in page
    assert "slower at 2 of 4 points: B = 1, H = 64, B = 1, H = 256" in page


def test_the_page_escapes_what_it_shows(page):
    assert "A &lt;fast&gt; CPU &amp; more" in page
    assert "output is off by 1 &lt;b&gt;" in page and "off by 1 <b>" not in page


def test_page_and_terminal_show_what_went_wrong(results, page):
    out = StringIO()
    assembly.show(results, Console(file=out, width=160))
    for text in (page, out.getvalue()):
        for part in (
            "wrong result",
            "not reached",
            "Points that fastseq loses",
            "0.80×",
            "hold here",
            "torch.nn.GRU",
        ):
            assert part in text, part
    assert "WRONG RESULT" in out.getvalue()


def test_a_busy_machine_is_mentioned(results, page):
    def status(**environment):
        return quality.status(Results({**results.environment, **environment}, {})).text

    assert "load 1.9 on 2 CPUs" in status(**{"load average": 1.9})
    assert "used 30% of the CPU" in status(**{"cpu used by others": 0.3})
    assert "load" not in status(**{"load average": 1.9, "cpu used by others": 0.01})
    assert quality.status(results).text in page
    assert all(note in page for note in quality.notes(results)) and "A quick run" in page


def test_cpu_time_of_others(monkeypatch):
    times = iter([(100.0, 50.0, 10.0), (120.0, 54.0, 20.0)])  # 20 s in all, 4 idle, 10 of its own: 6 of others
    monkeypatch.setattr(environment.Others, "_times", staticmethod(lambda: next(times)))
    assert environment.Others().share() == pytest.approx(0.3)


def test_labels_are_pushed_apart_and_keep_their_order():
    found = style._apart([0.1, 0.5, 0.5, 0.52, 0.9], gap=0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(found, found[1:], strict=False))
    assert found[0] == 0.1 and found[-1] == 0.9
    assert sum(found[1:4]) / 3 == pytest.approx(0.51, abs=0.02)
    high = style._apart([0.5, 0.97, 0.98, 0.99], gap=0.1)  # the title begins above 1
    assert high == pytest.approx([0.5, 0.8, 0.9, 1.0])


def test_numbers_are_set_right_and_words_left():
    table = Table(
        "",
        ["", "time", "bound by", "grows as"],
        [["a", "1.0 ms", "weights", "T¹·⁰⁰"], ["b", "–", "arithmetic", "–"]],
    )
    assert sides(table) == ["left", "right", "left", "right"]


def test_the_same_results_give_the_same_page(synthetic):
    results = synthetic.single(lambda group, w: w.H / 256)
    results.rows = [row for row in results.rows if (row.group, row.mode, row.function) == ("step", "inference", "lstmcell")]
    assert assembly.page(results) == assembly.page(results)


def test_json_round_trip(results, tmp_path):
    path = tmp_path / "results.json"
    results.save(path, **assembly.derive(results))
    again = Results.load(path)
    assert again == results
    assert assembly.derive(again) == assembly.derive(results)
    derived = json.loads(path.read_text())["derived"]
    assert {v["claim"] for v in derived["verdicts"]} >= {"parallel-ops", "memory-less"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a result file"),
        ('{"schema": "other"}', "not a result file"),
        ('{"schema": "fastseq-benchmark", "version": 99}', "version 99; this fastseq reads version 2"),
        ('{"schema": "fastseq-benchmark", "version": 2}', "does not have the fields"),
        (
            '{"schema": "fastseq-benchmark", "version": 2, "environment": {}, "options": {}, "peaks": [],'
            ' "seconds": 1, "rows": [{"x": 1}]}',
            "does not have the fields",
        ),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Results.load(path)


def test_csv_has_a_line_per_row(results, tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(results.rows, path)
    lines = path.read_text().splitlines()
    assert len(lines) == len(results.rows) + 1
    assert {"provider", "time.median", "ratio.baseline", "roofline.bound", "check.error"} <= set(lines[0].split(","))


@pytest.mark.parametrize("suite", ["sequential-vs-parallel", "recurrent", "cells", "attention"])
def test_pictures_are_the_same_every_time(results, tmp_path, suite):
    figure = SUITES[suite].picture(results)
    for name, theme in style.THEMES.items():
        first, second = tmp_path / f"{name}1.svg", tmp_path / f"{name}2.svg"
        style.save(figure, first, theme)
        style.save(figure, second, theme)
        assert first.read_bytes() == second.read_bytes()
        assert (style.DARK if name == "auto" else theme).ink in first.read_text() and "<text" in first.read_text(), (
            "labels are text"
        )
    style.save(figure, tmp_path / "picture.png", style.AUTO)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="svg or .png"):
        style.save(figure, tmp_path / "picture.gif", style.LIGHT)


def test_a_row_that_spreads_says_so(synthetic):
    """Marked in the JSON, counted at the head of the page, listed at its end; without one nothing is said."""
    found = synthetic.lengths({name: lambda T: 1e-6 * T for name in ("torch.nn.LSTM", "fused attention")})
    assert "; 1 of" not in quality.status(found).text and assembly.derive(found)["noisy"] == []
    timed = [row for row in found.rows if row.time]
    row = timed[2]
    row.time |= {"low": row.seconds * 0.8, "high": row.seconds * 1.2}
    assert row.noisy and row.spread == pytest.approx(0.4)
    assert assembly.derive(found)["noisy"] == [found.rows.index(row)]
    assert f"1 of {len(timed)} noisy" in quality.status(found).text and "Data quality" in " ".join(quality.notes(found))
    (section,) = (section for section in assembly.sections(found) if section.title == "Data quality")
    ((provider, *_, spread),) = section.tables[0].rows
    assert provider == row.provider and spread.text == "40%"
