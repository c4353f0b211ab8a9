"""Quantization-aware training with the straight-through estimator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gradl1_fast.nn.quantizers import ActivationQuantizer, Observer, WeightQuantizer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.bits import INPUT_BITS, check_width, width_at
from gradl1_fast.training.objectives.interface import Closure, Objective, Scale, Terms, identity

__all__ = ["QuantizationAware"]

MOMENTUM = 0.1  # share of the present batch in the moving range


class QuantizationAware(Objective):
    """The loss of the network quantized to one width, with the straight-through estimator.

    Weights have the quantizer that they have in evaluation, and the network's input its width. The range of
    an activation is an exponential moving average of the ranges of the batches, of which each new one has a
    share of 0.1. The penalty is 0, and ``strength`` has no effect. Between steps the model computes in float.

    Args:
        model: a converted model.
        w: bits of the weights, None for float.
        a: bits of the activations, None for float; the network's input has 8 at least.

    Source: Jacob et al. 2018, arXiv 1712.05877.
    """

    name = "qat"

    def __init__(self, model: nn.Module, *, w: int | None, a: int | None) -> None:
        check_width("w", w)
        check_width("a", a)
        self.strength = 1.0
        self._widths = w, a
        self._weights = [layer.weight_quantizer for layer in named_layers(model).values()]
        self._ranges = {name: _MovingRange(q) for name, q in named_quantizers(model).items()}
        if not self._weights:
            raise ValueError("the model has no quantizers: call gradl1_fast.convert(model) first")
        self._before = [(r.quantizer, r.quantizer.low, r.quantizer.high) for r in self._ranges.values()]

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Objective.backward`."""
        with self._quantized():
            loss = closure()
            scale(loss).backward()
        return Terms(loss.detach(), loss.new_zeros(()))

    @contextlib.contextmanager
    def _quantized(self) -> Iterator[None]:
        """Set widths, and watch the activations; a range is there by the time it is first used."""
        w, a = self._widths
        activations = [r.quantizer for r in self._ranges.values()]
        quantizers: list[WeightQuantizer | ActivationQuantizer] = [*self._weights, *activations]
        widths = [q.bits for q in quantizers]
        observers: list[Observer | None] = [q.observer for q in activations]
        try:
            for weight in self._weights:
                weight.bits = w
            for moving in self._ranges.values():
                moving.quantizer.bits = width_at(moving.quantizer, a, INPUT_BITS)
                moving.quantizer.observer = moving
            yield
        finally:
            for quantizer, width in zip(quantizers, widths, strict=True):
                quantizer.bits = width
            for activation, observer in zip(activations, observers, strict=True):
                activation.observer = observer

    def state_dict(self) -> dict[str, Tensor]:
        """Return the ranges so far."""
        return {
            f"{name}.{end}": value
            for name, r in self._ranges.items()
            for end, value in (("low", r.low), ("high", r.high))
            if value is not None
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state returned by :meth:`state_dict`."""
        for name, moving in self._ranges.items():
            moving.low, moving.high = state.get(f"{name}.low"), state.get(f"{name}.high")

    def close(self) -> None:
        """Give the activations the ranges that they had."""
        for quantizer, low, high in self._before:
            quantizer.low, quantizer.high = low, high


class _MovingRange:
    """Sets the range of a quantizer to a moving average over what passes by."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Let one batch enter the average, before the quantizer uses the range."""
        low, high = x.aminmax() if x.dtype == torch.float64 else x.float().aminmax()
        self.low = low if self.low is None else torch.lerp(self.low, low, MOMENTUM)
        self.high = high if self.high is None else torch.lerp(self.high, high, MOMENTUM)
        self.quantizer.low, self.quantizer.high = self.low, self.high
