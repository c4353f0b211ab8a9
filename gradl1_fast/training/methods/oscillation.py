"""The oscillation regulariser, which pushes weights to the middle between grid points."""

from __future__ import annotations

from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.weight_penalty import WeightPenalty

__all__ = ["Oscillation"]


class Oscillation(WeightPenalty):
    """The loss plus ``coefficient * sum_l mean(q(W_l)^2 - W_l^2)``, with q at one target width.

    q is the layer's quantizer with the straight-through estimator, so the gradient is ``2 (q(W) - W) / N``;
    the gradient through the scale is ignored. Weights move away from grid points, as when they oscillate in
    quantization-aware training. The forward pass stays in float. The term may be negative.

    Args:
        model: a converted model.
        coefficient: lambda.
        bits: target width, 1 to 16.

    Raises:
        ValueError: a setting is out of range, or no weight is trained.

    Source: Wenshøj et al. 2025, arXiv 2502.00490.
    """

    name = "oscillation"
    text = "oscillation regulariser at a target width"
    source = "Wenshøj et al. 2025, arXiv 2502.00490"
    family = Family.WEIGHTS
    variants = tuple(
        Variant(
            f"oscillation-{bits}",
            f"oscillation regulariser for {bits} bits",
            {"coefficient": 1.0, "bits": bits},
        )
        for bits in (4, 3)
    )

    def __init__(self, model: nn.Module, *, coefficient: float, bits: int) -> None:
        super().__init__(model)
        self.coefficient = check.coefficient("Oscillation: coefficient", coefficient)
        check.bits(bits, "Oscillation: bits")
        self.bits = bits

    def part(self, weight: Tensor, layer: QuantizedLayer) -> Tensor:
        """Return ``mean(q(w)^2 - w^2)``, a scalar."""
        quantizer = layer.weight_quantizer
        before, quantizer.bits = quantizer.bits, self.bits
        try:
            quantized = quantizer(weight)
        finally:
            quantizer.bits = before
        return (quantized.square() - weight.square()).mean()

    def penalty(self, parts: Tensor) -> Tensor:
        """See :meth:`WeightPenalty.penalty`."""
        return self.coefficient * parts.sum()
