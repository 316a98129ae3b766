"""Every block of Python in the documentation runs, page by page, all in this process."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from support.pages import DOCS, PAGES, blocks

NEEDS = {"guides/transformers.md": "transformers", "guides/resets.md": "sb3_contrib"}
WITH_CODE = [page for page in PAGES if blocks(page) and not page.read_text(encoding="utf-8").startswith("---\nfile_format")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(DOCS)))
def test_page_runs(page, tmp_path, monkeypatch):
    """In order, one namespace for a page, in an empty folder."""
    name = str(page.relative_to(DOCS))
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    with warnings.catch_warnings():
        for number, block in enumerate(blocks(page)):
            exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert os.getcwd() == str(tmp_path)


def test_the_pages_show_code():
    assert len(WITH_CODE) >= 10 and sum(len(blocks(page)) for page in WITH_CODE) >= 40
