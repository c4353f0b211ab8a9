"""Handwritten digits that ship with scikit-learn: 1797 images of 8x8 grey values, ten classes."""

from __future__ import annotations

import torch

from gradl1_fast._extras import install
from gradl1_fast.training.data.batches import Batch
from gradl1_fast.training.data.dataset import Dataset

__all__ = ["TEST_IMAGES", "digits"]

CLASSES = 10
TEST_IMAGES = 597


def digits(seed: int = 0) -> Dataset:
    """Return the digits, 1200 to train with and 597 to test, split at random by ``seed``.

    Scaling uses the mean and deviation of all pixels of the training images.

    Raises:
        ImportError: scikit-learn is not installed.

    Source: UCI "Optical Recognition of Handwritten Digits", the copy in ``sklearn.datasets``.
    """
    images, labels = _load()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Dataset("digits", CLASSES, (images[train], labels[train]), (images[test], labels[test]))


def _load() -> Batch:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits come with scikit-learn: {install('cli')}") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1)
    return images, torch.from_numpy(found.target).long()
