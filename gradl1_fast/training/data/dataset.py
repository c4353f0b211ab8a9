"""A data set for classification: images and labels to train with, and others to test with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradl1_fast.training.data.batches import Batch

__all__ = ["DataError", "Dataset", "check_labels", "standardised"]


class DataError(ValueError):
    """A data set is missing or is not what it should be; the message names the file and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels, no image in both parts.

    Attributes:
        name: what the data set is called.
        classes: number of different labels; labels are 0 up to one less.
        train: images ``(N, channels, H, W)`` of float32, standardised by the training images, and
            labels ``(N,)`` of int64.
        test: images and labels in the same form.
    """

    name: str
    classes: int
    train: Batch
    test: Batch

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train[0].shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.train[0].shape[2], self.train[0].shape[3]


def standardised(name: str, classes: int, train: Batch, test: Batch) -> Dataset:
    """Return a data set from images of uint8, each channel with mean 0 and deviation 1 over ``train``."""
    pixels = train[0].numel() // train[0].shape[1]
    mean, std = _statistics(train[0], pixels)
    return Dataset(
        name, classes, (_scale(train[0], mean, std), train[1]), (_scale(test[0], mean, std), test[1])
    )


def _statistics(images: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, exactly, from how often each value occurs."""
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = images[:, channel].flatten().bincount(minlength=256).double()
        mean = (counts * values).sum() / pixels
        means.append(mean)
        deviations.append(((counts * (values - mean) ** 2).sum() / pixels).sqrt())
    shape = (1, -1, 1, 1)
    return torch.stack(means).reshape(shape), torch.stack(deviations).clamp_min(1).reshape(shape)


def _scale(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return images.float().sub_(mean.float()).div_(std.float())


def check_labels(where: str, labels: Tensor, classes: int) -> None:
    """Check that labels are classes."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(f"{where}: labels must be from 0 to {classes - 1}, found {int(labels.max())}")
