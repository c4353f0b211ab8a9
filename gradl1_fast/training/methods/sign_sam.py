"""Sharpness-aware minimisation in the l-infinity ball."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.second_pass import RandomState, buffers_kept, shifted
from gradl1_fast.penalty.checks.graph import require_gradients
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

__all__ = ["SignSAM"]


class SignSAM(Method):
    """The loss at ``W + epsilon * sign(dL/dW)``: to first order loss plus ``epsilon * ||dL/dW||_1``.

    Only quantizable weights are moved, and the move is not differentiated, as in SAM. Each step takes two
    passes; batch-norm statistics are those of the first pass. The term ``penalty`` is the increase of the
    loss.

    Args:
        model: a converted model.
        epsilon: size of the move in units of the weights, multiplied by ``strength``.

    Source: Foret et al. 2021, arXiv 2010.01412, with the l-infinity ball.
    """

    name = "sam"
    text = "sharpness-aware minimisation in the l-infinity ball"
    source = "Foret et al. 2021, arXiv 2010.01412"
    family = Family.GRADIENTS
    passes = 2
    distributed = False
    variants = (Variant("sam", "sharpness-aware minimisation, l-infinity ball", {"epsilon": 0.002}),)

    def __init__(self, model: nn.Module, *, epsilon: float) -> None:
        super().__init__(model)
        self.size = check.coefficient(f"{type(self).__name__}: epsilon", epsilon)
        trainable_layers(model)

    def move(self, weights: list[Tensor], grads: list[Tensor], size: float) -> list[Tensor]:
        """Return the move of each weight, given the gradients of the loss and the size."""
        return [size * grad.sign() for grad in grads]

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Method.backward`. The closure is called twice."""
        size = self.strength * self.size
        if not size:
            return super().backward(closure, scale)
        randomness = RandomState()
        loss = closure()
        moves = self._moves(scale(loss), size)
        randomness.replay()
        with buffers_kept(self.model), contextlib.ExitStack() as stack:
            for weight, move in moves:
                stack.enter_context(shifted(weight, move))
            moved = scale(closure())
            moved.backward()
        rise = moved.detach() / factor_of(scale, loss) - loss.detach()
        return Terms(loss.detach(), rise)

    def _moves(self, loss: Tensor, size: float) -> list[tuple[Tensor, Tensor]]:
        layers = trainable_layers(self.model)
        weights = [leaf_of(layer) for layer in layers.values()]
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        required = require_gradients([name_of(name) for name in layers], grads)
        with torch.no_grad():
            return list(zip(weights, self.move(weights, list(required), size), strict=True))
