"""SymReg: regularises weights towards a distribution that is symmetric around zero."""

from __future__ import annotations

from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.weight_penalty import WeightPenalty
from gradl1_fast.training.methods.weights import is_depthwise

__all__ = ["Symmetry", "asymmetry"]


def asymmetry(weight: Tensor, group: int = 1) -> Tensor:
    """Return how far the sorted values of a weight are from a symmetric set, a scalar.

    With N values in order v, the i-th smallest group of values is paired with the i-th largest one:
    ``2/N sum_i |v_i + v_(N+1-i)|`` for groups of one, ``4/N sum_i |v_(2i-1) + v_(2i) + v_(N-2i+1) +
    v_(N-2i+2)|`` for groups of two. Values in the middle that fill no pair of groups do not count. Without
    the absolute value it would be twice the mean.

    Args:
        weight: of any shape.
        group: values on each side of a pair: 1 or 2.
    """
    ordered = weight.flatten().sort().values
    half = len(ordered) // (2 * group) * group
    low, high = ordered[:half], ordered.flip(0)[:half]
    sums = (low + high).unflatten(0, (-1, group)).sum(1)
    return 2 * group / len(ordered) * sums.abs().sum()


class Symmetry(WeightPenalty):
    """The loss plus ``coefficient * sum_l asymmetry(W_l)``.

    Symmetric weights on a symmetric grid have a mean of zero before and after quantization, so the mean of a
    layer's output does not shift. Depthwise convolutions are excluded. Reconstruction: the structure of the
    term is from a secondary source; its norm, normalisation and coefficient were chosen here.

    Args:
        model: a converted model.
        coefficient: lambda.
        group: weights on each side of a pair, 1 or 2; see :func:`asymmetry`.

    Raises:
        ValueError: a setting is out of range, or all weights belong to depthwise convolutions.

    Source: Park et al. 2022 (SymReg), arXiv 2208.00338.
    """

    name = "symreg"
    text = "symmetric weights"
    source = "Park et al. 2022, arXiv 2208.00338"
    reconstruction = True
    family = Family.WEIGHTS
    variants = (
        Variant("symreg", "SymReg: symmetric weights, pairs of one", {"coefficient": 0.1}),
        Variant("symreg-2", "SymReg: symmetric weights, pairs of two", {"coefficient": 0.1, "group": 2}),
    )

    def __init__(self, model: nn.Module, *, coefficient: float, group: int = 1) -> None:
        super().__init__(model)
        self.coefficient = check.coefficient("Symmetry: coefficient", coefficient)
        if group not in (1, 2):
            raise ValueError(f"Symmetry: group must be 1 or 2, got {group!r}")
        self.group = group
        self.layers = {name: layer for name, layer in self.layers.items() if not is_depthwise(layer)}
        if not self.layers:
            raise ValueError("Symmetry: all layers are depthwise convolutions, to which it does not apply")

    def part(self, weight: Tensor, layer: QuantizedLayer) -> Tensor:
        """See :func:`asymmetry`."""
        return asymmetry(weight, self.group)

    def penalty(self, parts: Tensor) -> Tensor:
        """See :meth:`WeightPenalty.penalty`."""
        return self.coefficient * parts.sum()
