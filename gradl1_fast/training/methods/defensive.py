"""Defensive Quantization: orthogonal weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.weight_penalty import WeightPenalty

__all__ = ["Defensive"]


class Defensive(WeightPenalty):
    """The loss plus ``beta / 2 * sum_l ||W_l W_l^T - I||_F^2``, with one row of W_l per output channel.

    It pulls the Lipschitz constant of each layer towards 1, so that quantization noise is not amplified.

    Args:
        model: a converted model.
        beta: the coefficient.

    Raises:
        ValueError: the coefficient is negative or not finite, or no weight is trained.

    Source: Lin et al. 2019 (Defensive Quantization), arXiv 1904.08444.
    """

    name = "defensive"
    text = "orthogonal weights, so that layers do not amplify noise"
    source = "Lin et al. 2019, arXiv 1904.08444"
    family = Family.WEIGHTS
    variants = (Variant("defensive", "Defensive Quantization: orthogonal weights", {"beta": 0.002}),)

    def __init__(self, model: nn.Module, *, beta: float) -> None:
        super().__init__(model)
        self.beta = check.coefficient("Defensive: beta", beta)

    def part(self, weight: Tensor, layer: QuantizedLayer) -> Tensor:
        """Return the squared distance of a weight's rows from an orthonormal set, a scalar."""
        rows = weight.flatten(1)
        gram = rows @ rows.T
        return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()

    def penalty(self, parts: Tensor) -> Tensor:
        """See :meth:`WeightPenalty.penalty`."""
        return self.beta / 2 * parts.sum()
