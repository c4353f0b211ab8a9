"""The distribution of each weight, before and after training, and how well 8 bits represent it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradl1_fast.nn.sites import named_layers
from gradl1_fast.training.methods.weights import name_of

__all__ = ["BITS", "Distribution", "channel_precision", "distributions"]

BITS = 8


@dataclass(frozen=True)
class Distribution:
    """The distribution of one weight tensor.

    Attributes:
        tensor: its name.
        when: ``"start"`` or ``"end"`` of the training.
        low: its smallest value.
        high: its largest value.
        deviation: its standard deviation.
        kurtosis: 1.8 if it is uniform, 3 if it is normal.
        precision: mean over the output channels of a channel's range over that of the tensor.
        error: mean squared error at 8 bits with one range for the tensor.
    """

    tensor: str
    when: str
    low: float
    high: float
    deviation: float
    kurtosis: float
    precision: float
    error: float


def channel_precision(rows: Tensor) -> float:
    """Return the mean over the rows of a row's range over the range of all, from 0 to 1.

    Args:
        rows: a weight with a row for each output channel, of shape ``(out, d)``.

    Source: average channel precision, Yun and Wong 2020, arXiv 2011.14578 (from memory).
    """
    ranges = rows.amax(1) - rows.amin(1)
    return float(ranges.mean() / (rows.max() - rows.min()).clamp(min=1e-30))


@torch.no_grad()
def distributions(model: nn.Module, when: str) -> list[Distribution]:
    """Return the distribution of each weight of a converted model, in the order of its layers."""
    found = []
    for name, layer in named_layers(model).items():
        weight = layer.weight.detach().double()
        rows = weight.movedim(layer.out_axis, 0).flatten(1)
        centred = weight - weight.mean()
        variance = centred.square().mean().clamp(min=1e-30)
        scale = (weight.abs().max() / (2 ** (BITS - 1) - 1)).clamp(min=1e-30)
        numbers = (
            *(weight.min(), weight.max(), variance.sqrt(), (centred**4).mean() / variance**2),
            *(channel_precision(rows), (scale * torch.round(weight / scale) - weight).square().mean()),
        )
        found.append(Distribution(name_of(name), when, *map(float, numbers)))
    return found
