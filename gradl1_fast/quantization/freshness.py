"""Detects whether weights have changed since activation ranges were calibrated.

Each layer stores a mark in its quantizer, and each normalisation in its attributes: the version of its
weight, which in-place operations increment, its address, which an assignment to ``weight.data`` changes, and
a sample of its values. Values are compared only if one of the first two differs, so copying, pickling, moving
and rounding to a narrower type do not count as changes. An operation in place on ``weight.data`` changes
neither and is not detected.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast._checks import some
from gradl1_fast.conversion.left import NORMALISATIONS
from gradl1_fast.nn.layers import RANGES_MARK, QuantizedLayer
from gradl1_fast.nn.sites import named_layers

__all__ = [
    "forget_weights",
    "is_fresh",
    "is_rounded",
    "remember_ranges",
    "remember_weights",
    "warn_if_stale",
]

_MARK = RANGES_MARK  # an attribute of a module, so that it is copied and pickled
_SAMPLES = 64
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Mark:
    """The version, address and sampled values of a weight."""

    def __init__(self, weight: Tensor) -> None:
        self.reference: weakref.ref[Tensor] | None = weakref.ref(weight)
        self.state = _state(weight)
        self.values = _sample(weight)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the reference, since a copy has its own version and address."""
        return {**vars(self), "reference": None}

    def holds(self, weight: Tensor) -> bool:
        """Return whether a weight is unchanged, to the precision of its current type."""
        same = self.reference is not None and self.reference() is weight
        if same and self.state is not None and self.state == _state(weight):
            return True
        current = _sample(weight)
        if not is_rounded(current, self.values):
            return False
        self.reference, self.state = weakref.ref(weight), _state(weight)
        return True

    def has_changed(self) -> bool:
        """Return whether the very weight that was marked has changed in place; False if it is not known."""
        weight = None if self.reference is None else self.reference()
        if weight is None or self.state is None or self.state == _state(weight):
            return False
        return not self.holds(weight)


def is_rounded(current: Tensor, before: Tensor) -> bool:
    """Return whether values are unchanged, or were only rounded to a narrower type."""
    return any(torch.equal(current.double(), before.to(current.device, dtype).double()) for dtype in _TYPES)


def remember_ranges(model: nn.Module) -> None:
    """Record the current weights of a model as those that its activation ranges belong to."""
    remember_weights(_named(model).values())


def remember_weights(modules: Iterable[nn.Module], mark: str = _MARK) -> None:
    """Record the current weights of modules as those that the ranges, or other marked values, belong to."""
    for module in modules:
        _attributes(module)[mark] = [_Mark(weight) for weight in _weights(module)]


def forget_weights(modules: Iterable[nn.Module]) -> None:
    """Remove the marks of modules until the next calibration."""
    for module in modules:
        _attributes(module).pop(_MARK, None)


def is_fresh(module: nn.Module, mark: str = _MARK) -> bool:
    """Return whether a module's weight is unchanged since it was marked; True if it was not marked."""
    marks, weights = _attributes(module).get(mark), _weights(module)
    if marks is None:
        return True
    return len(marks) == len(weights) and all(map(_Mark.holds, marks, weights))


def warn_if_stale(model: nn.Module) -> None:
    """Warn once if ranges were calibrated with other weights; see :func:`remember_weights`."""
    sites = [layer.input_quantizer for layer in named_layers(model).values()]
    if any(site is not None and site.observer is not None for site in sites):
        return
    modules = _named(model)
    changed = [name or "the layer" for name, module in modules.items() if not is_fresh(module)]
    if changed:
        forget_weights(modules.values())
        warnings.warn(
            f"the weights of {some(changed)} have changed since the activation ranges were calibrated: "
            "call gradl1_fast.calibrate(model, batches) again",
            stacklevel=3,
        )


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose weights determine the activations: layers and normalisations."""
    kinds = (QuantizedLayer, *NORMALISATIONS)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that hold the marks of a module."""
    return vars(module.weight_quantizer if isinstance(module, QuantizedLayer) else module)


def _weights(module: nn.Module) -> list[Tensor]:
    """Return the weight if it is a parameter, or the parameters that it is computed from."""
    weight = module._parameters.get("weight")
    return [p for p in module.parameters() if p.dim() > 1] if weight is None else [weight]


def _state(weight: Tensor) -> tuple[int, int] | None:
    return None if weight.is_inference() else (weight._version, weight.data_ptr())


def _sample(weight: Tensor) -> Tensor:
    """Return evenly sampled values of a weight, in float64 on the CPU, without copying the weight."""
    count = weight.numel()
    if weight.device.type == "meta" or not count:
        return torch.zeros(0, dtype=torch.float64)
    chosen = torch.linspace(0, count - 1, min(count, _SAMPLES), dtype=torch.float64).long()
    index = torch.unravel_index(chosen.to(weight.device), weight.shape)
    return weight.detach()[index].double().cpu()
