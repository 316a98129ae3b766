"""Maps of speed-ups and distances to the roofline show what the rows say."""

from __future__ import annotations

import colorsys
import math
import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.report import html, summary
from fastseq.benchmarks.report.findings import Finding, Line, Panel
from fastseq.benchmarks.report.plots import finding, heatmap, style
from fastseq.benchmarks.report.plots import roofline as roofline_plot
from fastseq.benchmarks.suites import before_and_after
from fastseq.benchmarks.suites.recurrent_gpu import ONE_LAYER


def test_a_map_for_every_cell_and_thread_count(synthetic):
    rows = synthetic.grid(lambda group, mode, cell, B, H: 0.8 if (cell, B, H) == ("LSTM", 32, 64) else 2.0).rows
    found = heatmap.maps(rows, ONE_LAYER)
    assert [m.title for m in found["padded", "training"]] == [f"{cell}, T=128, 1 thread" for cell in ("LSTM", "GRU", "RNN")]
    lstm = found["packed", "inference"][0]
    assert lstm.points == {(1, 64): 2.0, (1, 256): 2.0, (32, 64): 0.8, (32, 256): 2.0}
    assert "0.80 to 2.00 times as fast as torch.nn.LSTM, slower at 1 of 4 points: B = 32, H = 64." in lstm.words()
    assert "slower nowhere" in found["packed", "inference"][1].words()


def test_a_gpus_groups_share_a_map_and_a_row_of_widths_is_none(synthetic):
    rows = synthetic.gpu(lambda group, w: w.H / 100).rows
    found = heatmap.maps(rows, ONE_LAYER)
    whole = {m.title: m for m in found["one layer", "training"]}["LSTM, T=1024, bfloat16"]
    assert {(1, 64), (64, 512), (16, 1024)} <= whole.points.keys()
    for of_kind in found.values():
        assert all(len(m.batches) > 1 and len(m.widths) > 1 for m in of_kind)
    assert not any("triton" in m.title for of_kind in found.values() for m in of_kind)


def test_losses_have_another_color_and_a_mark(synthetic):
    rows = synthetic.grid(lambda group, mode, cell, B, H: 0.97 if B == 1 else 1.02).rows
    drawn = style.svg(heatmap.figures(rows, ONE_LAYER)[0])
    assert drawn.count(f"0.97{heatmap.LOSS}") == 6 and drawn.count(">1.02<") == 6  # three cells, two widths
    small = [colorsys.rgb_to_hsv(*colors(0.0)[:3])[0] * 360 for colors in (heatmap.LOSSES, heatmap.GAINS)]
    assert 15 < small[0] < 45 and 190 < small[1] < 230  # orange and blue, however small the difference


def test_what_was_not_measured_stays_empty(synthetic):
    rows = synthetic.grid(lambda group, mode, cell, B, H: 2.5).rows
    for row in rows:
        if (row.B, row.H) == (32, 256):
            row.status, row.time = "skipped", None
    drawn = style.svg(heatmap.figures(rows, ONE_LAYER)[0])
    assert drawn.count(">2.50<") == 9


def test_distance_to_the_roofline_is_the_time_over_it(synthetic):
    rows = synthetic.grid(lambda group, mode, cell, B, H: 1.0).rows
    for row in rows:
        row.roofline = {"seconds": row.seconds / 3, "bound": "weights" if row.H == 64 else "arithmetic", "note": ""}
    found = roofline_plot.distances(rows)
    assert {bound for bound, _ in found["torch.nn.GRU"]} == {"weights", "arithmetic"}
    assert all(d == pytest.approx(3) for points in found.values() for _, d in points)
    figure = roofline_plot.figures(rows)[0]
    assert "torch.nn.GRU 3.0" in figure.alt and "weights, arithmetic" in figure.alt
    assert roofline_plot.figures([]) == []


