"""What the generated parts of README and documentation share: their place between marks, and their tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.tables import number
from bench.workloads import LAUNCH_BOUND, TITLES

__all__ = ["between", "of_first_sizes", "of_launches", "ratios"]

Row = dict[str, Any]


def between(text: str, marks: tuple[str, str], section: str, name: str) -> str:
    """Return the text of the file ``name`` with what stands between two marks replaced.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = marks
    if begin not in text or end not in text:
        raise ValueError(f"{name} has no section between {begin!r} and {end!r}")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{section}\n{end}", text)


def of_first_sizes(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of each network's first size, in one type, with the floors."""
    sizes: dict[str, str] = {}
    for row in rows:
        sizes.setdefault(row["operation"], row["size"])
    return [r for r in rows if r["size"] == sizes[r["operation"]] and r["dtype"] != "tf32"]


def of_launches(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the first network at a size at which only issuing operations counts."""
    small = [
        r for r in rows if (r["operation"], r["size"]) in {(w.network, w.numbers()) for w in LAUNCH_BOUND}
    ]
    return [r for r in small if r["operation"] == small[0]["operation"]]


def ratios(rows: Sequence[Row], title: str, providers: Mapping[str, str]) -> list[str]:
    """Return times over the plain step's in Markdown: a line for each provider, a column for each network.

    Args:
        rows: of one size each.
        title: of the first column.
        providers: those that are shown if they were measured, in this order, and how they are called.
    """
    columns = list(dict.fromkeys((row["operation"], row["size"]) for row in rows))
    found = {(row["provider"], row["operation"], row["size"]): row for row in rows}
    first: dict[str, str] = {}
    for network, size in columns:
        first.setdefault(network, size)
    names = [TITLES[n] if first[n] == size else f"{TITLES[n]}, launches alone" for n, size in columns]
    lines = ["| " + " | ".join([title, *names]) + " |", "|---" * (len(columns) + 1) + "|"]
    for provider, words in providers.items():
        values = [found.get((provider, *column), {}).get("ratio_to_plain") for column in columns]
        if any(value is not None for value in values):
            mark = "**" if words.startswith("**") else ""
            cells = [f"{mark}{number(v, '.2f')}{mark}" if v is not None else "-" for v in values]
            lines.append("| " + " | ".join([words, *cells]) + " |")
    return lines
