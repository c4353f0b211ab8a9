"""Copies of converted models that share parameters but not widths, ranges or penalties."""

from __future__ import annotations

from torch import nn

from gradl1_fast.nn.arming import Arming
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.twins import copy_structure

__all__ = ["copy_converted"]


def copy_converted(model: nn.Module) -> nn.Module:
    """Return a copy of a converted model that shares its parameters and buffers, but not widths and ranges.

    A penalty of one model does not affect the other, and neither do tensors that are passed to both.
    """
    copy = copy_structure(model)
    old = next((m.arming for m in model.modules() if isinstance(m, QuantizedLayer)), Arming())
    arming = Arming(old.planner)
    for module in copy.modules():
        if isinstance(module, ActivationQuantizer):
            module.__setstate__({**module.__getstate__(), "arming": arming})
        elif isinstance(module, QuantizedLayer):
            module.arming = arming
    return copy