def test_a_claims_picture_tells_its_ends_in_words():
    lines = (Line("block", {32: 1e-3, 64: 4e-3}, {32: (9e-4, 2e-3), 64: (3e-3, 5e-3)}), Line("gone", {}), Line("zero", {32: 0.0}))
    found = Finding("B = 1", (), "", (), (Panel("Training", lines), Panel("Empty", (Line("none", {}),))))
    (figure,) = finding.figures(found)
    assert "block from 1.00 ms at T = 32 to 4.00 ms at T = 64" in figure.alt and "B = 1" in figure.caption
    assert math.isfinite(figure.size[1]) and "block" in style.svg(figure)


def test_every_line_has_contrast_on_either_background():
    """3:1, as WCAG wants it of graphics."""
    colors = {name: p.color for name, p in EVERY_PROVIDER.items()} | {f"claims {c}": c for c in finding.COLORS}
    colors |= before_and_after.KINDS
    for name, color in colors.items():
        for theme in (style.LIGHT, style.DARK):
            assert style.contrast(to_rgb(color), to_rgb(theme.paper)) >= 3, (name, color, theme.paper)


def test_words_have_contrast():
    """4.5:1: ink on either background, the numbers on every color of a map, the words of the summary."""
    assert style.contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21) and style.contrast((1, 0, 0), (1, 0, 0)) == 1
    for theme in (style.LIGHT, style.DARK):
        assert style.contrast(to_rgb(theme.ink), to_rgb(theme.paper)) >= 4.5
    for colors in (heatmap.LOSSES, heatmap.GAINS):
        for shade in range(256):
            assert max(style.contrast(to_rgb(ink), colors(shade)) for ink in heatmap.INKS) >= 4.5
    for ink in (*summary.TONES.values(), summary.SOFT):
        assert style.contrast(to_rgb(ink), to_rgb(style.LIGHT.paper)) >= 4.5


def test_lines_of_the_summary_end_within_the_picture(synthetic):
    """Whatever the device is called; a short one keeps its size."""
    results = synthetic.grid(lambda group, mode, cell, B, H: 1.0)
    sizes = []
    for device in ("GPU", "a processor of a maker who likes long names, (2 vCPU), float32, 1 thread, " * 2):
        canvas = summary.draw(f"RNN vs attention on {device}", results, (), None)
        renderer = FigureCanvasAgg(canvas).get_renderer()
        for text in canvas.texts:
            assert text.get_window_extent(renderer).x1 <= summary.SIZE[0] * summary.DPI, text.get_text()
        sizes.append(canvas.texts[0].get_fontsize())
    assert sizes[0] == 24 > sizes[1]


def test_words_of_the_page_have_contrast():
    """As its style sheet pairs them, in light and in dark: what a browser is not there to see."""
    sheet = (html.TEMPLATES / "style.css.j2").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in sheet.split("prefers-color-scheme: dark")[:2])
    assert light.keys() == dark.keys() and len(light) > 12
    pairs = [(ink, paper) for ink in ("ink", "soft", "accent", "good", "bad") for paper in ("paper", "card")]
    pairs += [("good", "good-wash"), ("bad", "bad-wash"), ("part", "part-wash"), ("soft", "line")]
    pairs += [("ink", f"{tone}-wash") for tone in ("good", "best", "bad", "worst")]
    for scheme in (light, dark):
        for ink, paper in pairs:
            assert style.contrast(to_rgb(scheme[ink]), to_rgb(scheme[paper])) >= 4.5, (ink, paper, scheme[ink], scheme[paper])


@pytest.mark.parametrize("distance", [1.0, 10.0, 37.3])
def test_one_distance_is_drawn(distance):
    """Of a single point there is no range, and of a power of ten matplotlib finds no limits around it."""
    figure = roofline_plot._figure("inference", {name: [("arithmetic", distance)] for name in ("fastseq.LSTM", "torch.nn.LSTM")})
    assert style.svg(figure).startswith("<svg")
