"""Images in folders, a folder a class, in the layout of torchvision's ImageFolder. Needs Pillow."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gradl1_fast._extras import install
from gradl1_fast.training.data.batches import Batch
from gradl1_fast.training.data.dataset import DataError, Dataset

__all__ = ["ImageFiles", "image_folder"]

# Pillow knows many more formats by their content, and for PostScript it starts a program.
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
ENDINGS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_NAMES = ("val", "test")

# Of the colours in ImageNet, between 0 and 1: the custom for photographs.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# 8192 x 8192, more than cameras commonly give. 20 kB can hold more, at five bytes of memory a pixel.
MOST_PIXELS = 2**26

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF

MARGIN = 8 / 7  # the shorter side before the crop, as 256 to 224


class ImageFiles:
    """Images that are read from their files when they are asked for; indexed as a tensor of them is.

    Each is scaled so that its shorter side is ``8 / 7 * size``, cut to the square in its middle and
    standardised by the mean and deviation of ImageNet's colours. Grey images of 16 bits are read at their
    depth.

    Args:
        paths: of the files.
        size: of the sides, in pixels.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = list(paths), size
        self.shape = torch.Size((len(self.paths), 3, size, size))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        """Return the images ``(N, 3, size, size)`` of some places, float32."""
        places = range(len(self))[chosen] if isinstance(chosen, slice) else chosen.tolist()
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            images = list(pool.map(self._read, [self.paths[place] for place in places]))
        pixels = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size)
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
        return (pixels / 255).sub_(mean).div_(std)

    def split(self, count: int) -> Iterator[Tensor]:
        """Yield all images in order, ``count`` at a time."""
        for start in range(0, len(self), count):
            yield self[start : start + count]

    def _read(self, path: Path) -> Tensor:
        image_module = _pillow()
        try:
            # From memory: reading a file, Python allocates as many bytes as a damaged length asks for.
            with image_module.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as file:
                _check_pixels(path, *file.size)
                white = _white(path, file)
                image = _square(file.convert("RGB" if white is None else "F"), self.size)
        except DataError:
            raise
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            raise DataError(f"{path}: truncated or corrupt image: {error}") from error
        if white is not None:
            values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32)
            return (values * (255 / white)).reshape(1, self.size, self.size).expand(3, -1, -1)
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return values.reshape(self.size, self.size, 3).permute(2, 0, 1)


def image_folder(folder: Path | None, size: int) -> Dataset:
    """Return the images in ``train/CLASS/`` to train with, and those in ``val/CLASS/`` (or ``test``) to test.

    Classes are numbered in the order of their names. Files are read when a batch asks for them.

    Args:
        folder: that holds the folders ``train`` and ``val``.
        size: of the sides of the images, in pixels.

    Raises:
        DataError: a folder is missing or empty, or the classes differ; the message says which.
        ImportError: Pillow is not installed.
    """
    _pillow()
    if folder is None:
        raise DataError(
            "no folder was given: use --data FOLDER, a folder with train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    test = next((folder / name for name in TEST_NAMES if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        raise DataError(
            f"{folder}: must hold the folders train and val (or test), each with one folder per class"
        )
    classes = _classes(folder / "train")
    if _classes(test) != classes:
        odd = sorted(set(_classes(test)) ^ set(classes))
        raise DataError(
            f"{folder}: train and {test.name} must have the same classes; only one has {', '.join(odd)}"
        )
    parts = [_part(place, classes, size) for place in (folder / "train", test)]
    return Dataset("images", len(classes), *parts)


def _classes(folder: Path) -> list[str]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not found:
        raise DataError(f"{folder}: must have one folder per class, but has no folders")
    return found


def _part(folder: Path, classes: list[str], size: int) -> Batch:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in ENDINGS)
        if not found:
            raise DataError(f"{folder / name}: holds no image; image names must end in {', '.join(ENDINGS)}")
        paths += found
        labels += [label] * len(found)
    # what the loop does with images (length, choice, split) files can do as well as a tensor
    return cast(Tensor, ImageFiles(paths, size)), torch.tensor(labels)


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise DataError(f"{path}: is too large: {width} x {height} pixels; at most {MOST_PIXELS} are allowed")


def _white(path: Path, file: Any) -> int | None:
    """Return the value of white in a grey image of more than 8 bits, None for all others.

    Pillow would convert such an image by clamping its values at 255.

    Raises:
        DataError: the file does not say which value is white.
    """
    mode, tags = file.mode, getattr(file, "tag_v2", {})
    if not mode.startswith(("I", "F")):
        return None
    bits, white_is_zero = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == 0
    if mode == "F" or white_is_zero or (file.format == "TIFF" and mode == "I"):
        kind = "of floats" if mode == "F" else f"of {bits}-bit integers"
        kind = "whose white is 0" if white_is_zero else kind
        raise DataError(f"{path}: is a grey image {kind}; save it with 8 or 16 bits, from black to white")
    return int(2**bits - 1)


def _square(image: Any, size: int) -> Any:
    """Return the middle of an image, scaled; of a long and narrow one no more than that is scaled."""
    shorter = min(image.size)
    if not shorter:
        raise ValueError("it has no pixels")
    scaled = [max(size, round(side * size * MARGIN / shorter)) for side in image.size]
    starts = [(side - size) // 2 for side in scaled]
    ends = zip(image.size, scaled, starts, strict=True)
    pairs = [(side * start / whole, side * (start + size) / whole) for side, whole, start in ends]
    (left, right), (top, bottom) = pairs
    return image.resize((size, size), _pillow().Resampling.BILINEAR, box=(left, top, right, bottom))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"folders of images need Pillow: {install('vision')}") from error
    return Image
