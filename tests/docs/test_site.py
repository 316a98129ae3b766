"""The documentation builds without a warning, and every link in it and in the README leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from support.pages import DOCS, ROOT

pytestmark = pytest.mark.timeout(900)  # half a minute of work, on a machine with nothing else to do
needs_sphinx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo")),
    reason="needs what requirements/docs.txt lists",
)


class Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [given[name] for name in ("href", "src") if name in given]


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-d", str(out / "doctrees")]
    return subprocess.run([*command, str(source), str(out / "html")], capture_output=True, text=True, timeout=800, cwd=ROOT)


def broken_links(site: Path) -> list[str]:
    """Links between the pages of a folder to files or anchors that are not there."""
    pages = {file: Page(file) for file in site.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.is_file() or (parts.fragment and target in pages and parts.fragment not in pages[target].anchors):
                broken.append(f"{file.relative_to(site)}: {link}")
    return broken


@needs_sphinx
def test_it_builds_and_every_link_leads_somewhere(tmp_path):
    finished = build(DOCS, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    site = tmp_path / "html"
    assert len(list(site.rglob("*.html"))) > 20 and not broken_links(site)
    # autodoc's entries, not only its directives
    anchors = set().union(*(Page(file).anchors for file in (site / "api").glob("*.html")))
    for name in ("fastseq.LSTM.forward", "fastseq.functional.attention", "fastseq.convert", "fastseq.models.gpt.GPT"):
        assert name in anchors


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there">x</a><a href="#here">x</a><img src="none.svg"></p>')
    (tmp_path / "b.html").write_text('<a href="a.html#nowhere">x</a><a href="https://example.org">x</a><p id="there">')
    assert sorted(broken_links(tmp_path)) == ["a.html: none.svg", "b.html: a.html#nowhere"]


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert len(links) >= 10
    assert not [link for link in links if not (ROOT / link).exists()]
