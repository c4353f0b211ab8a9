"""Derives both coefficients from the initial share of the penalty in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Share"]

BATCHES = 8


class Share:
    """Determines coefficients such that each term is half of ``share`` times the loss on the first batches.

    Each coefficient is proportional to the mean loss divided by the mean term of the batches so far. After
    ``batches`` batches the coefficients are fixed. Only these batches synchronize with the device.

    Args:
        share: the share of the loss, more than 0.
        batches: the number of batches to measure.
    """

    def __init__(self, share: float, batches: int = BATCHES) -> None:
        self.share, self.batches = share, batches
        self._seen = 0
        self._loss, self._weights, self._activations = 0.0, 0.0, 0.0

    @property
    def is_fixed(self) -> bool:
        """Whether the coefficients are fixed."""
        return self._seen >= self.batches

    def take(self, loss: Tensor, weights: Tensor | None, activations: Tensor | None) -> tuple[float, float]:
        """Return the coefficients of both terms after another batch; 0 for an absent term.

        A batch with a loss or a term that is not finite is skipped.
        """
        values = [
            loss.new_zeros(()) if t is None else t.detach().to(loss.device) for t in (weights, activations)
        ]
        sums = torch.stack([loss.detach().abs().to(values[0].dtype).reshape(()), *values])
        if bool(sums.isfinite().all()):
            self._seen += 1
            of_loss, of_weights, of_activations = sums.tolist()
            self._loss += of_loss
            self._weights += of_weights
            self._activations += of_activations
        count = sum(t is not None for t in (weights, activations))
        target = self.share * self._loss / max(count, 1)
        return tuple(target / term if term else 0.0 for term in (self._weights, self._activations))  # type: ignore[return-value]
