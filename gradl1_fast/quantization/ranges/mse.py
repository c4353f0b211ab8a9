"""Ranges with the smallest mean squared error of quantization, one for each width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradl1_fast import functional as F
from gradl1_fast._checks import MAX_BITS
from gradl1_fast.quantization.ranges.base import Ends, Range
from gradl1_fast.quantization.ranges.histogram import Histogram

__all__ = ["MeanSquaredError", "quantization_error"]

# Bins on each side of zero: many for one tensor, fewer where each channel has a histogram of its own.
_SIDE, _SIDE_OF_CHANNELS = 1024, 256

Factors = list[tuple[float, float]]
_COARSE = [2 ** (-6 * i / 32) for i in range(33)]
_FINE = [2 ** (6 / 32 * i / 8) for i in range(-8, 9)]
_STAGES: tuple[Factors, ...] = (
    [(f, f) for f in _COARSE],
    [(f, f) for f in _FINE],
    [(1.0, f) for f in _FINE],
    [(f, 1.0) for f in _FINE],
)


class MeanSquaredError(Range):
    """The range with the smallest mean squared error between values and quantized values, at each width.

    The values are kept as a histogram, in which the error of a candidate is an exact integral: see
    :func:`quantization_error`. Candidates shrink both ends together, from the extremes to a 64th of them,
    and then move each end by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._histogram: Histogram | None = None

    def update(self, x: Tensor) -> None:
        """Take note of values."""
        super().update(x)
        if x.numel():
            if self._histogram is None:
                side = _SIDE if x.shape[0] == 1 else _SIDE_OF_CHANNELS
                self._histogram = Histogram(x.shape[0], side, x.device)
            self._histogram.update(x)

    def ends(self, *, symmetric: bool = False) -> Ends:
        """Return the ends for each of 16 widths; see :meth:`Range.ends`."""
        low, high = self.seen()
        assert self._histogram is not None
        found = [self._search(bits, symmetric) for bits in range(1, MAX_BITS + 1)]
        bad = ~(low.isfinite() & high.isfinite())
        lower, upper = (torch.stack(ends).to(low.dtype) for ends in zip(*found, strict=True))
        return torch.where(bad, low, lower), torch.where(bad, high, upper)

    def _search(self, bits: int, symmetric: bool) -> Ends:
        assert self._histogram is not None
        low, high = (end.double().nan_to_num() for end in self.seen())
        extreme = low.clamp(max=0), high.clamp(min=0)
        best: Ends = extreme
        least = torch.full_like(low, torch.inf)
        for stage in _STAGES[:2] if symmetric else _STAGES:
            start = best
            for candidate in _candidates(start, extreme, stage):
                error = quantization_error(self._histogram, *candidate, bits, symmetric=symmetric)
                better = error < least
                least = torch.where(better, error, least)
                best = (
                    torch.where(better, candidate[0], best[0]),
                    torch.where(better, candidate[1], best[1]),
                )
        return best


def _candidates(start: Ends, extreme: Ends, factors: Factors) -> Iterator[Ends]:
    for low_factor, high_factor in factors:
        yield (
            torch.maximum(start[0] * low_factor, extreme[0]),
            torch.minimum(start[1] * high_factor, extreme[1]),
        )


def quantization_error(
    histogram: Histogram, low: Tensor, high: Tensor, bits: int, *, symmetric: bool
) -> Tensor:
    """Return the sum of squared errors of quantizing the values of a histogram, one for each row.

    Values are taken as uniform within a bin. The error is then exact: with u = x / s, n the nearest code,
    clamped, and r = u - n, the integral of the squared error from 0 to x is ``s**3 (n / 12 + r**3 / 3)``.
    Zeros have no error on any grid.

    Args:
        histogram: of the values.
        low: lower end of the range, one for each row.
        high: upper end.
        bits: 1 to 16.
        symmetric: as of :func:`gradl1_fast.functional.quantization_grid`.
    """
    scale, zero_point, q_min, q_max = F.quantization_grid(low, high, bits, symmetric=symmetric)
    u = histogram.edges() / scale[:, None]
    n = torch.minimum(torch.maximum(u.round(), (q_min - zero_point)[:, None]), (q_max - zero_point)[:, None])
    integral = n / 12 + (u - n).pow(3) / 3
    per_bin = (integral[:, 1:] - integral[:, :-1]) * histogram.counts
    return per_bin.sum(1) * scale.pow(3) / histogram.width()
