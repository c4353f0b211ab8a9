"""The batches of a training: one order of the images for each epoch, augmented, a share for each rank."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.training.config import Config
from gradl1_fast.training.data import Batch
from gradl1_fast.training.data.augmentation import augment, generator_of
from gradl1_fast.training.loop.ranks import Ranks

__all__ = ["Batches"]


class Batches:
    """Draws the order of the images in each epoch from the seed, whatever the penalty and the ranks.

    Args:
        data: training images and labels.
        config: of the training.
        ranks: the processes that train together.

    Attributes:
        state: the state of the source of orders at the beginning of the present epoch.
    """

    def __init__(self, data: Batch, config: Config, ranks: Ranks) -> None:
        self._data, self._config, self._ranks = data, config, ranks
        self._source = torch.Generator().manual_seed(config.training.seed)
        self._order: Tensor | None = None
        self.state = self._source.get_state()

    def batch(self, epoch: int, step: int) -> Batch:
        """Return this rank's images and labels of a step of the present epoch, on its device."""
        settings, (images, labels) = self._config.training, self._data
        start = step * settings.batch_size
        chosen = self._epoch_order()[start : start + settings.batch_size]
        x, y = images[chosen], labels[chosen]
        if self._config.data.flip or self._config.data.crop:
            source = generator_of(settings.seed, epoch, step)
            x = augment(x, source, flip=self._config.data.flip, crop=self._config.data.crop)
        device = self._ranks.device
        return self._ranks.share(x).to(device), self._ranks.share(y).to(device)

    def next_epoch(self) -> None:
        """Go on to the order of the next epoch."""
        self._epoch_order()  # advances the source, even if no step was taken since a resume
        self._order, self.state = None, self._source.get_state()

    def load_state(self, state: Tensor) -> None:
        """Continue at the beginning of an epoch, with the :attr:`state` that it had."""
        self._source.set_state(state)
        self._order, self.state = None, state

    def _epoch_order(self) -> Tensor:
        if self._order is None:
            self.state = self._source.get_state()
            self._order = torch.randperm(len(self._data[1]), generator=self._source)
        return self._order
