"""Progress of long tasks: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

from gradl1_fast._progress import bars

__all__ = ["Stage", "stages"]

Stage = Callable[[str, int], Callable[[], None]]


@contextlib.contextmanager
def stages() -> Iterator[Stage]:
    """Yield a function that takes the name of a stage and its number of parts.

    It returns a function to call after each part. All output goes to standard error.
    """
    with bars() as progress:
        yield _line(Console(stderr=True)) if progress is None else _bar(progress)


def _bar(progress: Progress) -> Stage:
    def stage(what: str, total: int) -> Callable[[], None]:
        task = progress.add_task(what, total=total)
        return lambda: progress.advance(task)

    return stage


def _line(console: Console) -> Stage:
    def stage(what: str, total: int) -> Callable[[], None]:
        start, done = time.perf_counter(), 0

        def after_part() -> None:
            nonlocal done
            done += 1
            if done == total:
                seconds = time.perf_counter() - start
                console.print(f"{what}: {total} done in {seconds:.0f} s", highlight=False, markup=False)

        console.print(f"{what}: {total} to do", highlight=False, markup=False)
        return after_part

    return stage
