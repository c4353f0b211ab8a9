"""Progress bars where there is a terminal to show them; on request, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

__all__ = ["bars", "lines", "track"]

_SECONDS = 1.0  # between two lines


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
    know it themselves. In a block of :func:`lines`, there are lines elsewhere.
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
    printer = _printer.get()
    yield from items if printer is None or not show else printer.follow(items, what, total)


@contextlib.contextmanager
def lines() -> Iterator[None]:
    """Let :func:`track` print lines on standard error inside the block, if that is not a terminal."""
    token = _printer.set(None if sys.stderr.isatty() else _Printer())
    try:
        yield
    finally:
        _printer.reset(token)


class _Printer:
    """Prints the progress of the outermost of several nested loops, at most once a second."""

    def __init__(self) -> None:
        self._is_busy = False

    def follow(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        """Yield the items, and print a line before the first one and after each."""
        if self._is_busy:
            yield from items
            return
        self._is_busy = True
        try:
            yield from self._followed(items, what, len(items) if isinstance(items, Sized) else total)
        finally:
            self._is_busy = False

    def _followed(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        start = last = time.monotonic()
        _print(f"{what}: {total or 'some'} to do")
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if done == total or now - last >= _SECONDS:
                last = now
                _print(f"{what}: {done}{f' of {total}' if total else ''} done in {now - start:.0f} s")


_printer: ContextVar[_Printer | None] = ContextVar("printer", default=None)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
