"""Training objectives with one interface: the gradient-l1 penalty, and what it is compared with."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from gradl1_fast.training.objectives.gradient_l1 import GradientL1
from gradl1_fast.training.objectives.gradient_l2 import GradientL2
from gradl1_fast.training.objectives.interface import Closure, Objective, Scale, Terms, identity
from gradl1_fast.training.objectives.plain import Plain
from gradl1_fast.training.objectives.quantization_aware import QuantizationAware
from gradl1_fast.training.objectives.sign_sam import SignSAM
from gradl1_fast.training.objectives.weight_penalties import Defensive, Kurtosis

__all__ = [
    "OBJECTIVES",
    "Closure",
    "Objective",
    "Scale",
    "Terms",
    "identity",
    "make",
]

_CLASSES = (Plain, GradientL1, GradientL2, SignSAM, Kurtosis, Defensive, QuantizationAware)
OBJECTIVES: dict[str, type[Objective]] = {each.name: each for each in _CLASSES}


def make(name: str, model: nn.Module, **settings: Any) -> Objective:
    """Return the objective of a name, for a converted model; make it before the first forward pass.

    Args:
        name: a key of :data:`OBJECTIVES`.
        model: a converted model.
        **settings: as its class takes them.

    Raises:
        ValueError: there is no such objective, a setting is out of range, or the model has nothing
            for it to work on.
        TypeError: a setting is missing, unknown or of the wrong type.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    signature = inspect.signature(OBJECTIVES[name])
    known = [key for key in signature.parameters if key != "model"]
    try:
        signature.bind(model, **settings)
    except TypeError as error:
        raise TypeError(
            f"objective {name}: {error}; its settings are {', '.join(known) or 'none'}"
        ) from error
    return OBJECTIVES[name](model, **settings)  # type: ignore[call-arg]
