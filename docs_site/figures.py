"""Figures of the pages and of README, drawn from the committed results.

They are SVG. Inside a page of the site, text and grid have the page's own colours, so that they fit its light
and dark form; a file of its own, as README shows it, brings a style that fits both.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from gradl1_fast._report import palette

__all__ = ["RESULTS", "standalone", "widths"]

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "accuracy-fashion-mnist-depthwise.json"
WIDTHS = (None, 8, 6, 4, 3, 2)
# Method, regime, how the figure calls it, its classes in extra.css.
LINES = (
    ("plain", "per channel", "plain, without data", "plain dashed"),
    ("gradl1", "per channel", "penalty, without data", "ours dashed"),
    ("plain", "calibrated, gptq", "plain, free steps", "free"),
    ("gradl1", "calibrated, gptq", "penalty, free steps", "ours"),
)
COLOURS = {"plain": palette.PLAIN, "free": palette.FREE, "ours": palette.PENALISED}
# As extra.css has them, for a page without it.
STYLE = "\n".join(
    [
        "text { fill: #6e7781; font: 12px sans-serif; }",
        "polyline { fill: none; stroke-width: 2.5; } line { stroke-width: 2.5; }",
        "line.grid { stroke: #8a94a0; stroke-opacity: .35; stroke-width: 1; }",
        *(f".{kind} {{ stroke: {c}; }} circle.{kind} {{ fill: {c}; }}" for kind, c in COLOURS.items()),
        "polyline.dashed, line.dashed { stroke-dasharray: 6 4; } .seed { opacity: .35; stroke-width: 1; }",
    ]
)

_LEFT, _TOP, _WIDTH, _HEIGHT = 44, 16, 400, 230


def widths() -> str:
    """Return accuracy over bit width: the mean over the seeds, and each seed."""
    rows = json.loads(RESULTS.read_text())["rows"]
    parts = [_axes()]
    for index, (method, regime, words, kind) in enumerate(LINES):
        chosen = [row for row in rows if (row["method"], row["regime"]) == (method, regime)]
        values = {(row["seed"], row["w"]): row["top1"] for row in chosen if row["w"] == row["a"]}
        seeds = sorted({row["seed"] for row in chosen})
        curves = [[values[seed, width] for width in WIDTHS] for seed in seeds]
        mean = [statistics.fmean(each) for each in zip(*curves, strict=True)]
        parts += [_line(curve, f"{kind} seed") for curve in curves] + [_line(mean, kind)]
        parts += [_dot(at, value, kind) for at, value in enumerate(mean)]
        parts.append(_label(index, words, kind))
    summary = (
        "Test accuracy over bits of weights and activations: plain training, free steps, and the penalty"
    )
    height, width = _TOP + _HEIGHT + 44, _LEFT + _WIDTH + 12
    colours = "; ".join(f"--{kind}: {colour}" for kind, colour in COLOURS.items())
    return (
        f'<svg class="widths" style="{colours}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{summary}">' + "".join(parts) + "</svg>"
    )


def standalone() -> str:
    """Return the same figure as a file that brings its colours."""
    opening, rest = widths().split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'


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
    centre = f'cx="{_x(at):.1f}" cy="{_y(value):.1f}"'
    return f'<circle class="{kind}" {centre} r="4"><title>{name}: {value:.1f} %</title></circle>'


def _label(index: int, words: str, kind: str) -> str:
    y = _y(55 - 10 * index)  # between two lines of the grid
    return (
        f'<line class="{kind}" x1="{_LEFT + 16}" x2="{_LEFT + 40}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT + 48}" y="{y + 4:.1f}">{words}</text>'
    )
