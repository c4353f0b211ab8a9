"""Ctrl-C during a training: the step ends and a checkpoint is written before the training stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["interruption"]


@contextlib.contextmanager
def interruption(*, deferred: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed during the ``with`` block.

    The first Ctrl-C only sets this flag; a second one raises KeyboardInterrupt at once, as usual. Nothing
    changes in a thread other than the main one, which receives no signals, and where the process has its own
    handling of SIGINT.

    Args:
        deferred: whether to defer Ctrl-C at all; if not, the function returns False.
    """
    pressed = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not (deferred and ours and before is signal.default_int_handler):
        yield pressed.is_set
        return

    def press(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
