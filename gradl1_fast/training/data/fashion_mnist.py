"""Fashion-MNIST: 70,000 images of 28x28 grey values, ten kinds of clothing.

Source: Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747, https://github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

from pathlib import Path

from gradl1_fast.training.data.batches import Batch
from gradl1_fast.training.data.dataset import DataError, Dataset, check_labels, standardised
from gradl1_fast.training.data.idx import IdxFile

__all__ = ["DEBIAN", "fashion_mnist"]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it

CLASSES = 10

FILES = (
    IdxFile(
        "train-images-idx3-ubyte.gz",
        (60000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    IdxFile(
        "train-labels-idx1-ubyte.gz",
        (60000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte.gz",
        (10000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte.gz",
        (10000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)


def fashion_mnist(folder: Path | None = None) -> Dataset:
    """Return Fashion-MNIST from its four gzipped IDX files: 60,000 images to train with, 10,000 to test.

    Args:
        folder: where the files are; None for the folder of Debian's package.

    Raises:
        DataError: a file is missing, damaged or another one; the message says how to get it.
    """
    folder = DEBIAN if folder is None else folder
    missing = [file.name for file in FILES if not (folder / file.name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: no {' and no '.join(missing)} here. Get Fashion-MNIST with 'sudo apt install "
            "dataset-fashion-mnist' on Debian or Ubuntu, or get its four .gz files from "
            "https://github.com/zalandoresearch/fashion-mnist and give their folder (--data FOLDER)"
        )
    return standardised("fashion-mnist", CLASSES, _part(folder, *FILES[:2]), _part(folder, *FILES[2:]))


def _part(folder: Path, images: IdxFile, labels: IdxFile) -> Batch:
    classes = labels.read(folder).long()
    check_labels(str(folder / labels.name), classes, CLASSES)
    return images.read(folder).unsqueeze(1), classes
