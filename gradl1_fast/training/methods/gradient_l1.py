"""Gradient l1 regularisation, exact or by a finite difference, with or without the quantization step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.penalty import GradL1
from gradl1_fast.penalty.measured import sites_of
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

__all__ = ["GradientL1"]


class GradientL1(Method):
    """The loss plus the penalty of :class:`gradl1_fast.GradL1`.

    Args:
        model: a converted model.
        lambda_w: coefficient of the weights' term.
        lambda_a: coefficient of the activations' term; at least one of the two is more than 0.
        scale: ``"step"``, or ``"none"``, as in the paper.
        every: apply the penalty every ``every`` steps, multiplied by ``every``.
        method: ``"exact"`` or ``"finite_difference"``.
        step_bits: the width of the quantization steps with ``scale="step"``.
        epsilon: size of the finite difference.

    Source: Alizadeh et al., ICLR 2020, arXiv 2002.07520.
    """

    name = "gradl1"
    text = "gradient l1 penalty, by double backpropagation"
    source = "Alizadeh et al. 2020, arXiv 2002.07520"
    family = Family.GRADIENTS
    second_order = True
    compilable = True
    variants = (
        Variant(
            "gradl1", "gradient l1 penalty with each norm times its quantization step", keeps_recipe=True
        ),
        Variant(
            "gradl1-unscaled",
            "gradient l1 penalty as in the paper, norms unscaled",
            {"lambda_w": 0.001, "lambda_a": 0.001, "scale": "none", "every": 2},
        ),
        Variant(
            "gradl1-finite-difference",
            "as gradl1, by a finite difference instead of double backprop",
            {"method": "finite_difference"},
            keeps_recipe=True,
        ),
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        lambda_w: float = 0.0,
        lambda_a: float = 0.0,
        scale: str = "step",
        every: int = 1,
        method: str = "exact",
        step_bits: int = 4,
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__(model)
        self.every = check.count("GradientL1: every", every)
        if lambda_w == lambda_a == 0:
            raise ValueError(
                "GradientL1: lambda_w and lambda_a are both 0, so there is no penalty; "
                "set one of them (--lambda), or train plainly (--penalty-epochs 0)"
            )
        self._before = [(site.quantizer, site.quantizer.step_bits) for site in sites_of(model)]
        self.penalty = GradL1(
            model, lambda_w, lambda_a, scale, method=method, step_bits=step_bits, epsilon=epsilon
        )
        self._lambdas = lambda_w, lambda_a
        exact = method == "exact"
        self.passes, self.second_order = (1, True) if exact else (2, False)
        self.compilable = exact and self.every == 1
        self.needs_float32 = not exact
        self._steps = 0

    @classmethod
    def needs_second_order(cls, settings: Mapping[str, Any]) -> bool:
        """See :meth:`Method.needs_second_order`: not for the finite difference."""
        return settings.get("method", "exact") == "exact"

    def added(self, loss: Tensor) -> Tensor:
        """Return the penalty for a loss whose forward pass was armed; for a compiled step."""
        penalty = self.penalty(loss)
        self.parts = dict(self.penalty.terms)
        return penalty

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Method.backward`. The finite difference calls the closure twice."""
        self._steps += 1
        due = self._steps % self.every == 0 and self.strength > 0
        # Set before the forward pass, and kept for the backward pass, which may recompute activations.
        self._weigh(self.strength * self.every if due else 0.0)
        if not due:
            loss = closure()
            scale(loss).backward()
            return Terms(loss.detach(), loss.new_zeros(()))
        scaled = self._backward(lambda: scale(closure()))
        factor = factor_of(scale, scaled)
        parts = {name: term / factor for name, term in self.penalty.terms.items()}
        return Terms(scaled / factor, self._sum(parts), parts)

    def _weigh(self, factor: float) -> None:
        self.penalty.lambda_w, self.penalty.lambda_a = (factor * value for value in self._lambdas)

    def _backward(self, closure: Closure) -> Tensor:
        if self.penalty.method == "finite_difference":
            return self.penalty.backward(closure)
        loss = closure()
        (loss + self.penalty(loss)).backward()
        return loss.detach()

    def _sum(self, parts: Mapping[str, Tensor]) -> Tensor:
        of_w, of_a = self.penalty.lambda_w, self.penalty.lambda_a
        sites = {site.name for site in self.penalty.sites}
        terms = [(of_a if name in sites else of_w) * term for name, term in parts.items()]
        return torch.stack(terms).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of steps, which ``every`` depends on."""
        return {"steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state returned by :meth:`state_dict`."""
        self._steps = int(state["steps"])

    def close(self) -> None:
        """Disarm the model, and restore the width at which sites measure steps."""
        self._weigh(0.0)
        for quantizer, step_bits in self._before:
            quantizer.step_bits = step_bits
