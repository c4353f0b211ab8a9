"""Quantization-aware training with the straight-through estimator."""

from __future__ import annotations

from torch import nn

from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.quantizing import Quantizing

__all__ = ["QuantizationAware"]


class QuantizationAware(Quantizing):
    """The loss of the network quantized to one width, with the straight-through estimator.

    Weights and the network's input use the quantizers of evaluation. The range of an activation is an
    exponential moving average over batches with a weight of 0.1 for each new batch. The penalty is 0, and
    ``strength`` has no effect. Between steps the model computes in float.

    Args:
        model: a converted model.
        w: bits of the weights, None for float.
        a: bits of the activations, None for float; the network's input has at least 8.

    Raises:
        ValueError: a width is out of range, or the model is not converted.

    Source: Jacob et al. 2018, arXiv 1712.05877.
    """

    name = "qat"
    text = "quantization-aware training at one width"
    source = "Jacob et al. 2018, arXiv 1712.05877"
    family = Family.ONE_WIDTH
    variants = tuple(
        Variant(f"qat-{bits}", f"quantization-aware training at ({bits}, {bits})", {"w": bits, "a": bits})
        for bits in (8, 6, 4)
    )

    def __init__(self, model: nn.Module, *, w: int | None, a: int | None) -> None:
        super().__init__(model, [(w, a)])
