"""The report in a real browser: it renders, asks for nothing, says nothing on the console, and can be read on any screen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from fastseq.benchmarks import assembly

LOOK = Path(__file__).with_name("chromium.py")
NO_BROWSER = 3
SCREENS = {"phone": (390, 844), "desk": (1280, 1000)}
READABLE = 8.0  # pixels of the smallest letters
CONTRAST = 4.5  # of words, WCAG 2 level AA


@pytest.fixture(scope="module")
def page(synthetic, tmp_path_factory):
    providers = ("torch.nn.LSTM", "fused attention", "attention block")
    results = synthetic.lengths(
        {name: (lambda T, k=k: k * 1e-5 * T**1.2) for k, name in enumerate(providers, 1)}, modes=("training",)
    )
    grid = synthetic.grid(lambda group, mode, cell, B, H: 0.8 if B == 1 else 2.5)
    results.rows += [row for row in grid.rows if row.group == "packed"]
    file = tmp_path_factory.mktemp("browser") / "report.html"
    file.write_text(assembly.page(results), encoding="utf-8")
    return file


def look(page, width, height, scheme):
    """What the browser found, and the file of what it painted."""
    picture = page.with_name(f"{width}-{scheme}.png")
    command = [sys.executable, str(LOOK), *map(str, (page, width, height, scheme, picture))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == NO_BROWSER:
        pytest.skip(f"needs Qt's Chromium, requirements/browser.txt, and the system's libraries for it: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), picture


@pytest.mark.parametrize(("screen", "scheme"), [("phone", "dark"), ("desk", "light")])
def test_the_report_in_a_browser(page, screen, scheme):
    found, picture = look(page, *SCREENS[screen], scheme)
    assert found["loaded"] and found["console"] == []
    assert found["requests"] == [page.as_uri()]
    assert found["words"] > 3000 and found["overflow"] <= 0
    assert found["dark"] == (scheme == "dark") == (found["paper"] < 0.1)
    assert len(found["pictures"]) == page.read_text().count("<svg") > 5
    for shown in found["pictures"]:
        assert shown["role"] == "img" and shown["title"] and len(shown["description"]) > 20, shown
        assert shown["width"] > 250 and shown["height"] > 100 and shown["shapes"] > 10 and shown["smallest"] > READABLE, shown
    faint = [c for c in found["contrasts"] if c["ratio"] < CONTRAST]
    assert found["contrasts"] and not faint
    # numbers on a map's own colors are black or white: test_pictures.py
    words = [c for c in found["words_in_pictures"] if c["fill"] not in ("rgb(0, 0, 0)", "rgb(255, 255, 255)")]
    assert len(words) > 50 and not [c for c in words if c["ratio"] < CONTRAST]
    assert found["unlinked"] == []
    image = matplotlib.image.imread(picture)
    assert len(np.unique((255 * image).astype(np.uint8).reshape(-1, image.shape[-1]), axis=0)) > 50, "what was painted is blank"


def test_the_browser_sees_faults(page, tmp_path):
    faults = """<script>console.error("bad")</script><img src="gone.png"><div style="width: 3000px; color: #777">wide</div>"""
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace("</main>", f"</main>{faults}"), encoding="utf-8")
    found, _ = look(broken, *SCREENS["phone"], "light")
    assert any("bad" in said for said in found["console"])
    assert any(asked.endswith("gone.png") for asked in found["requests"])
    assert found["overflow"] > 2000 and found["pictures"][-1]["description"] == ""
