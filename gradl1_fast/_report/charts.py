"""The charts of reports: lines over bit widths, the heat map of differences, curves and bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradl1_fast._report import palette
from gradl1_fast._report.figures import GRID, INK, SINGLE, new_figure, tidy
from gradl1_fast._report.page import Key
from gradl1_fast._report.palette import Style

__all__ = [
    *("LABELLED_FROM", "WIDTH", "Series"),
    *("bars", "curves", "differences", "keys", "legend", "lines", "spans"),
]

WIDTH = 5.2  # inches: text of 10 points stays legible on a phone
BARS = 4.3  # what has long names beside it
PANEL = (4.0, 2.8)  # a chart that has others beside it
BANDS = 3  # more lines than these are drawn without bands, which would hide each other
LABELLED_FROM, LEAST_END = 0.5, 5.0  # points


@dataclass(frozen=True)
class Series:
    """One line over bit widths.

    Attributes:
        name: in the legend.
        style: of the line.
        values: at each width those of each seed, in percent.
        gains: at each width the difference of each seed from the baseline with the same seed, in points;
            empty for the baseline.
    """

    name: str
    style: Style
    values: Sequence[Sequence[float]]
    gains: Sequence[Sequence[float]] = ()


def keys(series: Sequence[Series]) -> list[Key]:
    """Return the legend of :func:`lines`."""
    return legend({each.name: each.style for each in series})


def legend(styles: Mapping[str, Style]) -> list[Key]:
    """Return a legend of lines; pale ones share an entry."""
    pale = [style for style in styles.values() if style.colour == palette.PALE]
    named = [Key(name, style) for name, style in styles.items() if style.colour != palette.PALE]
    return named + [Key("other methods", style) for style in pale[:1]]


def lines(series: Sequence[Series], widths: Sequence[str], baseline: str) -> Any:
    """Return a figure with accuracy over bit widths above, and paired differences below.

    Lines are means and dots single seeds; of up to three lines, bands reach from the lowest to the highest.

    Args:
        series: the lines.
        widths: names of the widths, from left to right.
        baseline: what ``gains`` are differences from.
    """
    figure = new_figure(WIDTH, 5.0)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for each in series:
        if len(series) <= BANDS:
            _band(top, each.values, each.style)
        _line(top, range(len(widths)), list(map(statistics.fmean, each.values)), each.style)
        if each.gains:
            _dots(bottom, each.gains, each.style)
    bottom.axhline(0, color=INK, linewidth=0.8)
    low, high = bottom.get_ylim()
    bottom.set_ylim(min(low, -1), max(high, 1))  # a hundredth of a point must not fill the axis
    bottom.set_xticks(range(len(widths)), widths)
    bottom.set_xlabel("bits of weights and of activations")
    bottom.set_ylabel(f"points from {baseline}")
    top.set_ylabel("test accuracy in %")
    for axes in (top, bottom):
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        tidy(axes)
    return figure


def _band(axes: Any, values: Sequence[Sequence[float]], style: Style) -> None:
    places = range(len(values))
    axes.fill_between(
        places, list(map(min, values)), list(map(max, values)), color=style.colour, alpha=0.18, linewidth=0
    )


def _dots(axes: Any, gains: Sequence[Sequence[float]], style: Style) -> None:
    for place, of_seeds in enumerate(gains):
        if len(of_seeds) > 1:
            axes.scatter([place] * len(of_seeds), of_seeds, s=9, color=style.colour, alpha=0.5, linewidth=0)
    _line(axes, range(len(gains)), list(map(statistics.fmean, gains)), style)


def _line(axes: Any, x: Sequence[float], y: Sequence[float], style: Style, size: float = 4.5) -> None:
    dash = (0, tuple(map(float, style.dash.split()))) if style.dash else "-"
    order = 1.5 if style.colour == palette.PALE else 2  # behind the others
    look = {"color": style.colour, "linestyle": dash, "linewidth": 1.9, "zorder": order}
    axes.plot(x, y, marker=style.marker, markersize=size, **look)


def differences(
    values: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    single: Collection[str] = (),
) -> Any:
    """Return a heat map of differences in points: blue above zero, orange below, the page's colour at zero.

    The scale is logarithmic beyond one point, so that both small and large differences show. Cells below half
    a point are not labelled.

    Args:
        values: by row and column; a pair that is missing stays empty.
        rows: from the top down.
        columns: from left to right.
        labels: of the vertical and the horizontal axis.
        single: the rows that come from a single seed; their names are grey.
    """
    height = 1.5 + 0.42 * len(rows)
    figure = new_figure(WIDTH, height)
    axes, scale = figure.subplots(2, 1, height_ratios=(height - 0.75, 0.3))
    end = max([LEAST_END, *map(abs, values.values())])
    for (row, column), value in values.items():
        _cell(axes, (columns.index(column), rows.index(row)), value, end, _signed(value))
    _frame(axes, rows, columns)
    for label in axes.get_yticklabels():
        label.set_color(SINGLE if label.get_text() in single else INK)
    axes.set_ylabel(labels[0])
    axes.set_xlabel(labels[1])
    _scale(scale, end)
    return figure


def _frame(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xlim(0, max(len(columns), 1))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([place + 0.5 for place in range(len(columns))], columns)
    axes.set_yticks([place + 0.5 for place in range(len(rows))], rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _scale(axes: Any, end: float) -> None:
    """Draw the colours of some differences, each with its number."""
    marks = [1.0, 10.0 if end > 15 else 3.0, end]
    shown = [*(-mark for mark in reversed(marks)), 0.0, *marks]
    for place, value in enumerate(shown):
        _cell(axes, (place, 0), value, end, f"{value:+.0f}" if value else "0")
    _frame(axes, [""], [""] * len(shown))
    axes.set_xlabel("points: more accurate to the right", fontsize=9)


def _cell(axes: Any, place: tuple[int, int], value: float, end: float, text: str) -> None:
    strength = math.log1p(abs(value)) / math.log1p(end)
    colour = palette.PENALISED if value > 0 else palette.PLAIN
    x, y = place
    axes.add_patch(_rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=colour, alpha=0.9 * strength))
    axes.add_patch(_rectangle((x + 0.03, y + 0.03), 0.94, 0.94, fill=False, edgecolor=GRID, linewidth=0.7))
    ink = "#ffffff" if value > 0 and strength > 0.8 else INK
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink, fontsize=9)


def _rectangle(*args: Any, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **{"linewidth": 0, **options})


def _signed(value: float) -> str:
    if abs(value) < LABELLED_FROM:
        return ""
    return f"{value:+.1f}" if abs(value) < 9.95 else f"{value:+.0f}"


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    styles: Mapping[str, Style],
    labels: tuple[str, str],
    *,
    log: str = "",
    floor: float | None = None,
    size: tuple[float, float] = PANEL,
) -> Any:
    """Return a figure of lines.

    Args:
        lines: by name x and y.
        styles: of the lines, by name.
        labels: of the horizontal and the vertical axis.
        log: the axes with a logarithmic scale: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        floor: the vertical axis starts here; None: as the values ask for.
        size: width and height in inches; by default several fit side by side.
    """
    figure = new_figure(*size)
    axes = figure.subplots()
    for name, (x, y) in lines.items():
        _line(axes, x, y, styles[name], 3)
    if "x" in log:
        axes.set_xscale("log", base=2)
    if "y" in log:
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(bottom=floor)  # before the numbers, whose choice depends on it
        _plain_numbers(axes)
    if labels[0] == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    tidy(axes)
    return figure


def _plain_numbers(axes: Any) -> None:
    """Write 0.01 rather than a power at a logarithmic axis, and numbers in between only if it is short."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    if 3 * low < high < 10 * low:
        axes.yaxis.get_minor_locator().set_params(subs=(2, 5))


