"""Ranges with the smallest mean squared quantization error, one per width."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast import functional as F
from gradl1_fast._checks import MAX_BITS
from gradl1_fast.quantization.ranges.base import Ends, Range
from gradl1_fast.quantization.ranges.histogram import Histogram

__all__ = ["MeanSquaredError", "quantization_error"]

# Bins on each side of zero: more for a single tensor, fewer if each channel has its own histogram.
_SIDE, _SIDE_OF_CHANNELS = 1024, 256

_ROWS_AT_ONCE = 64  # rows whose candidates are in memory together

_COARSE = [2 ** (-6 * i / 32) for i in range(33)]
_FINE = [2 ** (6 / 32 * i / 8) for i in range(-8, 9)]
_STAGES = (
    [(f, f) for f in _COARSE],
    [(f, f) for f in _FINE],
    [(1.0, f) for f in _FINE],
    [(f, 1.0) for f in _FINE],
)


class MeanSquaredError(Range):
    """The range with the smallest mean squared quantization error at each width.

    The values are stored in a histogram, for which the error of a candidate is an exact integral, see
    :func:`quantization_error`. The candidates shrink both ends together, from the extremes to 1/64 of them,
    and then move each end separately.
    """

    def __init__(self) -> None:
        super().__init__()
        self._histogram: Histogram | None = None

    def update(self, x: Tensor) -> None:
        """Observe values."""
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
        extreme = torch.stack([low.nan_to_num().clamp(max=0), high.nan_to_num().clamp(min=0)], 1).double()
        rows = torch.arange(len(low), device=low.device).split(_ROWS_AT_ONCE)
        parts = [(self._histogram.select(part), extreme[part]) for part in rows]
        widths = range(1, MAX_BITS + 1)
        best = torch.stack(
            [torch.cat([_search(*part, bits, symmetric) for part in parts]) for bits in widths]
        )
        bad = ~(low.isfinite() & high.isfinite())
        lower, upper = best.to(low.dtype).unbind(2)
        return torch.where(bad, low, lower), torch.where(bad, high, upper)


def _search(histogram: Histogram, extreme: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return the best ends within the extremes, shape ``(rows, 2)``."""
    best = extreme
    for stage in _STAGES[:2] if symmetric else _STAGES:
        factors = torch.tensor(stage, dtype=best.dtype, device=best.device)[:, None]
        candidates = torch.minimum((best * factors).abs(), extreme.abs()) * extreme.sign()
        candidates = torch.cat([candidates, best[None]])
        low, high = candidates.unbind(2)
        errors = quantization_error(histogram, low, high, bits, symmetric=symmetric)
        least = errors.nan_to_num(torch.inf).argmin(0)
        best = candidates[least, torch.arange(len(best), device=best.device)]
    return best


def quantization_error(
    histogram: Histogram, low: Tensor, high: Tensor, bits: int, *, symmetric: bool
) -> Tensor:
    """Return the sum of squared quantization errors of a histogram, for each range and row.

    Values are assumed to be uniform within a bin. The error is then exact: with u = x / s, the clamped
    nearest code n and r = u - n, the integral of the squared error from 0 to x is ``s**3 (n / 12 + r**3 /
    3)``. Zeros have no error on any grid.

    Args:
        histogram: the histogram of the values.
        low: lower ends of the ranges, shape ``(*, rows)``.
        high: upper ends of the ranges, shape ``(*, rows)``.
        bits: 1 to 16.
        symmetric: as for :func:`gradl1_fast.functional.quantization_grid`.
    """
    scale, zero_point, q_min, q_max = F.quantization_grid(low, high, bits, symmetric=symmetric)
    u = histogram.edges() / scale[..., None]
    n = u.round()
    n = torch.minimum(torch.maximum(n, (q_min - zero_point)[..., None]), (q_max - zero_point)[..., None])
    integral = n / 12 + (u - n).pow_(3) / 3
    per_bin = (integral[..., 1:] - integral[..., :-1]).mul_(histogram.counts)
    return per_bin.sum(-1) * scale.pow(3) / histogram.width()
