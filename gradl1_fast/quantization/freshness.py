"""Whether weights have changed since the ranges of activations were found.

Each layer keeps a mark beside its quantizer: the version of its weight, which every in-place operation
raises, and a few of its values. Values are compared only where the versions differ, so that copying,
pickling, moving and rounding to a narrower type pass for no change.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast._checks import some
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sites import named_layers

__all__ = ["forget_weights", "is_fresh", "is_rounded", "remember_weights", "warn_if_stale"]

_MARK = "ranges_found_with"  # in the table of a weight quantizer, which copies and pickles it
_SAMPLES = 64
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Mark:
    """What a weight was."""

    def __init__(self, weight: Tensor) -> None:
        self.reference: weakref.ref[Tensor] | None = weakref.ref(weight)
        self.version = _version(weight)
        self.values = _sample(weight)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the reference: a copy has its own version counts."""
        return {**vars(self), "reference": None}

    def holds(self, weight: Tensor) -> bool:
        """Return whether a weight is what it was, to the precision that it has now."""
        same = self.reference is not None and self.reference() is weight
        if same and self.version is not None and self.version == _version(weight):
            return True
        now = _sample(weight)
        if not is_rounded(now, self.values):
            return False
        self.reference, self.version = weakref.ref(weight), _version(weight)
        return True


def is_rounded(now: Tensor, before: Tensor) -> bool:
    """Return whether values are what they were, or were rounded to a narrower type meanwhile."""
    return any(torch.equal(now.double(), before.to(now.device, dtype).double()) for dtype in _TYPES)


def remember_weights(layers: Iterable[QuantizedLayer], mark: str = _MARK) -> None:
    """Take the present weights of layers for those that the ranges, or what the mark is of, belong to."""
    for layer in layers:
        vars(layer.weight_quantizer)[mark] = [_Mark(weight) for weight in _weights(layer)]


def forget_weights(layers: Iterable[QuantizedLayer]) -> None:
    """Compare layers no more until ranges are found again."""
    for layer in layers:
        vars(layer.weight_quantizer).pop(_MARK, None)


def is_fresh(layer: QuantizedLayer, mark: str = _MARK) -> bool:
    """Return whether a layer's weight is what it was when it was marked; True where it was not."""
    marks, weights = vars(layer.weight_quantizer).get(mark), _weights(layer)
    if marks is None:
        return True
    return len(marks) == len(weights) and all(map(_Mark.holds, marks, weights))


def warn_if_stale(model: nn.Module) -> None:
    """Warn, once, of ranges that were found with other weights; see :func:`remember_weights`."""
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
    """Return the parameter that the weight is, or those that it is computed from."""
    own = layer._parameters.get("weight")
    return [p for p in layer.parameters() if p.dim() > 1] if own is None else [own]


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


def _sample(weight: Tensor) -> Tensor:
    """Return values spread over a weight, which is not copied for it, in float64 on the CPU."""
    count = weight.numel()
    if weight.device.type == "meta" or not count:
        return torch.zeros(0, dtype=torch.float64)
    chosen = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64).long()
    index = torch.unravel_index(chosen.to(weight.device), weight.shape)
    return weight.detach()[index].double().cpu()
