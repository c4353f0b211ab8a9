"""Plots of results. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.workloads import TITLES
from gradl1_fast._report import figures, palette

__all__ = ["ops", "save", "scale", "step"]

Row = dict[str, Any]
LINES = {
    "plain": palette.PLAIN,
    "eager double backprop": palette.EAGER,
    "finite difference": palette.GREY,
    "gradl1_fast": palette.PENALISED,
}
KINDS = (*palette.OTHERS, palette.GREY)  # types and layouts


def save(figure: Any, folder: Path, name: str = "plot") -> None:
    """Write a figure as an SVG file."""
    (folder / f"{name}.svg").write_text(figures.svg(figure))


def step(rows: Sequence[Row], columns: int = 2, width: float = 7.5) -> Any:
    """Return bars of each provider's time over the plain step's, a panel for each workload.

    Args:
        rows: of the results.
        columns: how many panels are side by side.
        width: of a panel in inches.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["ratio_to_plain"] is not None:
            groups.setdefault((row["operation"], row["size"]), []).append(row)
    columns = min(columns, len(groups))
    lines = -(-len(groups) // columns)
    tallest = max(len(group) for group in groups.values())
    figure = figures.new_figure(width * columns, lines * (0.24 * tallest + 1.1))
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, ((network, size), group) in zip(panels, groups.items(), strict=False):
        _bars(axes, group)
        axes.set_title(f"{TITLES[network]}, {size}", fontsize=10, loc="right")
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    return figure


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """Draw one workload, the fastest at the top, with the spread from the 20 to the 80 percent quantile."""
    rows = sorted(rows, key=lambda row: -row["ratio_to_plain"])
    scale = [row["ratio_to_plain"] / row["median_ms"] for row in rows]
    values = [row["ratio_to_plain"] for row in rows]
    # Where a quantile is the median itself, rounding must not make the distance negative.
    spread = [
        [max(v - row["p20_ms"] * s, 0.0) for v, row, s in zip(values, rows, scale, strict=True)],
        [max(row["p80_ms"] * s - v, 0.0) for v, row, s in zip(values, rows, scale, strict=True)],
    ]
    places = range(len(rows))
    axes.barh(places, values, xerr=spread, color=[_colour(row) for row in rows], ecolor="#333333", capsize=2)
    axes.set_yticks(places, [row["provider"] for row in rows], fontsize=10)
    ends = [value + above for value, above in zip(values, spread[1], strict=True)]
    for place, value, end in zip(places, values, ends, strict=True):
        axes.annotate(
            f"{value:.2f}", (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10
        )
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, max(ends) * 1.15)
    axes.set_xlabel("time of a step, plain step = 1", fontsize=10)
    figures.tidy(axes)


def _colour(row: Row) -> str:
    name = row["provider"]
    if name.startswith("floor"):
        return palette.PALE
    if name.startswith("plain"):
        return palette.PLAIN
    if row["exact"] is False:
        return palette.GREY
    return palette.PENALISED if name.startswith("gradl1_fast") else palette.EAGER


def ops(rows: Sequence[Row]) -> Any:
    """Return times by plain PyTorch over times by the best backend, a bar for each sweep, type and layout."""
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["median_ms"] is not None:
            name = row["size"].partition(":")[2].strip() if row["operation"] == "conv" else ""
            key = (f"{row['operation']}, {row['sweep']} {name}", row["dtype"], row["layout"])
            cases.setdefault(key, {})[row["provider"]] = row["median_ms"]
    names = list(dict.fromkeys(key[0] for key in cases))
    kinds = list(dict.fromkeys(key[1:] for key in cases))
    figure = figures.new_figure(10, 0.34 * len(names) + 1.2)
    axes = figure.subplots()
    for shift, kind in enumerate(kinds):
        found = [(names.index(k[0]), _gain(v)) for k, v in cases.items() if k[1:] == kind]
        found = [(place, gain) for place, gain in found if gain]
        offset = (shift - (len(kinds) - 1) / 2) * 0.16
        places, gains = [place + offset for place, _ in found], [gain for _, gain in found]
        axes.scatter(gains, places, s=18, label=", ".join(kind), color=KINDS[shift % len(KINDS)])
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("time by plain PyTorch / time by this library's fastest backend (right of 1: faster)")
    axes.legend(fontsize=8, loc="upper right")
    axes.grid(axis="x", which="both", alpha=0.25)
    figures.tidy(axes)
    return figure


def _gain(times: dict[str, float]) -> float | None:
    ours = [t for name, t in times.items() if name in ("reference", "host", "triton", "cuda")]
    plain = times.get("plain PyTorch")
    return plain / min(ours) if ours and plain else None


def scale(rows: Sequence[Row]) -> Any:
    """Return time and peak memory over each thing that grows, a line for each provider."""
    factors = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = figures.new_figure(3.6 * len(factors), 6)
    panels = figure.subplots(2, len(factors), squeeze=False)
    metrics = (("median_ms", "time of a step, ms", 1.0), ("peak_bytes", "peak of live memory, MB", 1e-6))
    for line, (metric, label, unit) in enumerate(metrics):
        for column, factor in enumerate(factors):
            axes = panels[line][column]
            _lines(axes, [r for r in rows if r["sweep"] == factor and r[metric] is not None], metric, unit)
            axes.set_xlabel(factor)
            axes.set_ylim(bottom=0)
            figures.tidy(axes)
        panels[line][0].set_ylabel(label)
    panels[0][0].legend(fontsize=8)
    return figure


def _lines(axes: Any, rows: Sequence[Row], metric: str, unit: float) -> None:
    others = itertools.cycle(palette.OTHERS)
    for name in dict.fromkeys(row["provider"] for row in rows):
        colour = LINES.get(name) or next(others)
        points = [(row["value"], row[metric] * unit) for row in rows if row["provider"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=colour)
        axes.set_xticks([x for x, _ in points])
