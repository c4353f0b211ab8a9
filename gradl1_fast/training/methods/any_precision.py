"""Any-Precision: trains a network at several widths, each distilled from the next wider one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Closure, Family, Variant
from gradl1_fast.training.methods.quantizing import WeightGrid, straight_through
from gradl1_fast.training.methods.several_widths import SeveralWidths

__all__ = ["AnyPrecision", "SquashedCodes", "soft_cross_entropy"]


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean cross-entropy with the class probabilities of a teacher, a scalar.

    Args:
        logits: ``(N, classes)``.
        teacher: logits of the teacher, of the same shape; they get no gradient.
    """
    target = torch.softmax(teacher.detach(), -1)
    return -(target * torch.log_softmax(logits, -1)).sum(-1).mean()


def _round(x: Tensor) -> Tensor:
    return straight_through(torch.round(x), x)


class SquashedCodes(WeightGrid):
    """A parametrization ``E (2 round((2^b - 1) u) / (2^b - 1) - 1)``, with weights squashed to u.

    ``u = tanh(W) / (2 max|tanh W|) + 1/2``, and E is the mean magnitude of W, detached. In float it is the
    limit of many bits, ``E tanh(W) / max|tanh W|``.
    """

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """See :meth:`WeightGrid.quantize`."""
        levels = 2**bits - 1
        return self._spread(weight, _round(levels * self._unit(weight)) / levels)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses."""
        if self.bits is None:
            return self._spread(weight, self._unit(weight))
        return self.quantize(weight, self.bits)

    @staticmethod
    def _unit(weight: Tensor) -> Tensor:
        squashed = torch.tanh(weight)
        return squashed / (2 * squashed.detach().abs().max().clamp(min=1e-8)) + 0.5

    @staticmethod
    def _spread(weight: Tensor, unit: Tensor) -> Tensor:
        return weight.detach().abs().mean() * (2 * unit - 1)


class AnyPrecision(SeveralWidths):
    """The losses at several widths; below the widest, the target is the output at the next wider one.

    Weights are transformed by tanh and quantized as in DoReFa. In float and after training, the weights are
    the limit for many bits. Activation ranges are moving averages instead of the fixed range from 0 to 1. The
    model must return logits of shape ``(N, classes)``.

    Args:
        model: a converted model.
        widths: bits from 1 to 8, a list or a text such as ``"8 4 2"``.
        coefficient: coefficient of the loss at each width but the widest.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Yu et al. 2021, arXiv 1911.07346.
    """

    name = "any-precision"
    text = "several widths, each distilled from the next wider one"
    source = "Yu et al. 2021, arXiv 1911.07346"
    family = Family.WIDTHS
    variants = (
        Variant("any-precision", "Any-Precision, each width distilled from a wider one", {"widths": "8 4 2"}),
    )

    def __init__(self, model: nn.Module, *, widths: str | Sequence[int], coefficient: float = 1.0) -> None:
        super().__init__(model, widths=widths, coefficient=coefficient)
        self._logits: Tensor | None = None

    def grid_for(self, name: str, layer: QuantizedLayer) -> SquashedCodes:
        """See :meth:`Quantizing.grid_for`."""
        return SquashedCodes()

    def loss_at(self, index: int, closure: Closure) -> Tensor:
        """See :meth:`SeveralWidths.loss_at`: the closure's loss at the widest width alone."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(output)

        handle = self.model.register_forward_hook(keep)
        try:
            loss = closure()
        finally:
            handle.remove()
        teacher, self._logits = self._logits, seen[-1].detach()
        return soft_cross_entropy(seen[-1], teacher) if index and teacher is not None else loss
