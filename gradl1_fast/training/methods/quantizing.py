"""A base class for methods that quantize in training, with moving-average activation ranges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer, Observer, WeightQuantizer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.bits import INPUT_BITS, check_width, width_at
from gradl1_fast.training.methods.interface import Method, Width
from gradl1_fast.training.methods.weights import parametrize_all, unparametrized

__all__ = [
    "MovingRange",
    "Quantizing",
    "SiteGrid",
    "WeightGrid",
    "at_rate",
    "ends_of",
    "set_ends",
    "straight_through",
]

MOMENTUM = 0.1  # weight of the current batch in the moving average
_SITE = "grid_in_training"  # name of a :class:`SiteGrid` in its quantizer


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """Return ``value`` bit for bit, with the gradient of ``x``, which has the same shape."""
    return value.detach() + (x - x.detach())


def at_rate(parameter: Tensor, factor: float) -> Tensor:
    """Return the parameter bit for bit, with its gradient multiplied by a factor."""
    return straight_through(parameter, parameter * factor)


class WeightGrid(nn.Module):
    """A parametrization that quantizes a weight at a width, and returns it unchanged in float.

    Attributes:
        bits: the width, or None for float.
    """

    bits: int | None = None

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """Return the weight at a width, in the same shape, with a gradient for the latent weight."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses."""
        return weight if self.bits is None else self.quantize(weight, self.bits)


class SiteGrid(nn.Module):
    """Replaces the library's quantizer of an activation, with gradients for learned parameters.

    In training it is a submodule of the site's quantizer, so its parameters and buffers belong to the model.
    """

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """Return the activation at a width, in the same shape. In training mode, it may update its state."""
        raise NotImplementedError


class Quantizing(Method):
    """Quantizes weights and activations in each step; between steps the model computes in float.

    Weights use the library's quantizer, or the parametrization returned by :meth:`grid_for`. Activations use
    an exponential moving average of ranges with a weight of 0.1 for each new batch, or the module returned by
    :meth:`site_for`. The network's input has at least 8 bits and always uses a moving average.

    Args:
        model: a converted model.
        widths: pairs ``(w, a)``, None for float; ordinary steps use the first.

    Raises:
        ValueError: a width is out of range, or the model is not converted.
    """

    distributed = False

    def __init__(self, model: nn.Module, widths: Sequence[Width]) -> None:
        for w, a in widths:
            check_width("w", w)
            check_width("a", a)
        super().__init__(model)
        self.widths = tuple(widths)
        self.layers = named_layers(model)
        if not self.layers:
            raise ValueError("the model has no quantizers: call gradl1_fast.convert(model) first")
        self.ranges = {name: self.range_for(name, q) for name, q in named_quantizers(model).items()}
        self._before = [(r.quantizer, r.quantizer.low, r.quantizer.high) for r in self.ranges.values()]
        self.grids = parametrize_all(self.layers, self.grid_for)
        self.sites: dict[str, SiteGrid] = {}
        for name, moving in self.ranges.items():
            site = None if moving.quantizer.is_input else self.site_for(name, moving.quantizer)
            if site is not None:
                moving.quantizer.add_module(_SITE, site.train(model.training))
                self.sites[name] = site

    def grid_for(self, name: str, layer: QuantizedLayer) -> WeightGrid | None:
        """Return the parametrization of a layer's weight, or None for the library's own quantizer."""
        return None

    def site_for(self, name: str, quantizer: ActivationQuantizer) -> SiteGrid | None:
        """Return the module that quantizes an activation, or None for the library's own quantizer."""
        return None

    def range_for(self, name: str, quantizer: ActivationQuantizer) -> MovingRange:
        """Return the observer of an activation's range in training."""
        return MovingRange(quantizer)

    def during_step(self) -> contextlib.AbstractContextManager[Any]:
        """Quantize to the first width."""
        return self.quantized(*self.widths[0])

    @contextlib.contextmanager
    def quantized(self, w: int | None, a: int | None) -> Iterator[None]:
        """See :meth:`Method.quantized`. In training mode, activation ranges are updated with each batch."""
        if (w, a) not in self.widths:
            super().quantized(w, a)
        weights = [self.grids.get(name, layer.weight_quantizer) for name, layer in self.layers.items()]
        activations = [r.quantizer for r in self.ranges.values()]
        holders: list[WeightGrid | WeightQuantizer | ActivationQuantizer] = [*weights, *activations]
        widths = [holder.bits for holder in holders]
        observers: list[Observer | None] = [q.observer for q in activations]
        try:
            for weight in weights:
                weight.bits = w
            self._watch(a)
            yield
        finally:
            for holder, width in zip(holders, widths, strict=True):
                holder.bits = width
            for activation, observer in zip(activations, observers, strict=True):
                activation.observer, activation.move = observer, None
                activation.arming.notes.clear()  # stored results keep the graph alive

    def _watch(self, a: int | None) -> None:
        """Set the widths of activations, and their observers in training mode."""
        for name, moving in self.ranges.items():
            quantizer, site = moving.quantizer, self.sites.get(name)
            if site is not None and not quantizer.is_input:
                quantizer.move = None if a is None else partial(site, bits=a)
                continue
            quantizer.bits = width_at(quantizer, a, INPUT_BITS)
            quantizer.observer = moving if self.model.training else None
            if moving.low is not None:
                quantizer.low, quantizer.high = moving.low, moving.high

    def state_dict(self) -> dict[str, Tensor]:
        """Return the ranges so far."""
        return ends_of(self.ranges)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        set_ends(self.ranges, state)

    def close(self) -> None:
        """Restore the activation ranges, and keep the float weights."""
        for quantizer, low, high in self._before:
            quantizer.low, quantizer.high = low, high
        for name in self.sites:
            self.ranges[name].quantizer._modules.pop(_SITE, None)
        for name in self.grids:
            unparametrized(self.layers[name])


def ends_of(ranges: Mapping[str, MovingRange]) -> dict[str, Tensor]:
    """Return the ends of all initialized ranges, by ``<name>.low`` and ``<name>.high``."""
    return {
        f"{name}.{end}": value
        for name, r in ranges.items()
        for end, value in (("low", r.low), ("high", r.high))
        if value is not None
    }


def set_ends(ranges: Mapping[str, MovingRange], state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Set ranges returned by :func:`ends_of`, from names with a prefix."""
    for name, moving in ranges.items():
        low, high = (state.get(f"{prefix}{name}.{end}") for end in ("low", "high"))
        moving.low, moving.high = low, high


class MovingRange:
    """Sets the range of a quantizer to a moving average over the batches.

    Args:
        quantizer: the quantizer whose range is set.

    Attributes:
        low: lower end of the range so far, a scalar; None before the first batch.
        high: upper end.
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Update the average with a batch, before the quantizer uses the range."""
        low, high = x.aminmax() if x.dtype == torch.float64 else x.float().aminmax()
        self.low = low if self.low is None else torch.lerp(self.low, low, MOMENTUM)
        self.high = high if self.high is None else torch.lerp(self.high, high, MOMENTUM)
        self.quantizer.low, self.quantizer.high = self.low, self.high
