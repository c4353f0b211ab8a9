"""A layer whose weight is read out of codes: as many of their first bits as the present width has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import WeightQuantizer
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.nn.stand_in import StandIn
from gradl1_fast.quantization import bit_planes

__all__ = ["SlicedWeight", "has_own_weight", "refuse_sliced", "slice_weight"]


class SlicedWeight(WeightQuantizer):
    """Stands in for the float weight of a layer: one byte for each weight, of any width up to ``widest``.

    Setting ``bits`` chooses the width and touches no weight. None, which is float elsewhere, is ``widest``
    here: there is no float weight.

    Args:
        codes: bytes in the shape of the weight, see :mod:`gradl1_fast.quantization.bit_planes`.
        scale: step of the 8-bit grid, a scalar or one value for each output channel.
        widest: how many of the first bits of each code were read, 1 to 8.
        dtype: of the weight that the layer computes with.
        axis: of the output channels where each has a step, None for one step for the tensor.
        name: of the layer, for messages.
    """

    codes: Tensor
    scale: Tensor
    like: Tensor
    _ranges = ("scale", "clip")

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        widest: int,
        dtype: torch.dtype,
        axis: int | None = None,
        *,
        name: str = "",
    ) -> None:
        self.widest, self.name = widest, name
        self._bits = widest
        super().__init__(per_channel=axis is not None, out_axis=axis or 0)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        # An empty tensor that goes along with the layer to other types.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=codes.device), persistent=False)

    @property
    def bits(self) -> int:
        """Bits of the weight, 1 to ``widest``."""
        return self._bits

    @bits.setter
    def bits(self, value: int | None) -> None:
        if value is not None and not 1 <= value <= self.widest:
            raise ValueError(
                f"a weight read with {self.widest} bits supports widths 1 to {self.widest}, got {value}"
            )
        self._bits = self.widest if value is None else value

    def forward(self, weight: object = None) -> Tensor:
        """Return the weight at the present width; the layer has no other."""
        return bit_planes.decode(self.codes, self.scale, self.bits, self.axis).to(self.like.dtype)

    def grid(self, weight: Any, bits: int) -> tuple[Tensor, Tensor, int, int]:
        """Refuse: below 8 bits the values lie half a step beside the grid of any integers."""
        raise RuntimeError(
            "a weight from an any-bit file has no grid of integers around zero; use the float model"
        )

    def step(self, weight: Any, bits: int) -> Tensor:
        """Refuse as :meth:`grid` does."""
        return self.grid(weight, bits)[0]

    def set_clip(self, clip: Tensor | None) -> None:
        """Take no range: the file has set it.

        Raises:
            ValueError: ``clip`` is not None.
        """
        if clip is not None:
            raise ValueError(
                "a weight from an any-bit file uses the range of the file, which cannot be changed"
            )


def slice_weight(layer: QuantizedLayer, quantizer: SlicedWeight) -> None:
    """Take the float weight of a layer away; from now on it computes with the sliced one.

    A weight that is computed from parameters is still computed, but not used.
    """
    if has_own_weight(layer):
        vars(layer).pop("weight", None)
        layer._parameters.pop("weight", None)
        # None to state dicts, which neither take nor give it.
        layer.register_parameter("weight", None)
        vars(layer)["weight"] = StandIn.of(quantizer)
    layer.weight_quantizer = quantizer.train(layer.training)


def has_own_weight(layer: QuantizedLayer) -> bool:
    """Return whether a layer's weight is a parameter, or was until it was read from an any-bit file."""
    return not layer.is_computed or isinstance(vars(layer).get("weight"), StandIn)


def refuse_sliced(model: nn.Module, what: str) -> None:
    """Refuse a model without float weights; ``what`` names the caller, which needs them.

    Raises:
        ValueError: a layer holds codes; the message names it.
    """
    for name, layer in named_layers(model).items():
        if isinstance(layer.weight_quantizer, SlicedWeight):
            raise ValueError(f"{what}: {name!r} was loaded from an any-bit file and has no float weight")
