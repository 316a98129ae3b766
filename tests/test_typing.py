"""The annotations as a user's type checker sees them: right calls pass, wrong ones give the errors that their lines name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="needs mypy")
ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "tests/typing").glob("*.py"))


PACKED = r"tuple\[Tensor, Tensor, Tensor \| None, Tensor \| None, fallback=[\w.]*PackedSequence\]"  # mypy writes named tuples out


@pytest.fixture(scope="module")
def said() -> dict[tuple[str, int], set[str]]:
    """Of every line that mypy speaks of, by file and number: the codes of its errors, and what it reveals."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", *map(str, FILES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    found: dict[tuple[str, int], set[str]] = {}
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"(.+?):(\d+): (error|note): (.*)", line)
        assert match, line
        name, number, kind, text = match.groups()
        revealed = re.fullmatch(r'Revealed type is "(.*)"', text)
        if revealed:
            text = re.sub(r"torch\._tensor\.|builtins\.", "", revealed[1])
            found.setdefault((Path(name).name, int(number)), set()).add("R: " + re.sub(PACKED, "PackedSequence", text))
        elif kind == "error":
            found.setdefault((Path(name).name, int(number)), set()).add("E: " + text.rpartition("[")[2].rstrip("]"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_is_as_it_says(path, said):
    expected = {
        (path.name, number): {text.strip() for text in re.findall(r"# ([ER]: .*)", line)}
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\S.*# [ER]: ", line) and not line.startswith('"""')
    }
    actual = {place: texts for place, texts in said.items() if place[0] == path.name}
    wrong = [f"{place}: expected {expected.get(place)}, mypy says {actual.get(place)}"
             for place in sorted(expected | actual) if expected.get(place) != actual.get(place)]  # fmt: skip
    assert not wrong, "\n".join(wrong)
    assert len(expected) > 15
