"""Kurtosis regularisation of the weights."""

from __future__ import annotations

from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.weight_penalty import WeightPenalty

__all__ = ["Kurtosis"]

UNIFORM = 1.8  # kurtosis of a uniform distribution


class Kurtosis(WeightPenalty):
    """The loss plus ``coefficient * mean_l (kurtosis(W_l) - 1.8)^2``.

    It pulls the weights of each layer towards a uniform distribution.

    Args:
        model: a converted model.
        coefficient: lambda.

    Raises:
        ValueError: the coefficient is negative or not finite, or no weight is trained.

    Source: Shkolnik et al. 2020 (KURE), arXiv 2002.07686.
    """

    name = "kure"
    text = "kurtosis regularisation of the weights"
    source = "Shkolnik et al. 2020, arXiv 2002.07686"
    family = Family.WEIGHTS
    variants = (Variant("kure", "kurtosis regularisation of the weights", {"coefficient": 1.0}),)

    def __init__(self, model: nn.Module, *, coefficient: float) -> None:
        super().__init__(model)
        self.coefficient = check.coefficient("Kurtosis: coefficient", coefficient)

    def part(self, weight: Tensor, layer: QuantizedLayer) -> Tensor:
        """Return the kurtosis of a weight, a scalar."""
        centred = weight - weight.mean()
        return ((centred / centred.square().mean().sqrt()) ** 4).mean()

    def penalty(self, parts: Tensor) -> Tensor:
        """See :meth:`WeightPenalty.penalty`."""
        return self.coefficient * (parts - UNIFORM).square().mean()
