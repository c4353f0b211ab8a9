"""Progress bars where there is a terminal to show them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

__all__ = ["track"]


def track(items: Iterable[T], what: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield the items, with a bar on standard error if it is a terminal and rich is installed.

    While another bar is being shown there is none. ``total`` is the number of items, where they do not
    know it themselves.
    """
    if show and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.errors import LiveError
            from rich.progress import track as rich_track
        except ImportError:
            pass  # a bar is a courtesy: without rich the work goes on without one
        else:
            with contextlib.suppress(LiveError):  # raised before the first item, or never
                yield from rich_track(items, what, total, console=Console(stderr=True), transient=True)
                return
    yield from items
