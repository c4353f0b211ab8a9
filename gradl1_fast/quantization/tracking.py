"""Activation ranges that are updated during training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor, nn

from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.quantization.calibration import observed, quantizers_of, set_range
from gradl1_fast.quantization.freshness import remember_ranges
from gradl1_fast.quantization.ranges.base import InHindsight, MovingAverage, Range
from gradl1_fast.quantization.ranges.choice import choose

__all__ = ["track_ranges"]


@contextlib.contextmanager
def track_ranges(model: nn.Module, ranges: str | MovingAverage = "in_hindsight") -> Iterator[nn.Module]:
    """Context manager that updates activation ranges with each training batch.

    Each forward pass in training mode updates the ranges, at any width; passes in evaluation mode do not.
    With ``"moving_average"``, a batch is included in the range that quantizes it. With ``"in_hindsight"``, it
    is quantized in the range of the previous batches; the first batch uses the calibrated range, or its own
    if there is none. After the block, the ranges are those of all batches.

    Args:
        model: a converted model.
        ranges: ``"in_hindsight"``, ``"moving_average"``, or an object of
            :class:`gradl1_fast.ranges.InHindsight` or :class:`gradl1_fast.ranges.MovingAverage`.

    Raises:
        ValueError: the model has no activation quantizers, or ``ranges`` is another method; in a forward
            pass, the values at a quantizer, which is named, hold NaN or infinity.
        TypeError: ``ranges`` is neither a name nor an object.

    Each update synchronizes with the device once per quantizer.
    """
    method = choose("track_ranges", ranges)
    if not isinstance(method, MovingAverage):
        raise ValueError(
            f"track_ranges: ranges must be 'in_hindsight' or 'moving_average', got {type(method).__name__}"
        )
    quantizers = quantizers_of(model)
    trackers = {name: _Tracker(name, quantizer, method) for name, quantizer in quantizers.items()}
    with observed(quantizers, trackers):
        yield model
    for tracker in trackers.values():
        tracker.apply()
    remember_ranges(model)


class _Tracker:
    """Updates the range of a quantizer, before the quantizer uses it."""

    def __init__(self, name: str, quantizer: ActivationQuantizer, method: Range) -> None:
        self.name, self.quantizer = name, quantizer
        self.range = copy.deepcopy(method)
        if quantizer.low is not None and quantizer.high is not None and not quantizer.low.dim():
            self.range.low, self.range.high = quantizer.low.reshape(1), quantizer.high.reshape(1)

    def update(self, x: Tensor) -> None:
        if not self.quantizer.training:
            return
        if isinstance(self.range, InHindsight) and self.range.low is not None:
            self.apply()
            self._update_range(x)
        else:
            self._update_range(x)
            self.apply()

    def _update_range(self, x: Tensor) -> None:
        before = self.range.low, self.range.high
        self.range.update(x.reshape(1, -1))
        try:
            if self.range.low is not None:
                set_range("track_ranges", self.name, ActivationQuantizer(), self.range.ends())
        except ValueError:
            self.range.low, self.range.high = before
            raise

    def apply(self) -> None:
        if self.range.low is not None:
            set_range("track_ranges", self.name, self.quantizer, self.range.ends())
