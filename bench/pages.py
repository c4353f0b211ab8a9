"""What the generated parts of README and documentation share: their place between marks, and their tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.tables import number
from bench.workloads import TITLES

__all__ = ["between", "of_first_sizes", "ratios"]

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


def ratios(rows: Sequence[Row], title: str, providers: Mapping[str, str]) -> list[str]:
    """Return times over the plain step's in Markdown: a line for each provider, a column for each network.

    Args:
        rows: of one size each.
        title: of the first column.
        providers: those that are shown if they were measured, in this order, and how they are called.
    """
    networks = list(dict.fromkeys(row["operation"] for row in rows))
    found = {(row["provider"], row["operation"]): row for row in rows}
    lines = [
        "| " + " | ".join([title, *(f"{TITLES[n]}" for n in networks)]) + " |",
        "|---" * (len(networks) + 1) + "|",
    ]
    for provider, words in providers.items():
        values = [found.get((provider, n), {}).get("ratio_to_plain") for n in networks]
        if any(value is not None for value in values):
            mark = "**" if provider == "gradl1_fast" else ""
            cells = [f"{mark}{number(v, '.2f')}{mark}" if v is not None else "-" for v in values]
            lines.append("| " + " | ".join([words, *cells]) + " |")
    return lines
