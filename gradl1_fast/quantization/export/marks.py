"""Marks: operators that represent the quantizers of sites and weights during tracing."""

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
    """The grid of a tensor's codes.

    Attributes:
        scale: a scalar, or one value per channel.
        zero_point: the zero point, of the same shape.
        q_min: the smallest code.
        q_max: the largest code.
        bits: the bits of a code.
        axis: the axis of the channels.
        chosen: stored codes of a weight, as whole numbers in float, which may differ from the nearest ones.
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
        if self.bits > 16:  # float32 cannot represent the codes
            x, scale = x.double(), self.scale.double()
            return (codes(x, scale, self.zero_point, (self.q_min, self.q_max), self.axis) * scale).float()
        args = self.scale, self.zero_point, self.q_min, self.q_max
        return F.fake_quantize(x, *args, axis=self.axis)


@dataclass
class Mark:
    """A mark: the tensor that it represents.

    Attributes:
        kind: ``"site"``, ``"weight"``, ``"joint"`` for an operand of an operation between layers, or
            ``"bias"``.
        name: the name of the site, of the layer with the weight, or of the operand.
        layers: for a joint, the numbers of weights and sites that must have at most 8 bits for it to be
            quantized; for a bias, the numbers of site and weight, whose scales are multiplied.
        same_as: for a joint whose tensor also passes a site, the number of the site.
        range: for a joint, its smallest and largest value.
    """

    kind: str
    name: str
    layers: list[int] = field(default_factory=list)
    same_as: int | None = None
    range: tuple[Tensor, Tensor] | None = None


def marked(model: nn.Module) -> tuple[nn.Module, list[Mark]]:
    """Return a copy of a model with a mark for each quantizer, and the list of marks by number."""
    copy, marks = copy_structure(model), list[Mark]()
    sites = {id(quantizer): name for name, quantizer in named_quantizers(copy).items()}
    for module in copy.modules():
        vars(module).pop("_compiled_call_impl", None)  # it refers to the original
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
    """Replaces the quantizer of a weight by a mark."""

    def __init__(self, key: int) -> None:
        super().__init__()
        self.key, self.bits = key, 8

    def forward(self, weight: Tensor) -> Tensor:
        return MARK(weight, self.key)


class _MarkedSite(ActivationQuantizer):
    """Replaces the quantizer of an activation by a mark."""

    def __init__(self, key: int, name: str) -> None:
        super().__init__()
        self.key, self.name, self.is_known = key, name, True

    @property
    def is_idle(self) -> bool:
        """Always False, because the mark must appear in the graph."""
        return False

    def forward(self, x: Tensor, measured: bool = True) -> Tensor:
        return MARK(x, self.key)

    def quantize(self, x: Tensor, measured: bool = True) -> Tensor:
        return self.forward(x)
