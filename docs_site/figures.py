"""Figures that pages ask for by a comment, drawn from the committed results when the site is built.

They are SVG inside the page, in the page's own colours, so that they fit its light and its dark form;
the colours of training are those of :mod:`gradl1_fast._report.palette`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from gradl1_fast._report import palette

__all__ = ["FIGURES", "widths"]

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "fashion-mnist.json"
WIDTHS = (None, 8, 6, 4, 3, 2)
# Method, how the figure calls it, its class in extra.css, its colour.
LINES = (
    ("plain", "plain training", "plain", palette.PLAIN),
    ("gradl1", "with the penalty", "ours", palette.PENALISED),
)

_LEFT, _TOP, _WIDTH, _HEIGHT = 44, 16, 400, 230


def widths() -> str:
    """Return accuracy against width on Fashion-MNIST: the mean over the seeds, and each seed."""
    rows = json.loads(RESULTS.read_text())
    parts = [_axes()]
    for place, (method, words, kind, _) in enumerate(LINES):
        seeds = sorted({row["seed"] for row in rows if row["method"] == method})
        found = {(r["seed"], r["w"]): r["top1"] for r in rows if r["method"] == method and r["w"] == r["a"]}
        curves = [[found[seed, width] for width in WIDTHS] for seed in seeds]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        parts += [_line(curve, f"{kind} seed") for curve in curves] + [_line(mean, kind)]
        parts += [_dot(at, value, kind) for at, value in enumerate(mean)]
        parts.append(_label(place, words, kind))
    summary = "Test accuracy against bits of weights and activations, with the penalty and without"
    height, width = _TOP + _HEIGHT + 44, _LEFT + _WIDTH + 12
    colours = "; ".join(f"--{kind}: {colour}" for *_, kind, colour in LINES)
    return (
        f'<svg class="widths" style="{colours}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{summary}">' + "".join(parts) + "</svg>"
    )


def _x(at: int) -> float:
    return _LEFT + 14 + at * (_WIDTH - 28) / (len(WIDTHS) - 1)


def _y(value: float) -> float:
    return _TOP + _HEIGHT * (1 - value / 100)


def _axes() -> str:
    parts = []
    for value in (0, 20, 40, 60, 80, 100):
        y = _y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    for at, width in enumerate(WIDTHS):
        name = "float" if width is None else f"{width}"
        parts.append(f'<text x="{_x(at):.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{name}</text>')
    middle, bottom = _LEFT + _WIDTH / 2, _TOP + _HEIGHT + 38
    parts.append(
        f'<text x="{middle}" y="{bottom}" text-anchor="middle">bits of weights and activations</text>'
    )
    return "".join(parts)


def _line(values: Sequence[float], kind: str) -> str:
    points = " ".join(f"{_x(at):.1f},{_y(value):.1f}" for at, value in enumerate(values))
    return f'<polyline class="{kind}" points="{points}"/>'


def _dot(at: int, value: float, kind: str) -> str:
    name = "float" if WIDTHS[at] is None else f"{WIDTHS[at]} bits"
    place = f'cx="{_x(at):.1f}" cy="{_y(value):.1f}"'
    return f'<circle class="{kind}" {place} r="4"><title>{name}: {value:.1f} %</title></circle>'


def _label(place: int, words: str, kind: str) -> str:
    y = _y(35) + 18 * place
    return (
        f'<line class="{kind}" x1="{_LEFT + 16}" x2="{_LEFT + 40}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT + 48}" y="{y + 4:.1f}">{words}</text>'
    )


FIGURES: dict[str, Callable[[], str]] = {"widths": widths}
