"""Files that are there whole or not at all: written beside, brought to the disk, renamed into place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing", "to_disk", "write_bytes", "write_text"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path``, to be written in the block; it then takes the place of ``path``.

    A reader of ``path`` always sees the complete old file or the complete new one, even after a kill or a
    power cut at any moment. If the block raises, the old file stays. What a kill leaves behind begins with
    ``.partial-`` and is written over by the next attempt. The ending of the name is that of ``path``.

    Raises:
        OSError: the folder cannot be written to.
    """
    target = Path(path)
    partial = target.with_name(f".partial-{target.name}")
    try:
        yield partial
        to_disk(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        to_disk(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file as :func:`replacing` does."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of UTF-8 text as :func:`replacing` does; lines end as they are in ``text``."""
    write_bytes(path, text.encode())


def to_disk(path: Path) -> None:
    """Bring what was written to a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
