"""docs/models.md names every model, and what it shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import fastseq.models

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text()


def test_every_module_and_class_is_on_the_page():
    files = {path.stem for path in (ROOT / "fastseq/models").glob("*.py") if not path.stem.startswith("_")}
    assert files == set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert all(f"`{name}`" in PAGE for name in fastseq.models.__all__)


def test_its_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["words"].shape == (8, 4, 15)  # type: ignore[attr-defined]
