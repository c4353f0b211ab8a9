"""Data sets by name, as the command and a run's configuration call them."""

from __future__ import annotations

import os
from pathlib import Path

from gradl1_fast import _checks as check
from gradl1_fast.training.data.cifar10 import cifar10
from gradl1_fast.training.data.dataset import Dataset
from gradl1_fast.training.data.digits import digits
from gradl1_fast.training.data.fashion_mnist import fashion_mnist
from gradl1_fast.training.data.image_folder import image_folder

__all__ = ["NAMES", "load"]

NAMES = ("digits", "fashion-mnist", "cifar10", "images")
DEFAULT_SIZE = 224


def load(name: str, folder: str | os.PathLike[str] | None = None, *, size: int | None = None) -> Dataset:
    """Return a data set.

    Args:
        name: one of ``NAMES``; ``"images"`` is any folder in the layout of torchvision's ImageFolder.
        folder: where its files are; None for where they are usually found.
        size: of the sides of ``"images"``, 224 by default; the others have a size of their own.

    Raises:
        ValueError: there is no such data set; or, as a :class:`DataError`, its files are missing or
            damaged, and the message says how to get them.
        ImportError: a package that it needs is not installed.
    """
    check.one_of("data", name, NAMES)
    place = None if folder is None else Path(folder).expanduser()
    if name == "images":
        return image_folder(place, DEFAULT_SIZE if size is None else check.count("size", size))
    if size is not None:
        raise ValueError(f"size: the images of {name} have a fixed size, got {size}")
    if name == "digits":
        if place is not None:
            raise ValueError("the digits come with scikit-learn; do not give a folder")
        return digits()
    return fashion_mnist(place) if name == "fashion-mnist" else cifar10(place)
