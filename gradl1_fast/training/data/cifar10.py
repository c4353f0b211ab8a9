"""CIFAR-10: 60,000 colour images of 32x32, ten classes, in its binary or its pickled form.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images",
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from torch import Tensor

from gradl1_fast.training.data.batches import Batch
from gradl1_fast.training.data.dataset import DataError, Dataset, check_labels, standardised
from gradl1_fast.training.data.pickled import read_pickle

__all__ = ["cifar10"]

CLASSES = 10
SHAPE = (3, 32, 32)
IMAGES = 10_000  # in each file
PIXELS = 3 * 32 * 32

TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"

# MD5 sums of the pickled files, as they are published; the binary ones have none.
SUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def cifar10(folder: Path | None) -> Dataset:
    """Return CIFAR-10: 50,000 images to train with, 10,000 to test.

    Args:
        folder: that holds the six files of either form, or the folder of that name
            (``cifar-10-batches-bin``, ``cifar-10-batches-py``) in which they come.

    Raises:
        DataError: files are missing or damaged; the message says how to get them.
    """
    for place in _places(folder):
        for ending, read in ((".bin", _binary), ("", _pickled)):
            if all((place / f"{name}{ending}").is_file() for name in (*TRAIN, TEST)):
                parts = [read(place / f"{name}{ending}") for name in (*TRAIN, TEST)]
                train = (
                    torch.cat([part[0] for part in parts[:-1]]),
                    torch.cat([part[1] for part in parts[:-1]]),
                )
                return standardised("cifar10", CLASSES, train, parts[-1])
    where = "no folder was given" if folder is None else f"{folder}: some of the six files are missing"
    raise DataError(
        f"{where}. Get CIFAR-10, binary or for Python, from https://www.cs.toronto.edu/~kriz/cifar.html, "
        "unpack it and give the folder (--data FOLDER)"
    )


def _places(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    return [folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"]


def _binary(path: Path) -> Batch:
    """Read records of one byte for the label and 3072 for the pixels."""
    size = IMAGES * (1 + PIXELS)
    if path.stat().st_size != size:
        raise DataError(f"{path}: must have {size} bytes, has {path.stat().st_size}; download it again")
    records = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).reshape(IMAGES, -1)
    return _checked(path, records[:, 1:], records[:, 0])


def _pickled(path: Path) -> Batch:
    """Read a pickle, which is checked to be the published one and whose code is not executed all the same."""
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != SUMS[path.name]:
        raise DataError(f"{path}: wrong checksum: the file is damaged or altered; download it again")
    try:
        found = read_pickle(content)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: cannot be read: it {error}") from error
    if not isinstance(found, dict) or not {b"data", b"labels"} <= found.keys():
        raise DataError(f"{path}: must hold a dictionary with b'data' and b'labels'")
    pixels, labels = found[b"data"], found[b"labels"]
    if not isinstance(pixels, Tensor) or tuple(pixels.shape) != (IMAGES, PIXELS):
        raise DataError(f"{path}: b'data' must be an array of shape {(IMAGES, PIXELS)}")
    if not isinstance(labels, list) or len(labels) != IMAGES or not all(type(one) is int for one in labels):
        raise DataError(f"{path}: b'labels' must be a list of {IMAGES} whole numbers")
    return _checked(path, pixels, torch.tensor(labels))


def _checked(path: Path, pixels: Tensor, labels: Tensor) -> Batch:
    check_labels(str(path), labels.long(), CLASSES)
    return pixels.reshape(-1, *SHAPE), labels.long()
