"""Penalties on the weights alone: kurtosis regularisation and Defensive Quantization."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.training.objectives.interface import (
    Closure,
    Objective,
    Scale,
    Terms,
    identity,
    trainable_weights,
)

__all__ = ["Defensive", "Kurtosis"]

UNIFORM = 1.8  # kurtosis of a uniform distribution


class _WeightPenalty(Objective):
    def __init__(self, model: nn.Module) -> None:
        self.strength = 1.0
        self._weights = trainable_weights(model)

    @abstractmethod
    def _penalty(self, parts: list[Tensor]) -> Tensor:
        """Return the penalty, coefficient included, from the parts."""

    @abstractmethod
    def _part(self, weight: Tensor) -> Tensor:
        """Return what one weight adds."""

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Objective.backward`."""
        loss = closure()
        parts = {name: self._part(weight) for name, weight in self._weights.items()}
        penalty = self.strength * self._penalty(list(parts.values()))
        scale(loss + penalty).backward()
        return Terms(loss.detach(), penalty.detach(), {name: part.detach() for name, part in parts.items()})


class Kurtosis(_WeightPenalty):
    """The loss plus ``coefficient * mean_l (kurtosis(W_l) - 1.8)^2``.

    It draws the weights of each layer to a uniform distribution.

    Args:
        model: a converted model.
        coefficient: lambda.

    Source: Shkolnik et al. 2020 (KURE), arXiv 2002.07686.
    """

    name = "kure"

    def __init__(self, model: nn.Module, *, coefficient: float) -> None:
        super().__init__(model)
        self.coefficient = check.coefficient("Kurtosis: coefficient", coefficient)

    def _part(self, weight: Tensor) -> Tensor:
        centred = weight - weight.mean()
        return ((centred / centred.square().mean().sqrt()) ** 4).mean()

    def _penalty(self, parts: list[Tensor]) -> Tensor:
        return self.coefficient * (torch.stack(parts) - UNIFORM).square().mean()


class Defensive(_WeightPenalty):
    """The loss plus ``beta / 2 * sum_l ||W_l W_l^T - I||_F^2``, with one row of W_l for each output channel.

    It draws the Lipschitz constant of each layer to 1, so that quantization noise is not amplified.

    Args:
        model: a converted model.
        beta: the coefficient.

    Source: Lin et al. 2019 (Defensive Quantization), arXiv 1904.08444.
    """

    name = "defensive"

    def __init__(self, model: nn.Module, *, beta: float) -> None:
        super().__init__(model)
        self.beta = check.coefficient("Defensive: beta", beta)

    def _part(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        gram = rows @ rows.T
        return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()

    def _penalty(self, parts: list[Tensor]) -> Tensor:
        return self.beta / 2 * torch.stack(parts).sum()
