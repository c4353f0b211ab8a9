"""Converts weights to rows for rounding, and rounded rows to codes of layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.layers import QEmbedding, QuantizedLayer
from gradl1_fast.nn.rounded import MadeFor
from gradl1_fast.quantization.rounding.base import Problem
from gradl1_fast.quantization.rounding.second_moments import SecondMoments

__all__ = ["Rows", "reason_against", "tied"]

_DAMPING = 0.01  # for the correction of inputs that differ from float


def reason_against(layer: QuantizedLayer) -> str | None:
    """Return why the weight of a layer is rounded to nearest, or None."""
    if isinstance(layer, QEmbedding | nn.Embedding):
        return "an embedding has no inputs to weigh errors with"
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution"
    return None


def tied(layers: Mapping[str, QuantizedLayer], widths: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the names of the layers that share a weight on one grid, by the name of each of them."""
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        rows = Rows(layer, widths[name])
        own = name if layer.is_computed else id(layer.weight)
        key = own, widths[name], rows.groups, type(layer).out_axis, tuple(rows.scale.flatten().tolist())
        groups.setdefault(key, []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


class Rows:
    """The weight of a layer as rows, one per output channel, grouped as in the convolution.

    Args:
        layer: a convolution or a linear layer.
        bits: the bits of the weight.
    """

    def __init__(self, layer: QuantizedLayer, bits: int) -> None:
        self._layer, self._bits = layer, bits
        self._weight = used_weight(layer)
        self.groups = getattr(layer, "groups", 1)
        scale, _, self._q_min, self._q_max = layer.weight_quantizer.grid(self._weight, bits)
        count = self._weight.shape[layer.out_axis]
        self.scale = scale.double().expand(count).reshape(self.groups, -1, 1)

    def problem(self, moments: SecondMoments) -> Problem:
        """Return the problem of rounding the weight."""
        rows, own, cross = self.of(self._weight.double()), moments.mean(), moments.cross()
        if cross is not None:
            rows = rows + _correction(rows, own, cross)
        return Problem(rows, own, self.scale, self._q_min, self._q_max)

    def nearest(self, problem: Problem) -> Tensor:
        """Return the nearest codes of the weight."""
        return problem.nearest(self.of(self._weight.double()))

    def of(self, weight: Tensor) -> Tensor:
        """Return a tensor in the shape of the weight as rows, ``(groups, rows, columns)``."""
        rows = weight.movedim(self._layer.out_axis, 0).flatten(1)
        return rows.reshape(self.groups, -1, rows.shape[1])

    def store(self, rows: Tensor, name: str) -> None:
        """Store the codes of rows in the layer, for its current weight and stored range."""
        like = self._weight.movedim(self._layer.out_axis, 0)
        codes = rows.reshape(like.shape).movedim(0, self._layer.out_axis)
        kept = torch.empty_like(self._weight, dtype=torch.int16).copy_(codes)
        quantizer = self._layer.weight_quantizer
        made_for = MadeFor.of(self._weight, quantizer.clip, name)
        quantizer.set_rounded(self._bits, kept, made_for)


def _correction(rows: Tensor, own: Tensor, cross: Tensor) -> Tensor:
    """Return the change of the float rows that best restores their output on float inputs."""
    added = _DAMPING * own.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-30
    damped = own + added * torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    return torch.linalg.solve(damped, rows @ (cross - own), left=False)
