"""Figures of matplotlib: how each begins, the heat map of a table, and how a figure is written."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import Any

from gradl1_fast._extras import install
from gradl1_fast._report.palette import PALE

__all__ = [
    *("GRID", "INK", "SINGLE", "coloured", "heat_map", "inline", "new_figure", "save", "svg", "tidy"),
    "width_name",
]

Width = tuple[int | None, int | None]

# Inside a page these become the page's colours of text, of lines, of what comes from a single seed and of
# lines in the background, in its light and dark form.
INK, GRID, SINGLE = "#000000", "#e3e6ea", "#6b7683"
_IN_A_PAGE = {INK: "currentColor", GRID: "var(--line)", SINGLE: "var(--single)", PALE: "var(--pale)"}
# Identifiers that are the same in every figure, fonts, and styles that would reach beyond the figure.
_NOT_IN_A_PAGE = (
    re.compile(r"<style.*?</style>", re.DOTALL),
    re.compile(r"<metadata>.*?</metadata>", re.DOTALL),
    re.compile(r'(?<=<g) id="[^"]*"'),
    re.compile(r" font-family: [^;\"]*;"),
)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of ``width`` by ``height`` inches that needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: {install('cli')}") from error
    return Figure(figsize=(width, height), layout="constrained")


def heat_map(
    axes: Any,
    values: Mapping[Width, float],
    *,
    title: str = "",
    limits: tuple[float, float] | None = None,
    colours: str = "viridis",
    form: str = "{:.3g}",
) -> Any:
    """Draw values over weight bits (down) and activation bits (across); return what a colour bar needs.

    Args:
        axes: of a figure.
        values: by ``(w, a)``, None for float; a pair that is missing stays empty.
        title: above the picture.
        limits: ends of the colour scale; by default those of the values.
        colours: a colour map of matplotlib.
        form: how a value is written into its cell, as for ``str.format``.
    """
    down, across = (sorted({width[side] for width in values}, key=_order) for side in (0, 1))
    grid = [[values.get((w, a), float("nan")) for a in across] for w in down]
    low, high = limits or (min(values.values()), max(values.values()))
    picture = axes.pcolormesh(grid, vmin=low, vmax=high, cmap=colours, edgecolors="white", linewidth=1)
    for (w, a), value in values.items():
        ink = "white" if _is_dark(picture.cmap(picture.norm(value))) else "black"
        place = across.index(a) + 0.5, down.index(w) + 0.5
        axes.text(*place, form.format(value), ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks([place + 0.5 for place in range(len(across))], map(width_name, across))
    axes.set_yticks([place + 0.5 for place in range(len(down))], map(width_name, down))
    axes.set_ylim(len(down), 0)
    axes.set_xlabel("activation bits")
    axes.set_title(title, fontsize=11)
    axes.tick_params(length=0)
    return picture


def tidy(axes: Any) -> None:
    """Take away the lines above and to the right of a chart."""
    axes.spines[["top", "right"]].set_visible(False)


def width_name(bits: int | None) -> str:
    """Return a width as a reader sees it: a number of bits, or ``float``."""
    return "float" if bits is None else str(bits)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure; the ending of the path says in which format."""
    figure.savefig(path, dpi=150)


def svg(figure: Any, **options: Any) -> str:
    """Return a figure as the text of an SVG element; ``options`` are those of ``savefig``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def inline(figure: Any, name: str) -> str:
    """Return a figure as an SVG element for a page: transparent, in the page's font and colours.

    Args:
        figure: drawn with :data:`INK` and :data:`GRID`.
        name: of the figure, unique in the page: identifiers inside the element derive from it.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        text = svg(figure, transparent=True)
    for pattern in _NOT_IN_A_PAGE:
        text = pattern.sub("", text)
    return coloured(text)


def coloured(text: str) -> str:
    """Return a text with the colours that depend on the page replaced by the page's own."""
    for colour, own in _IN_A_PAGE.items():
        text = text.replace(colour, own)
    return text


def _order(bits: int | None) -> float:
    return float("-inf") if bits is None else -bits


def _is_dark(colour: tuple[float, float, float, float]) -> bool:
    red, green, blue, _ = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
