"""Plain training."""

from __future__ import annotations

from torch import nn

from gradl1_fast.training.objectives.interface import Closure, Objective, Scale, Terms, identity

__all__ = ["Plain"]


class Plain(Objective):
    """The loss alone.

    Args:
        model: a converted model.
    """

    name = "plain"

    def __init__(self, model: nn.Module) -> None:
        self.strength = 1.0

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Objective.backward`."""
        loss = closure()
        scale(loss).backward()
        return Terms(loss.detach(), loss.new_zeros(()))
