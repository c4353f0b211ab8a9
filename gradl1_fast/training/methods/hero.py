"""HERO: penalises the change of the gradient along the sharpest direction."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.second_pass import RandomState, buffers_kept, shifted
from gradl1_fast.penalty.checks.graph import require_gradients
from gradl1_fast.training.methods.asam import adaptive_move
from gradl1_fast.training.methods.interface import (
    Closure,
    Family,
    Method,
    Scale,
    Terms,
    Variant,
    factor_of,
    identity,
)
from gradl1_fast.training.methods.weights import leaf_of, name_of, trainable_layers

__all__ = ["HERO"]


class HERO(Method):
    """The loss at ``W + z`` plus ``coefficient * sum_l mean((g(W + z) - g(W))^2)``.

    g is the gradient of the quantizable weights, and ``z = h W^2 g / ||W g||_2`` as in ASAM. To first order,
    the penalty is the coefficient times the mean of ``(Hz)^2``. ``g(W)`` and z are not differentiated. Each
    step takes two forward passes and a double backward pass; batch-norm statistics are those of the first
    pass. The weights are restored, also after an error.

    Args:
        model: a converted model.
        h: size of the move z, multiplied by ``strength``.
        coefficient: coefficient of the penalty, multiplied by ``strength``.

    Raises:
        ValueError: a setting is negative or not finite, or no weight is trained.

    Source: Yang et al. 2022, arXiv 2111.11986.
    """

    name = "hero"
    text = "loss and change of the gradient at an adversarial move"
    source = "Yang et al. 2022, arXiv 2111.11986"
    family = Family.GRADIENTS
    passes = 2
    second_order = True
    distributed = False
    variants = (
        Variant("hero", "loss and change of the gradient at a relative move", {"h": 0.5, "coefficient": 5.0}),
    )

    def __init__(self, model: nn.Module, *, h: float, coefficient: float) -> None:
        super().__init__(model)
        self.h = check.coefficient("HERO: h", h)
        self.coefficient = check.coefficient("HERO: coefficient", coefficient)
        trainable_layers(model)

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Method.backward`. The closure is called twice."""
        if not self.strength:
            return super().backward(closure, scale)
        layers = trainable_layers(self.model)
        leaves = [leaf_of(layer) for layer in layers.values()]
        names = [name_of(name) for name in layers]
        randomness = RandomState()
        loss = closure()
        factor = factor_of(scale, loss)
        before = [g.detach() / factor for g in _gradients(scale(loss), leaves, names)]
        with torch.no_grad():
            moves = adaptive_move(leaves, before, self.strength * self.h)
        randomness.replay()
        with buffers_kept(self.model), contextlib.ExitStack() as stack:
            for leaf, move in zip(leaves, moves, strict=True):
                stack.enter_context(shifted(leaf, move))
            moved = closure()
            after = _gradients(moved, leaves, names, create_graph=True)
            parts = _mean_squares(after, before)
            penalty = self.strength * self.coefficient * torch.stack(parts).sum()
            # The weights must still be W + z, because the backward pass reads them.
            scale(moved + penalty).backward()
        total = moved.detach() - loss.detach() + penalty.detach()
        return Terms(loss.detach(), total, dict(zip(names, [p.detach() for p in parts], strict=True)))


def _gradients(
    loss: Tensor, leaves: list[Tensor], names: list[str], create_graph: bool = False
) -> list[Tensor]:
    grads = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
    return list(require_gradients(names, grads))


def _mean_squares(after: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    """Return the mean square of the change of each gradient, scalars."""
    return [(a - b).square().mean() for a, b in zip(after, before, strict=True)]
