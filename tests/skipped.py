"""A table of skipped tests with their reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

import pytest

__all__ = ["table"]


def table(reports: Iterable[pytest.TestReport]) -> list[str]:
    """Return a line for each reason in each folder of tests: how many were skipped, where, and why."""
    counts = Counter((_folder(report.nodeid), _reason(report)) for report in reports)
    rows = [(str(count), folder, reason) for (folder, reason), count in sorted(counts.items())]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else [0, 0]
    return [f"{count:>{widths[0]}}  {folder:<{widths[1]}}  {reason}" for count, folder, reason in rows]


def _folder(nodeid: str) -> str:
    path = PurePath(nodeid.partition("::")[0])
    return str(path.parent if len(path.parts) > 2 else path)


def _reason(report: pytest.TestReport) -> str:
    place = report.longrepr
    text = place[2] if isinstance(place, tuple) else str(place)
    return text.removeprefix("Skipped: ")
