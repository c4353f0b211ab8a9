"""How far a run is and how long it will take: a bar on a terminal with rich, otherwise lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Context manager around a run over ``total`` models."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begin = total, 0, time.monotonic()
        self.bar = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("models", total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, name: str, outcome: str, seconds: float) -> None:
        """Report a model that has ended."""
        self.done += 1
        line = f"{name:50} {seconds:5.1f} s  {outcome}"
        if self.bar is None:
            print(f"[{self.done}/{self.total}, {self._left()}] {line}", flush=True)
            return
        self.bar.advance(self.task)
        self.bar.console.print(line, markup=False, highlight=False, overflow="ellipsis", no_wrap=True)

    def _left(self) -> str:
        each = (time.monotonic() - self.begin) / self.done
        return f"{each * (self.total - self.done) / 60:.0f} min left"


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return RichProgress(*columns, console=Console(stderr=True))
