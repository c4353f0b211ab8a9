"""Copies of converted models around the same parameters, that nobody else arms, measures or watches."""

from __future__ import annotations

from torch import nn

from gradl1_fast.nn.arming import Arming
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.twins import copy_structure

__all__ = ["copy_converted"]


def copy_converted(model: nn.Module) -> nn.Module:
    """Return a copy of a converted model: parameters and buffers are shared, widths and ranges are its own.

    A penalty of one does not touch the other, and a tensor that both are given leads neither to the sites of
    the other.
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
