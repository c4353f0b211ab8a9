"""The record of a folded batch norm in its layer, used to normalise the layer's output again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.quantization.absorption import along_outputs

__all__ = ["FoldedNorm", "divide_norm", "folded_norm", "remember_norm", "scaled"]

_NORM = "folded_norm"  # attribute of a layer, so that it is copied and pickled


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm that was folded into a layer. Tensors have one float64 value per channel.

    Attributes:
        factor: the factor of its map, ``weight / sqrt(running_var + eps)``.
        weight: the weight of the batch norm, or 1.
        bias: the bias of the batch norm, or 0; the mean of the layer's output in training.
        eps: the epsilon of the batch norm.
    """

    factor: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def again(self, mean: Tensor, variance: Tensor, *, scale: bool) -> tuple[Tensor, Tensor]:
        """Return the factor and shift that give outputs the mean and variance set by the batch norm.

        Args:
            mean: ``(C,)``, the mean of the layer's output.
            variance: ``(C,)``, the variance of the layer's output.
            scale: whether the factor may differ from 1.
        """
        factor = torch.ones_like(mean)
        if scale:
            before = variance / self.factor.square()  # variance at the input of the batch norm
            result = self.weight / (self.factor * (before + self.eps).sqrt())
            factor = torch.where(self.factor == 0, factor, result)
        return factor, self.bias.to(mean) - factor * mean


def remember_norm(layer: QuantizedLayer, norm: Any) -> None:
    """Record the batch norm in a layer, before it is folded."""
    like = norm.running_var.detach().double()
    weight = torch.ones_like(like) if norm.weight is None else norm.weight.detach().double().clone()
    bias = torch.zeros_like(like) if norm.bias is None else norm.bias.detach().double().clone()
    vars(layer)[_NORM] = FoldedNorm(weight * (like + norm.eps).rsqrt(), weight, bias, norm.eps)


def divide_norm(layer: QuantizedLayer, divisor: Tensor) -> None:
    """Update the record of a layer whose weight and bias were divided per channel."""
    norm = folded_norm(layer)
    if norm is not None:
        divisor = divisor.to(norm.bias)
        divided = FoldedNorm(norm.factor / divisor, norm.weight / divisor, norm.bias / divisor, norm.eps)
        vars(layer)[_NORM] = divided


def folded_norm(module: nn.Module) -> FoldedNorm | None:
    """Return the record of the batch norm that was folded into a layer, or None."""
    return vars(module).get(_NORM)


@torch.no_grad()
def scaled(layer: QuantizedLayer, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return new tensors for a layer, by name, that multiply its output by a factor and add a shift.

    Args:
        layer: a layer with a bias.
        values: ``shift`` and, if the weight has one range per output channel, ``factor``; ``(C,)`` each.
    """
    assert layer.bias is not None
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    shift, factor = values["shift"].to(bias), values.get("factor")
    if factor is None:
        return {"bias": bias + shift}
    factor = factor.to(bias)
    tensors = {"weight": weight * along_outputs(factor, layer, weight), "bias": bias * factor + shift}
    clip = layer.weight_quantizer.clip
    if clip is not None:
        tensors["weight_quantizer.clip"] = clip.double() * factor.abs()
    return tensors
