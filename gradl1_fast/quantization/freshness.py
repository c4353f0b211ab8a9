"""Detects whether weights have changed since activation ranges were calibrated.

Each layer stores a mark in its quantizer: the version of its weight, which in-place operations increment, and
a sample of its values. Values are compared only if the versions differ, so copying, pickling, moving and
rounding to a narrower type do not count as changes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast._checks import some
from gradl1_fast.nn.layers import RANGES_MARK, QuantizedLayer
from gradl1_fast.nn.sites import named_layers

__all__ = ["forget_weights", "is_fresh", "is_rounded", "remember_weights", "warn_if_stale"]

_MARK = RANGES_MARK  # an attribute of the weight quantizer, so that it is copied and pickled
_SAMPLES = 64
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Mark:
    """The version and sampled values of a weight."""

    def __init__(self, weight: Tensor) -> None:
        self.reference: weakref.ref[Tensor] | None = weakref.ref(weight)
        self.version = _version(weight)
        self.values = _sample(weight)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the reference, since a copy has its own version counter."""
        return {**vars(self), "reference": None}

    def holds(self, weight: Tensor) -> bool:
        """Return whether a weight is unchanged, to the precision of its current type."""
        same = self.reference is not None and self.reference() is weight
        if same and self.version is not None and self.version == _version(weight):
            return True
        current = _sample(weight)
        if not is_rounded(current, self.values):
            return False
        self.reference, self.version = weakref.ref(weight), _version(weight)
        return True

    def has_changed(self) -> bool:
        """Return whether the very weight that was marked has changed in place; False if it is not known."""
        weight = None if self.reference is None else self.reference()
        if weight is None or self.version is None or self.version == _version(weight):
            return False
        return not self.holds(weight)


def is_rounded(current: Tensor, before: Tensor) -> bool:
    """Return whether values are unchanged, or were only rounded to a narrower type."""
    return any(torch.equal(current.double(), before.to(current.device, dtype).double()) for dtype in _TYPES)


def remember_weights(layers: Iterable[QuantizedLayer], mark: str = _MARK) -> None:
    """Record the current weights of layers as those that the ranges, or other marked values, belong to."""
    for layer in layers:
        vars(layer.weight_quantizer)[mark] = [_Mark(weight) for weight in _weights(layer)]


def forget_weights(layers: Iterable[QuantizedLayer]) -> None:
    """Remove the marks of layers until the next calibration."""
    for layer in layers:
        vars(layer.weight_quantizer).pop(_MARK, None)


def is_fresh(layer: QuantizedLayer, mark: str = _MARK) -> bool:
    """Return whether a layer's weight is unchanged since it was marked; True if it was not marked."""
    marks, weights = vars(layer.weight_quantizer).get(mark), _weights(layer)
    if marks is None:
        return True
    return len(marks) == len(weights) and all(map(_Mark.holds, marks, weights))


def warn_if_stale(model: nn.Module) -> None:
    """Warn once if ranges were calibrated with other weights; see :func:`remember_weights`."""
    layers = named_layers(model)
    watched = any(
        q.observer is not None for q in (m.input_quantizer for m in layers.values()) if q is not None
    )
    changed = (
        [] if watched else [name or "the layer" for name, layer in layers.items() if not is_fresh(layer)]
    )
    if changed:
        forget_weights(layers.values())
        warnings.warn(
            f"the weights of {some(changed)} have changed since the activation ranges were calibrated: "
            "call gradl1_fast.calibrate(model, batches) again",
            stacklevel=3,
        )


def _weights(layer: QuantizedLayer) -> list[Tensor]:
    """Return the weight if it is a parameter, or the parameters that it is computed from."""
    parameters = layer._parameters.get("weight")
    return [p for p in layer.parameters() if p.dim() > 1] if parameters is None else [parameters]


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> Tensor:
    """Return evenly sampled values of a weight, in float64 on the CPU, without copying the weight."""
    count = weight.numel()
    if weight.device.type == "meta" or not count:
        return torch.zeros(0, dtype=torch.float64)
    chosen = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64).long()
    index = torch.unravel_index(chosen.to(weight.device), weight.shape)
    return weight.detach()[index].double().cpu()
