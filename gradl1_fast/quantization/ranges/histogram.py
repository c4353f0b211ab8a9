"""A histogram of a stream of values with exact counts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Histogram"]

_CHUNK = 1 << 20
_SMALLEST_EXPONENT = -1000  # 2**-1000 and its products with the number of bins are normal in float64


class Histogram:
    """Counts in bins ``[k h, (k + 1) h)``, k from ``-side`` to ``side - 1``, with zeros counted separately.

    The width ``h`` is the smallest power of two for which the bins cover every value so far. For a larger
    value, pairs of bins are merged, so counts are never estimates: the histogram of a stream equals that of
    all its values at once, in any order, and ``h <= 2 * max |x| / side``.

    Args:
        rows: number of independent histograms.
        side: bins on each side of zero, a power of two.
        device: the device of the counts.

    Attributes:
        counts: the counts of nonzero finite values, shape ``(rows, 2 * side)``, int64.
        zeros: the number of zeros, shape ``(rows,)``.
        exponent: ``h = 2 ** exponent``, shape ``(rows,)``, int64.
    """

    def __init__(self, rows: int, side: int, device: torch.device) -> None:
        self.side = side
        self.counts = torch.zeros(rows, 2 * side, dtype=torch.int64, device=device)
        self.zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self.exponent = torch.full((rows,), _SMALLEST_EXPONENT, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        """Count the finite values of ``x``, shape ``(rows, n)``."""
        for part in x.split(max(_CHUNK // x.shape[0], 1), 1):
            self._count(part.double())

    def select(self, rows: Tensor) -> Histogram:
        """Return the histograms of some rows."""
        part = Histogram(len(rows), self.side, rows.device)
        part.counts, part.zeros, part.exponent = self.counts[rows], self.zeros[rows], self.exponent[rows]
        return part

    def _count(self, x: Tensor) -> None:
        finite = x.isfinite()
        x = torch.where(finite, x, 0.0)
        self._widen(x.abs().amax(1))
        nonzero = x != 0
        bins = (x / self.width()[:, None]).floor().long() + self.side
        self.counts.scatter_add_(1, bins, nonzero.long())
        self.zeros += (finite & ~nonzero).sum(1)

    def _widen(self, largest: Tensor) -> None:
        # frexp returns the smallest k with largest < 2 ** k.
        k = torch.frexp(largest).exponent.long()
        needed = torch.where(largest > 0, k - (self.side.bit_length() - 1), _SMALLEST_EXPONENT)
        wider = torch.maximum(self.exponent, needed)
        if not bool((wider > self.exponent).any()):
            return
        bins = torch.arange(-self.side, self.side, device=self.counts.device)
        merged = bins >> (wider - self.exponent).clamp(max=62)[:, None]
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, merged + self.side, self.counts)
        self.exponent = wider

    def width(self) -> Tensor:
        """Return the width of the bins of each row, float64."""
        return torch.ldexp(torch.ones_like(self.exponent, dtype=torch.float64), self.exponent)

    def edges(self) -> Tensor:
        """Return the edges of the bins, shape ``(rows, 2 * side + 1)``, float64."""
        indices = torch.arange(-self.side, self.side + 1, device=self.counts.device)
        return indices * self.width()[:, None]