def bars(
    values: Mapping[str, float],
    colours: Mapping[str, str],
    label: str = "",
    texts: Mapping[str, str] | None = None,
) -> Any:
    """Return a figure of horizontal bars.

    Args:
        values: by name, from the top down.
        colours: by name.
        label: of the horizontal axis; without one the axis is hidden.
        texts: written at the ends of the bars.
    """
    figure = new_figure(BARS, 0.75 + 0.27 * len(values))
    axes = figure.subplots()
    places = range(len(values))
    axes.barh(places, list(values.values()), color=[colours[name] for name in values], height=0.65)
    for place, (name, value) in enumerate(values.items()):
        text = (texts or {}).get(name, "")
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    _name_rows(axes, list(values), label)
    axes.locator_params(axis="x", nbins=5)
    if not label:
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(0, 1.6 * max(values.values()))  # space for the texts
    return figure


def spans(ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str], label: str) -> Any:
    """Return a figure of ranges from low to high, linear near zero and logarithmic beyond 0.1."""
    figure = new_figure(BARS, 0.75 + 0.27 * len(ends))
    axes = figure.subplots()
    for place, (name, (low, high)) in enumerate(ends.items()):
        axes.barh(place, high - low, left=low, color=colours[name], height=0.5)
    _name_rows(axes, list(ends), label)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xticks([-10, -1, -0.1, 0, 0.1, 1, 10], ["-10", "-1", "-0.1", "0", "0.1", "1", "10"])
    return figure


def _name_rows(axes: Any, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    tidy(axes)
