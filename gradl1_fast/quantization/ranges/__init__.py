"""Methods that determine ranges, by name or as objects, for :func:`gradl1_fast.calibrate` and others.

| name | class |
|---|---|
| ``"min_max"`` | :class:`MinMax` |
| ``"moving_average"`` | :class:`MovingAverage` |
| ``"in_hindsight"`` | :class:`InHindsight` |
| ``"percentile"`` | :class:`Percentile` |
| ``"mse"`` | :class:`MeanSquaredError` |
| ``"standard_deviation"`` | :class:`StandardDeviation` |
| ``"batch_norm"`` | :class:`BatchNormStatistics`, which needs no data |
"""

from gradl1_fast.quantization.ranges.base import InHindsight, MinMax, MovingAverage, Range, StandardDeviation
from gradl1_fast.quantization.ranges.batch_norm import BatchNormStatistics
from gradl1_fast.quantization.ranges.choice import choose
from gradl1_fast.quantization.ranges.mse import MeanSquaredError
from gradl1_fast.quantization.ranges.percentile import Percentile

__all__ = [
    "BatchNormStatistics",
    "InHindsight",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "Range",
    "StandardDeviation",
    "choose",
]
