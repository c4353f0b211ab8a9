"""Selects a range method by name or as an object."""

from __future__ import annotations

from gradl1_fast.quantization.ranges.base import InHindsight, MinMax, MovingAverage, Range, StandardDeviation
from gradl1_fast.quantization.ranges.batch_norm import BatchNormStatistics
from gradl1_fast.quantization.ranges.mse import MeanSquaredError
from gradl1_fast.quantization.ranges.percentile import Percentile

__all__ = ["NAMES", "choose"]

NAMES: dict[str, type[Range] | type[BatchNormStatistics]] = {
    "min_max": MinMax,
    "moving_average": MovingAverage,
    "in_hindsight": InHindsight,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "standard_deviation": StandardDeviation,
    "batch_norm": BatchNormStatistics,
}


def choose(caller: str, ranges: str | Range | BatchNormStatistics) -> Range | BatchNormStatistics:
    """Return the requested range method; ``caller`` is used in messages.

    Raises:
        ValueError: the name is unknown, or the object has been used already.
        TypeError: it is neither a name nor an object of one of the classes.
    """
    if isinstance(ranges, str):
        if ranges not in NAMES:
            raise ValueError(f"{caller}: ranges must be one of {', '.join(map(repr, NAMES))}, got {ranges!r}")
        return NAMES[ranges]()
    if not isinstance(ranges, Range | BatchNormStatistics):
        raise TypeError(f"{caller}: ranges must be a name or an object of gradl1_fast.ranges, got {ranges!r}")
    if isinstance(ranges, Range) and ranges.low is not None:
        raise ValueError(
            f"{caller}: this {type(ranges).__name__} has already observed values; create a new one"
        )
    return ranges
