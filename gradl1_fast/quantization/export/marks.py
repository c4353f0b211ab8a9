"""Marks in a model: an operator that stands for the quantizer of a site or a weight while it is traced."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradl1_fast import functional as F
from gradl1_fast.nn.codes import codes, values
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.nn.twins import copy_structure

__all__ = ["MARK", "Grid", "Mark", "marked"]


@torch.library.custom_op("gradl1_fast::quantization_mark", mutates_args=())
def _mark(x: Tensor, key: int) -> Tensor:
    return x.clone()


@_mark.register_fake
def _(x: Tensor, key: int) -> Tensor:
    return torch.empty_like(x)


MARK = torch.ops.gradl1_fast.quantization_mark.default


@dataclass(frozen=True)
class Grid:
    """The codes of a tensor.

    Attributes:
        scale: a scalar, or one for each channel.
        zero_point: of the same shape.
        q_min: smallest code.
        q_max: largest code.
        bits: of a code.
        axis: of the channels.
        chosen: codes of a weight that need not be the nearest ones, whole numbers in float.
    """

    scale: Tensor
    zero_point: Tensor
    q_min: int
    q_max: int
    bits: int
    axis: int | None = None
    chosen: Tensor | None = None

    def quantize(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid, in float."""
        if self.chosen is not None:
            return values(self.chosen, self.scale, self.axis)
        if self.bits > 16:  # more than the codes of float32
            x, scale = x.double(), self.scale.double()
            return (codes(x, scale, self.zero_point, (self.q_min, self.q_max), self.axis) * scale).float()
        args = self.scale, self.zero_point, self.q_min, self.q_max
        return F.fake_quantize(x, *args, axis=self.axis)


@dataclass
class Mark:
    """What a mark stands for.

    Attributes:
        kind: ``"site"``, ``"weight"``, ``"joint"`` for an operand of an operation between layers, or
            ``"bias"``.
        name: of the site, of the layer that has the weight, or of the operand.
        layers: of a joint, the numbers of weights and sites that must have at most 8 bits for it to be
            quantized; of a bias, the numbers of site and weight, whose scales are multiplied.
        same_as: of a joint whose tensor passes a site too, the number of that.
        range: of a joint, its smallest and largest value.
    """

    kind: str
    name: str
    layers: list[int] = field(default_factory=list)
    same_as: int | None = None
    range: tuple[Tensor, Tensor] | None = None


def marked(model: nn.Module) -> tuple[nn.Module, list[Mark]]:
    """Return a copy of a model with a mark for each quantizer, and what the number of each mark means."""
    copy, marks = copy_structure(model), list[Mark]()
    sites = {id(quantizer): name for name, quantizer in named_quantizers(copy).items()}
    for module in copy.modules():
        vars(module).pop("_compiled_call_impl", None)  # a plan of the original
    stand_ins: dict[int, nn.Module] = {}
    for name, layer in named_layers(copy).items():
        layer._modules["weight_quantizer"] = _MarkedWeight(len(marks))
        marks.append(Mark("weight", name))
        _mark_site(layer, sites, stand_ins, marks)
    return copy, marks


def _mark_site(
    layer: QuantizedLayer, sites: dict[int, str], stand_ins: dict[int, nn.Module], marks: list[Mark]
) -> None:
    quantizer = layer.input_quantizer
    if quantizer is None:
        return
    if id(quantizer) not in stand_ins:
        stand_ins[id(quantizer)] = _MarkedSite(len(marks), sites[id(quantizer)])
        marks.append(Mark("site", sites[id(quantizer)]))
    layer._modules["input_quantizer"] = stand_ins[id(quantizer)]


class _MarkedWeight(nn.Module):
    """Stands in for a quantizer of a weight."""

    def __init__(self, key: int) -> None:
        super().__init__()
        self.key, self.bits = key, 8

    def forward(self, weight: Tensor) -> Tensor:
        return MARK(weight, self.key)


class _MarkedSite(ActivationQuantizer):
    """Stands in for a quantizer of an activation."""

    def __init__(self, key: int, name: str) -> None:
        super().__init__()
        self.key, self.name, self.is_known = key, name, True

    @property
    def is_idle(self) -> bool:
        """Return False: the mark must appear in the graph."""
        return False

    def forward(self, x: Tensor, measured: bool = True) -> Tensor:
        return MARK(x, self.key)

    def quantize(self, x: Tensor, measured: bool = True) -> Tensor:
        return self.forward(x)
