"""The two coefficients from one number: the share that the penalty has of the loss when it is switched on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Share"]

BATCHES = 8


class Share:
    """Finds coefficients such that each term is half of ``share`` times the loss, on the first batches.

    Each coefficient is the mean loss over the mean term of the batches seen; after ``batches`` of them both
    are kept. Looking at a value waits for the device, in these batches alone.

    Args:
        share: of the loss, more than 0.
        batches: how many are looked at.
    """

    def __init__(self, share: float, batches: int = BATCHES) -> None:
        self.share, self.batches = share, batches
        self._seen = 0
        self._loss, self._weights, self._activations = 0.0, 0.0, 0.0

    @property
    def is_found(self) -> bool:
        """Whether the coefficients are kept by now."""
        return self._seen >= self.batches

    def take(self, loss: Tensor, weights: Tensor | None, activations: Tensor | None) -> tuple[float, float]:
        """Return the coefficients of both terms after one more batch; 0 for a term that is absent.

        A batch whose loss or terms are not finite is left out.
        """
        values = [
            loss.new_zeros(()) if t is None else t.detach().to(loss.device) for t in (weights, activations)
        ]
        seen = torch.stack([loss.detach().abs().to(values[0].dtype).reshape(()), *values])
        if bool(seen.isfinite().all()):
            self._seen += 1
            of_loss, of_weights, of_activations = seen.tolist()
            self._loss += of_loss
            self._weights += of_weights
            self._activations += of_activations
        present = sum(t is not None for t in (weights, activations))
        wanted = self.share * self._loss / max(present, 1)
        return tuple(wanted / term if term else 0.0 for term in (self._weights, self._activations))  # type: ignore[return-value]
