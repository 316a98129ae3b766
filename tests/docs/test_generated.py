"""What is generated in README.md and docs/ is what the committed results say."""

from __future__ import annotations

import pytest
import torch

from tools import pages


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_everything_is_current():
    wanted = pages.wanted()
    stale = [str(file.relative_to(pages.ROOT)) for file, text in wanted.items() if pages.stale(file, text)]
    assert not stale, "run python -m tools.pages"
    assert {*pages.GALLERY.rglob("*.svg")} <= {*wanted}, "a picture that nothing draws"


def test_a_mask_shows_what_attention_sees():
    masks = pages._masks()
    assert torch.equal(masks["causal"]() > 0, torch.ones(16, 16).tril().bool())
    window = torch.ones(16, 16).tril().triu(-4).bool()
    assert torch.equal(masks["window"]() > 0, window)
    packed = masks["packed"]() > 0
    assert packed[6, 0] and not packed[7, 6] and packed[10, 7] and not packed[11, 10]


def test_check_tells_what_is_not_current(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- packed: begin, written by tools/pages.py -->\nold\n<!-- packed: end -->\nb\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "BLOCKS", [("page.md", "packed", lambda: "new")])
    monkeypatch.setattr(pages, "pictures", dict)
    assert pages.main(["--check"]) == 1 and "not current: page.md" in capsys.readouterr().out and "old" in page.read_text()
    assert pages.main([]) == 0 and pages.main(["--check"]) == 0
    assert page.read_text() == "a\n<!-- packed: begin, written by tools/pages.py -->\nnew\n<!-- packed: end -->\nb\n"
