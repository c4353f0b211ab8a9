"""Progress bars where there is a terminal to show them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

__all__ = ["bars", "track"]


@contextlib.contextmanager
def bars(*, transient: bool = False) -> Iterator[Progress | None]:
    """Yield what shows bars with the time left on standard error, or None if it is not a terminal.

    Args:
        transient: remove the bars at the end of the ``with`` block.

    Raises:
        ImportError: rich is not installed; without a terminal it is not needed.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left:"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=transient) as progress:
        yield progress


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
