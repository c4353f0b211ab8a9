"""The l2 counterpart of the gradient l1 penalty."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradl1_fast import _checks as check
from gradl1_fast.penalty.checks.graph import require_gradients
from gradl1_fast.penalty.measured import activation_sites
from gradl1_fast.training.methods.activations import seen_at_sites
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
from gradl1_fast.training.methods.weights import trainable_layers, trainable_weights

__all__ = ["GradientL2"]


class GradientL2(Method):
    """The loss plus ``lambda_w * sum_l ||dL/dW_l||_2 + lambda_a * sum_l ||dL/dY_l||_2``.

    The norms are not squared. Each is the norm of one tensor, with the same tensors as in
    :class:`gradl1_fast.GradL1`, and is differentiated by double backprop.

    Args:
        model: a converted model.
        lambda_w: coefficient of the weights' term.
        lambda_a: coefficient of the activations' term.

    Source: Alizadeh et al. 2020 (for comparison), arXiv 2002.07520.
    """

    name = "l2"
    text = "gradient l2 penalty, by double backpropagation"
    source = "Alizadeh et al. 2020 (for comparison), arXiv 2002.07520"
    family = Family.GRADIENTS
    second_order = True
    variants = (Variant("l2", "gradient l2 penalty", {"lambda_w": 0.1, "lambda_a": 0.1}),)

    def __init__(self, model: nn.Module, *, lambda_w: float, lambda_a: float) -> None:
        super().__init__(model)
        self.lambda_w = check.coefficient("GradientL2: lambda_w", lambda_w)
        self.lambda_a = check.coefficient("GradientL2: lambda_a", lambda_a)
        if self.lambda_w:
            trainable_layers(model)
        if self.lambda_a and not activation_sites(model):
            raise ValueError("GradientL2: lambda_a needs activations that feed a layer; the model has none")

    def backward(self, closure: Closure, scale: Scale = identity) -> Terms:
        """See :meth:`Method.backward`."""
        with parametrize.cached(), seen_at_sites(self.model, wanted=self.lambda_a > 0) as activations:
            loss = closure()
            weights = trainable_weights(self.model) if self.lambda_w else {}
        scaled = scale(loss)
        norms = self._norms(scaled, weights, activations)
        total = sum((of * norm for of, norm in norms.values()), scaled.new_zeros(()))
        penalty = self.strength * total
        (scaled + penalty).backward()
        factor = factor_of(scale, loss)
        parts = {name: norm.detach() / factor for name, (_, norm) in norms.items()}
        return Terms(loss.detach(), penalty.detach() / factor, parts)

    def _norms(
        self, loss: Tensor, weights: dict[str, Tensor], activations: list[tuple[str, Tensor]]
    ) -> dict[str, tuple[float, Tensor]]:
        """Return coefficient and norm by name; further tensors at a site are numbered."""
        if self.strength == 0:
            return {}
        measured = [(name, self.lambda_w, weight) for name, weight in weights.items()]
        measured += [(name, self.lambda_a, activation) for name, activation in activations]
        names = [name for name, _, _ in measured]
        if not names:
            return {}
        grads = torch.autograd.grad(
            loss, [tensor for _, _, tensor in measured], create_graph=True, allow_unused=True
        )
        norms: dict[str, tuple[float, Tensor]] = {}
        for (name, of, _), grad in zip(measured, require_gradients(names, grads), strict=True):
            key = name if name not in norms else f"{name}, call {sum(n == name for n in names)}"
            norms[key] = of, torch.linalg.vector_norm(grad.float() if grad.itemsize < 4 else grad)
        return norms
