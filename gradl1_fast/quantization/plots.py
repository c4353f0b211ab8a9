"""Pictures of quantization results. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradl1_fast.quantization.sweep import Row

__all__ = ["heat_map", "new_figure", "save"]


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of ``width`` by ``height`` inches that needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'gradl1-fast[cli]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def heat_map(rows: Iterable[Row], *, title: str = "", limits: tuple[float, float] | None = None) -> Any:
    """Return a figure of the values over weight bits (down) and activation bits (across).

    Args:
        rows: one for each width.
        title: above the picture.
        limits: ends of the colour scale; by default those of the values.
    """
    values = {(row.w, row.a): row.value for row in rows}
    ws, widths_a = (sorted({key[i] for key in values}, key=_order) for i in (0, 1))
    figure = new_figure(1.6 + 0.75 * len(widths_a), 1.3 + 0.5 * len(ws))
    axes = figure.subplots()
    grid = [[values.get((w, a), float("nan")) for a in widths_a] for w in ws]
    low, high = limits or (min(values.values()), max(values.values()))
    axes.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    for (w, a), value in values.items():
        light = value < low + 0.6 * (high - low)
        axes.text(widths_a.index(a), ws.index(w), f"{value:.3g}", ha="center", va="center",
                  color="white" if light else "black")  # fmt: skip
    axes.set_xticks(range(len(widths_a)), [_name(a) for a in widths_a])
    axes.set_yticks(range(len(ws)), [_name(w) for w in ws])
    axes.set_xlabel("activation bits")
    axes.set_ylabel("weight bits")
    axes.set_title(title)
    return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure; the ending of the path says in which format."""
    figure.savefig(path, dpi=150)


def _order(bits: int | None) -> float:
    return float("-inf") if bits is None else -bits


def _name(bits: int | None) -> str:
    return "float" if bits is None else str(bits)
