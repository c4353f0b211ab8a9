"""Activation ranges from data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.quantization._modes import evaluation, run

__all__ = ["MinMax", "calibrate"]


class MinMax:
    """Smallest and largest value over all batches; memory does not grow with their number.

    Attributes:
        low: smallest value so far, or None before the first batch.
        high: largest value so far.
    """

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Widen the range to hold ``x``; NaN in ``x`` makes it NaN."""
        if not x.numel():
            return
        low, high = x.float().aminmax() if x.dtype != torch.float64 else x.aminmax()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the range of every activation quantizer to what one pass over ``batches`` shows.

    The pass runs in evaluation mode, in float and without gradients: batch-norm statistics and
    weights stay as they are, and the mode of each module is given back.

    Args:
        model: a converted model.
        batches: inputs of the model, or tuples or lists whose first entry is the input, such as a
            data loader gives. Tensors are moved to the device of the model's first parameter.

    Raises:
        ValueError: there is no batch, the model has no activation quantizers, or a tensor holds
            NaN or infinity; the message names the quantizer. The ranges are then as they were.
        RuntimeError: a quantizer was never reached.
    """
    quantizers = named_quantizers(model)
    if not quantizers:
        raise ValueError("the model has no activation quantizers: call gradl1_fast.convert(model) first")
    observers = {name: MinMax() for name in quantizers}
    with evaluation(model), _observed(quantizers, observers):
        run(model, batches, "calibrate")
    before = {quantizer: (quantizer.low, quantizer.high) for quantizer in quantizers.values()}
    try:
        for name, quantizer in quantizers.items():
            _set_range(name, quantizer, observers[name])
    except BaseException:
        for quantizer, (low, high) in before.items():
            quantizer.low, quantizer.high = low, high
        raise


def _set_range(name: str, quantizer: ActivationQuantizer, observer: MinMax) -> None:
    if observer.low is None or observer.high is None:
        raise RuntimeError(f"calibrate: no value reached the quantizer {name!r}")
    try:
        quantizer.set_range(observer.low, observer.high)
    except ValueError as error:
        raise ValueError(
            f"calibrate: the values at {name!r} go {error}. "
            "Look for them in the batches or in the layers before"
        ) from error


@contextlib.contextmanager
def _observed(quantizers: dict[str, ActivationQuantizer], observers: dict[str, MinMax]) -> Iterator[None]:
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
