"""Gradient l1 regularisation at the point of adaptive sharpness-aware minimisation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.second_pass import RandomState, buffers_kept, shifted
from gradl1_fast.training.methods.asam import ASAM
from gradl1_fast.training.methods.gradient_l1 import GradientL1
from gradl1_fast.training.methods.interface import Closure, Scale, Terms, Variant, factor_of, identity

__all__ = ["GradientL1AtASAM"]


class GradientL1AtASAM(GradientL1):
    """Loss and penalty at ``W + rho W^2 g / ||W g||_2``, on the steps that have a penalty; others are plain.

    Each of these steps takes two passes: an ordinary one, whose gradient ``g`` gives the move, and one at the
    moved weights that is differentiated twice. Only quantizable weights are moved, and the move is not
    differentiated. Batch-norm statistics are those of the first pass. The term ``penalty`` is the increase of
    the loss plus the penalty at the moved weights.

    Args:
        model: a converted model.
        rho: size of the move, multiplied by ``strength``.
        lambda_w: coefficient of the weights' term.
        lambda_a: coefficient of the activations' term; at least one of the two is more than 0.
        scale: ``"step"``, or ``"none"``, as in the paper.
        every: move and penalise every ``every`` steps; the penalty is multiplied by ``every``.
        step_bits: the width of the quantization steps with ``scale="step"``.

    Raises:
        ValueError: rho is negative or not finite, both coefficients are 0, or no weight is trained.

    Source: Alizadeh et al., ICLR 2020, arXiv 2002.07520; the move is that of Kwon et al. 2021, arXiv
    2102.11600. The combination is from this project.
    """

    name = "gradl1-at-asam"
    text = "gradient l1 penalty at the point of ASAM"
    source = "Alizadeh et al. 2020, arXiv 2002.07520, and Kwon et al. 2021, arXiv 2102.11600"
    distributed = False
    variants = (
        Variant(
            "gradl1-at-asam", "gradient l1 penalty at the point of ASAM", {"rho": 0.5}, keeps_recipe=True
        ),
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float,
        lambda_w: float = 0.0,
        lambda_a: float = 0.0,
        scale: str = "step",
        every: int = 1,
        step_bits: int = 4,
    ) -> None:
        self._asam = ASAM(model, rho=rho)
        super().__init__(
            model, lambda_w=lambda_w, lambda_a=lambda_a, scale=scale, every=every, step_bits=step_bits
        )
        self.passes, self.compilable = 2, False
        self._rise = torch.zeros(())

    @classmethod
    def needs_second_order(cls, settings: Mapping[str, Any]) -> bool:
        """See :meth:`Method.needs_second_order`."""
        return True

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Method.backward`. The closure is called twice if the step has a penalty."""
        self._rise = torch.zeros(())
        terms = super().backward(closure, scale)
        return replace(terms, penalty=terms.penalty + self._rise / factor_of(scale, terms.loss))

    def _backward(self, closure: Closure) -> Tensor:
        of_w, of_a = self.penalty.lambda_w, self.penalty.lambda_a
        self._weigh(0.0)  # the first pass is ordinary
        randomness = RandomState()
        loss = closure()
        moves = self._asam.moves(loss, self.strength * self._asam.size)
        randomness.replay()
        self.penalty.lambda_w, self.penalty.lambda_a = of_w, of_a
        with buffers_kept(self.model), contextlib.ExitStack() as stack:
            for weight, move in moves:
                stack.enter_context(shifted(weight, move))
            moved = closure()
            (moved + self.penalty(moved)).backward()
        self._rise = moved.detach() - loss.detach()
        return loss.detach()
