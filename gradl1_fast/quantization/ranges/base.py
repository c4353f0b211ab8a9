"""The interface of range methods, and the methods that need only sums and extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast._dtypes import sum_dtype

__all__ = ["InHindsight", "MinMax", "MovingAverage", "Range", "StandardDeviation"]

Ends = tuple[Tensor, Tensor]


class Range:
    """Determines the range of a tensor from a stream of values, in constant memory.

    A new object has observed no values; it is copied for each tensor. A subclass extends :meth:`update` and
    overrides :meth:`ends`.

    Attributes:
        low: smallest value of each row so far; None before the first. NaN propagates.
        high: largest value of each row so far; None before the first. NaN propagates.
        for_weights: whether the method supports weights, which are observed once as a whole.
    """

    for_weights = True

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Observe values.

        Args:
            x: shape ``(rows, n)``, of any floating type; each row has its own range.
        """
        if x.numel():
            low, high = extremes(x)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)

    def ends(self, *, symmetric: bool = False) -> Ends:
        """Return the ends of the range.

        Args:
            symmetric: the grid is symmetric around zero, from minus to plus the larger end, as for weights.

        Returns:
            Lower and upper ends of shape ``(widths, rows)``, with one row for all widths or 16 rows for 1 to
            16 bits. Not finite if an observed value was not.

        Raises:
            RuntimeError: no value was observed.
        """
        low, high = self.seen()
        return low[None], high[None]

    def seen(self) -> Ends:
        """Return the extremes of each row.

        Raises:
            RuntimeError: no value was observed.
        """
        if self.low is None or self.high is None:
            raise RuntimeError("no value was observed")
        return self.low, self.high


class MinMax(Range):
    """The range from the smallest to the largest value, which clamps nothing."""


class MovingAverage(Range):
    """The range between the moving averages of each batch's smallest and largest value.

    Args:
        momentum: weight of the previous average, at least 0 and below 1; the first batch initializes it.
    """

    for_weights = False

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = check.coefficient("momentum", momentum)
        if self.momentum >= 1:
            raise ValueError(f"momentum must be below 1, got {momentum}")

    def update(self, x: Tensor) -> None:
        """Observe a batch."""
        if x.numel():
            low, high = extremes(x)
            self.low = low if self.low is None else self._mean(self.low, low)
            self.high = high if self.high is None else self._mean(self.high, high)

    def _mean(self, average: Tensor, value: Tensor) -> Tensor:
        return self.momentum * average + (1 - self.momentum) * value


class InHindsight(MovingAverage):
    """A moving average for training, which quantizes each batch in the range of the previous ones.

    The range is thus known before the tensor is computed. See :func:`gradl1_fast.track_ranges`.

    Args:
        momentum: as for :class:`MovingAverage`.

    Source: Fournarakis and Nagel 2021, arXiv 2105.04246, section 4.
    """


class StandardDeviation(Range):
    """The range of ``alpha`` standard deviations on both sides of the mean, limited to the extremes.

    Args:
        alpha: more than 0.
    """

    def __init__(self, alpha: float = 3.0) -> None:
        super().__init__()
        self.alpha = check.coefficient("alpha", alpha)
        if not self.alpha:
            raise ValueError("alpha must be more than 0")
        self._count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Observe values; mean and variance are merged in float64 (Chan, Golub and LeVeque 1979)."""
        super().update(x)
        if not x.numel():
            return
        wide = x.double()
        n, mean = x.shape[1], wide.mean(1)
        squares = (wide - mean[:, None]).square().sum(1)
        if self._mean is None or self._squares is None:
            self._count, self._mean, self._squares = n, mean, squares
            return
        total = self._count + n
        difference = mean - self._mean
        self._mean = self._mean + difference * (n / total)
        self._squares = self._squares + squares + difference.square() * (self._count * n / total)
        self._count = total

    def ends(self, *, symmetric: bool = False) -> Ends:
        """Return the ends; see :meth:`Range.ends`."""
        low, high = self.seen()
        assert self._mean is not None
        assert self._squares is not None
        reach = self.alpha * (self._squares / self._count).sqrt()
        lower, upper = (self._mean - reach).to(low.dtype), (self._mean + reach).to(high.dtype)
        return torch.maximum(lower, low)[None], torch.minimum(upper, high)[None]


def extremes(x: Tensor) -> Ends:
    """Return the smallest and largest value of each row, in at least float32; NaN propagates."""
    low, high = x.to(sum_dtype(x.dtype)).aminmax(dim=1)
    return low, high
