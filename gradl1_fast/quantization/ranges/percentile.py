"""Ranges that clip a given share of the values."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast.quantization.ranges.base import Ends, Range
from gradl1_fast.quantization.ranges.histogram import Histogram

__all__ = ["Percentile"]

_SIDE = 2048


class Percentile(Range):
    """The range that clips ``(100 - percent) / 2`` percent of the values at each end.

    At most ``(100 - percent) / 2`` percent of all observed values are above it, and at most as many below.
    Its ends are the order statistics of the whole stream, rounded outwards by at most a bin of the histogram,
    ``max |x| / 1024``. They do not depend on the number, sizes and order of the batches.

    Args:
        percent: share of the values inside the range, above 0 and at most 100.
    """

    def __init__(self, percent: float = 99.99) -> None:
        super().__init__()
        self.percent = check.coefficient("percent", percent)
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent must be above 0 and at most 100, got {percent}")
        self._histogram: Histogram | None = None

    def update(self, x: Tensor) -> None:
        """Observe values."""
        super().update(x)
        if x.numel():
            if self._histogram is None:
                self._histogram = Histogram(x.shape[0], _SIDE, x.device)
            self._histogram.update(x)

    def ends(self, *, symmetric: bool = False) -> Ends:
        """Return the ends; see :meth:`Range.ends`. They are not finite if an observed value was not."""
        low, high = self.seen()
        assert self._histogram is not None
        left_out = (100 - self.percent) / 200
        edges = self._histogram.edges()
        upper = _upper_end(self._histogram.counts, self._histogram.zeros, edges, left_out)
        mirrored = self._histogram.counts.flip(1), self._histogram.zeros, -edges.flip(1)
        lower = -_upper_end(*mirrored, left_out)
        lower, upper = torch.maximum(lower.to(low.dtype), low), torch.minimum(upper.to(high.dtype), high)
        bad = ~(low.isfinite() & high.isfinite())
        return torch.where(bad, low, lower)[None], torch.where(bad, high, upper)[None]


def _upper_end(counts: Tensor, zeros: Tensor, edges: Tensor, left_out: float) -> Tensor:
    """Return the smallest bin edge above which at most the share ``left_out`` of the values lies."""
    counts = counts.clone()
    counts[:, counts.shape[1] // 2 - 1] += zeros  # the bin that ends at zero
    total = counts.sum(1, keepdim=True)
    above = total - counts.cumsum(1)
    first = (above <= left_out * total).long().argmax(1, keepdim=True)
    return edges.gather(1, first + 1).squeeze(1)
