"""What a layer keeps of the batch norm that was folded into it, and how its output is normalised again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.quantization.absorption import along_outputs

__all__ = ["FoldedNorm", "divide_norm", "folded_norm", "remember_norm", "scaled"]

_NORM = "folded_norm"  # in the table of a layer, which copies and pickles it


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm that a layer has taken in. Tensors have one value a channel and are float64.

    Attributes:
        factor: by which it multiplied, ``weight / sqrt(running_var + eps)``.
        weight: its own, or 1.
        bias: its own, or 0; the mean of the layer's output in training.
        eps: its own.
    """

    factor: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def again(self, mean: Tensor, variance: Tensor, *, scale: bool) -> tuple[Tensor, Tensor]:
        """Return factor and shift which give outputs the mean and variance that the batch norm gave them.

        Args:
            mean: of the layer's output, ``(C,)``.
            variance: of the layer's output.
            scale: whether the factor may differ from 1.
        """
        factor = torch.ones_like(mean)
        if scale:
            before = variance / self.factor.square()  # of what the batch norm would be given
            found = self.weight / (self.factor * (before + self.eps).sqrt())
            factor = torch.where(self.factor == 0, factor, found)
        return factor, self.bias.to(mean) - factor * mean


def remember_norm(layer: QuantizedLayer, norm: Any) -> None:
    """Let a layer know which batch norm it takes in, before it does."""
    like = norm.running_var.detach().double()
    weight = torch.ones_like(like) if norm.weight is None else norm.weight.detach().double().clone()
    bias = torch.zeros_like(like) if norm.bias is None else norm.bias.detach().double().clone()
    vars(layer)[_NORM] = FoldedNorm(weight * (like + norm.eps).rsqrt(), weight, bias, norm.eps)


def divide_norm(layer: QuantizedLayer, divisor: Tensor) -> None:
    """Follow a layer whose weight and bias were divided, channel by channel."""
    norm = folded_norm(layer)
    if norm is not None:
        divisor = divisor.to(norm.bias)
        divided = FoldedNorm(norm.factor / divisor, norm.weight / divisor, norm.bias / divisor, norm.eps)
        vars(layer)[_NORM] = divided


def folded_norm(module: nn.Module) -> FoldedNorm | None:
    """Return the batch norm that a layer has taken in, if any."""
    return vars(module).get(_NORM)


@torch.no_grad()
def scaled(layer: QuantizedLayer, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a layer, by name, that multiply its output by a factor and add a shift.

    Args:
        layer: with a bias.
        values: ``shift`` and, where the weight has one range for each output channel, ``factor``, ``(C,)``.
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
