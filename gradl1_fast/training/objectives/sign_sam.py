"""Sharpness-aware minimisation in the l-infinity ball."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.second_pass import RandomState, buffers_kept, shifted
from gradl1_fast.penalty.checks.graph import require_gradients
from gradl1_fast.training.objectives.interface import (
    Closure,
    Objective,
    Scale,
    Terms,
    factor_of,
    identity,
    trainable_weights,
)

__all__ = ["SignSAM"]


class SignSAM(Objective):
    """The loss at ``W + epsilon * sign(dL/dW)``: to first order loss plus ``epsilon * ||dL/dW||_1``.

    The weights that are quantized are moved, and no others; the move itself is not differentiated,
    as in SAM. Two passes a step; batch-norm statistics keep what the first one left. ``penalty`` of
    the terms is the rise of the loss.

    Args:
        model: a converted model.
        epsilon: size of the move, in units of the weights; times ``strength``.

    Source: Foret et al. 2021, arXiv 2010.01412, with the l-infinity ball.
    """

    name = "sam"

    def __init__(self, model: nn.Module, *, epsilon: float) -> None:
        self.strength = 1.0
        self.epsilon = check.coefficient("SignSAM: epsilon", epsilon)
        self._model = model
        self._weights = trainable_weights(model)

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Objective.backward`. The closure is called twice."""
        size = self.strength * self.epsilon
        if not size:
            loss = closure()
            scale(loss).backward()
            return Terms(loss.detach(), loss.new_zeros(()))
        randomness = RandomState()
        loss = closure()
        moves = self._moves(scale(loss), size)
        randomness.replay()
        with buffers_kept(self._model), contextlib.ExitStack() as stack:
            for weight, move in moves:
                stack.enter_context(shifted(weight, move))
            moved = scale(closure())
            moved.backward()
        rise = moved.detach() / factor_of(scale, loss) - loss.detach()
        return Terms(loss.detach(), rise)

    def _moves(self, loss: Tensor, size: float) -> list[tuple[Tensor, Tensor]]:
        weights = list(self._weights.values())
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        found = require_gradients(list(self._weights), grads)
        return [(weight, size * grad.sign()) for weight, grad in zip(weights, found, strict=True)]
