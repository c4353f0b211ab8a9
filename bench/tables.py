"""Rows of results as tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.workloads import TITLES

__all__ = ["Table", "compared", "number", "ops", "reasons", "scale", "steps"]

Row = dict[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

_STEP = (
    "provider", "ms", "20 to 80 %", "× plain", "× own plain", "images/s", "peak MB", "calls", "MB moved",
    "gradient error",
)  # fmt: skip


def steps(rows: Sequence[Row], *, wide: bool = True) -> Table:
    """Return the table of one workload's steps, of those that ran; all columns only if there is room."""
    lines = [_step(row) for row in rows if row["median_ms"] is not None]
    if wide:
        return _STEP, lines
    narrow = [_STEP.index(name) for name in ("provider", "ms", "× plain", "peak MB", "gradient error")]
    return tuple(_STEP[place] for place in narrow), [tuple(line[p] for p in narrow) for line in lines]


def reasons(rows: Sequence[Row]) -> list[str]:
    """Return why the others did not run, in a line each."""
    told = [(row["provider"], row.get("unavailable") or row.get("failed")) for row in rows]
    return [f"{provider}: {reason}" for provider, reason in told if reason]


def _step(row: Row) -> tuple[str, ...]:
    return (
        row["provider"],
        number(row["median_ms"], ".1f"),
        f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}",
        number(row["ratio_to_plain"], ".2f"),
        number(row["ratio_to_own_plain"], ".2f"),
        number(row["images_per_s"], ".0f"),
        number(row["peak_bytes"], ".1f", 1e-6),
        number(row["operator_calls"], "d"),
        number(row["bytes_moved"], ".0f", 1e-6),
        number(row["gradient_error"], ".0e"),
    )


def ops(rows: Sequence[Row]) -> Table:
    """Return the table of operations that ran, of one type and layout."""
    header = ("operation", "sweep", "provider", "ms", "20 to 80 %", "passes", "GB/s", "of a copy", "error")
    return header, [
        (
            row["operation"],
            row["sweep"] if row["operation"] != "conv" else f"{row['sweep']}, {row['size']}",
            row["provider"],
            number(row["median_ms"], ".3f"),
            f"{row['p20_ms']:.3f} to {row['p80_ms']:.3f}",
            str(row["passes"] or "-"),
            number(row["gb_per_s"], ".1f"),
            number(row["of_copy"], ".0%"),
            number(row["error"], ".0e"),
        )
        for row in rows
        if row["median_ms"] is not None
    ]


def scale(rows: Sequence[Row]) -> Table:
    """Return the table of growth in one factor."""
    header = ("provider", "value", "ms", "20 to 80 %", "× plain", "images/s", "peak MB", "gradient error")
    return header, [
        (
            row["provider"],
            str(row["value"]),
            number(row["median_ms"], ".1f"),
            f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}",
            number(row["ratio_to_plain"], ".2f"),
            number(row["images_per_s"], ".0f"),
            number(row["peak_bytes"], ".1f", 1e-6),
            number(row["gradient_error"], ".0e"),
        )
        for row in sorted(rows, key=lambda row: row["provider"])
        if row["median_ms"] is not None
    ]


def compared(rows: Sequence[Row]) -> Table:
    """Return the table of a comparison of revisions."""
    header = ("network", "provider", "base ms", "20 to 80 %", "tree ms", "20 to 80 %", "tree / base")
    return header, [
        (
            f"{TITLES[row['operation']]}, {row['size']}",
            row["provider"],
            number(row["base_ms"], ".1f"),
            f"{row['base_p20_ms']:.1f} to {row['base_p80_ms']:.1f}",
            number(row["tree_ms"], ".1f"),
            f"{row['tree_p20_ms']:.1f} to {row['tree_p80_ms']:.1f}",
            number(row["ratio"], ".3f"),
        )
        for row in rows
        if "ratio" in row
    ]


def number(value: float | None, form: str, factor: float | None = None) -> str:
    """Return a number as text; what was not measured is a dash."""
    if value is None:
        return "-"
    return format(value if factor is None else value * factor, form)
