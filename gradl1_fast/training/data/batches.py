"""Images and labels in memory, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Batch", "shuffled_batches"]

Batch = tuple[Tensor, Tensor]


def shuffled_batches(data: Batch, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield the data once, in random order, in batches of ``size``; an incomplete last one is left out."""
    images, labels = data
    order = torch.randperm(len(images), generator=generator)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield images[chosen], labels[chosen]
