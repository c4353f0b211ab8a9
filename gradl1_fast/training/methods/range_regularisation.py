"""R2: regularisation of the range of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.weight_penalty import WeightPenalty

__all__ = ["RangeRegularisation", "largest", "margin", "soft_range"]


def largest(weight: Tensor) -> Tensor:
    """Return the largest magnitude of a weight of any shape, a scalar."""
    return weight.abs().max()


def margin(weight: Tensor, limit: Tensor) -> Tensor:
    """Return ``|limit| + sum max(|w| - |limit|, 0)``, a scalar.

    Args:
        weight: of any shape.
        limit: a learned scalar.
    """
    return limit.abs() + (weight.abs() - limit.abs()).clamp(min=0).sum()


def soft_range(weight: Tensor, temperature: Tensor) -> Tensor:
    """Return a smooth form of ``max(w) - min(w)``, plus ``exp(-temperature)``, a scalar.

    Both ends are means of the values under a softmax of ``temperature`` times the values.

    Args:
        weight: of any shape.
        temperature: a learned scalar.
    """
    values = weight.flatten()
    high = (values * torch.softmax(temperature * values, 0)).sum()
    low = (values * torch.softmax(-temperature * values, 0)).sum()
    return high - low + torch.exp(-temperature)


_SCALARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"margin": margin, "soft": soft_range}


class RangeRegularisation(WeightPenalty):
    """The loss plus ``coefficient * sum_l R(W_l)``, with R one of three measures of the range of a weight.

    ``"max"`` is the largest magnitude; ``"margin"`` a learned limit plus the excess above it; ``"soft"`` a
    smooth difference of the ends with a learned temperature. The learned scalar is a parameter of the layer
    in training. Reconstruction: the formulas of the margin and of the soft range are from memory.

    Args:
        model: a converted model.
        coefficient: lambda.
        kind: ``"max"``, ``"margin"`` or ``"soft"``.

    Raises:
        ValueError: a setting is out of range, or no weight is trained.

    Source: Kundu et al. 2023 (R2 loss), arXiv 2303.08253.
    """

    name = "r2"
    text = "small range of the weights"
    source = "Kundu et al. 2023, arXiv 2303.08253"
    reconstruction = True
    family = Family.WEIGHTS
    distributed = False  # learned scalars are added to the model after ranks and recomputation have read it
    variants = (
        Variant("r2", "R2: largest magnitude of the weights", {"coefficient": 0.01}),
        Variant("r2-margin", "R2: learned limit of the weights", {"coefficient": 0.01, "kind": "margin"}),
        Variant("r2-soft", "R2: soft range of the weights", {"coefficient": 0.01, "kind": "soft"}),
    )

    def __init__(self, model: nn.Module, *, coefficient: float, kind: str = "max") -> None:
        super().__init__(model)
        self.coefficient = check.coefficient("RangeRegularisation: coefficient", coefficient)
        self.kind = check.one_of("RangeRegularisation: kind", kind, ("max", *_SCALARS))
        for layer in self.layers.values() if kind in _SCALARS else ():
            layer.register_parameter("r2", nn.Parameter(self._start(layer.weight.detach())))

    def _start(self, weight: Tensor) -> Tensor:
        """Return the initial scalar: twice the standard deviation, or a temperature of ten deviations."""
        deviation = weight.std().clamp(min=1e-6)
        return 2 * deviation if self.kind == "margin" else 0.1 / deviation

    def part(self, weight: Tensor, layer: QuantizedLayer) -> Tensor:
        """Return the measure of one weight, a scalar."""
        return (
            _SCALARS[self.kind](weight, layer.get_parameter("r2"))
            if self.kind in _SCALARS
            else largest(weight)
        )

    def penalty(self, parts: Tensor) -> Tensor:
        """See :meth:`WeightPenalty.penalty`."""
        return self.coefficient * parts.sum()

    def close(self) -> None:
        """Remove the learned scalars from the layers."""
        for layer in self.layers.values():
            layer._parameters.pop("r2", None)
