"""What several reports show in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradl1_fast._report.figures import width_name
from gradl1_fast._report.page import Section, Table

__all__ = ["TILES", "flat", "pair_name", "settings_and_versions"]

# Bits of weights and of activations alike that the tiles of a report show.
TILES: tuple[int | None, ...] = (None, 4, 3)


def pair_name(w: int | None, a: int | None) -> str:
    """Return a pair of widths as a reader sees it: ``float``, or ``(w, a)``."""
    return "float" if w is a is None else f"({width_name(w)}, {width_name(a)})"


def settings_and_versions(
    settings: list[tuple[str, str]], environment: Mapping[str, Mapping[str, str]]
) -> Section:
    """Return the last section of a report."""
    versions = [pair for group in environment.values() for pair in group.items()]
    tables = [Table(("setting", "value"), settings), Table(("package or device", "value"), versions)]
    return Section("Settings and versions", tables=tables)


def flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Return nested settings as rows; a name is the path to it, written with dots."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        nested = isinstance(value, dict)
        rows += flat(value, f"{above}{key}.") if nested else [(above + key, str(value))]
    return rows
