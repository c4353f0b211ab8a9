"""Data sets by name, as the command and a run's configuration call them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gradl1_fast.training.data.dataset import Dataset
from gradl1_fast.training.data.digits import digits
from gradl1_fast.training.data.fashion_mnist import fashion_mnist

__all__ = ["NAMES", "load"]


def _digits(folder: Path | None) -> Dataset:
    if folder is not None:
        raise ValueError("the digits come with scikit-learn; they are read from no folder")
    return digits()


_READERS: dict[str, Callable[[Path | None], Dataset]] = {"digits": _digits, "fashion-mnist": fashion_mnist}
NAMES = tuple(_READERS)


def load(name: str, folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Return a data set.

    Args:
        name: one of ``NAMES``.
        folder: where its files are; None for where they are usually found.

    Raises:
        ValueError: there is no such data set; or, as a :class:`DataError`, its files are missing or
            damaged, and the message says how to get them.
        ImportError: a package that it needs is not installed.
    """
    if name not in _READERS:
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
    return _READERS[name](None if folder is None else Path(folder).expanduser())
