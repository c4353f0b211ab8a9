"""Handwritten digits that ship with scikit-learn: 1797 images of 8x8 grey values, ten classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradl1_fast.training.data.batches import Batch

__all__ = ["TEST_IMAGES", "Digits", "digits"]

TEST_IMAGES = 597


@dataclass(frozen=True)
class Digits:
    """Images for training and for testing, no image in both.

    Attributes:
        train: images ``(1200, 1, 8, 8)``, float32, of mean 0 and standard deviation 1, and labels.
        test: images ``(597, 1, 8, 8)``, scaled like the others, and labels.
    """

    train: Batch
    test: Batch


def digits(seed: int = 0) -> Digits:
    """Return the digits, split at random by ``seed``; scaling uses the training images alone.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: UCI "Optical Recognition of Handwritten Digits", the copy in ``sklearn.datasets``.
    """
    images, labels = _load()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Digits(train=(images[train], labels[train]), test=(images[test], labels[test]))


def _load() -> Batch:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'gradl1-fast[cli]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1)
    return images, torch.from_numpy(found.target).long()
