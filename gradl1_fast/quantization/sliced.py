"""Layers whose weight is decoded from the first bits of stored codes."""

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
    """Replaces the float weight of a layer by one byte per weight, for any width up to ``widest``.

    Setting ``bits`` changes the width without changing the codes. Without a float weight, None means
    ``widest`` rather than float.

    Args:
        codes: bytes in the shape of the weight, see :mod:`gradl1_fast.quantization.bit_planes`.
        scale: scale of the 8-bit grid, a scalar or one value per output channel.
        widest: the number of bits that were read of each code, 1 to 8.
        dtype: the type of the decoded weight.
        axis: the axis of output channels if each has its own scale; None for one scale.
        name: the name of the layer, for messages.
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
        # An empty tensor, which records the type when the layer is converted to another one.
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
        """Return the weight at the current width."""
        return bit_planes.decode(self.codes, self.scale, self.bits, self.axis).to(self.like.dtype)

    def grid(self, weight: Any, bits: int) -> tuple[Tensor, Tensor, int, int]:
        """Raise, since below 8 bits the values are offset from an integer grid by half a step."""
        raise RuntimeError(
            "a weight from an any-bit file has no grid of integers around zero; use the float model"
        )

    def step(self, weight: Any, bits: int) -> Tensor:
        """Raise, see :meth:`grid`."""
        return self.grid(weight, bits)[0]

    def set_clip(self, clip: Tensor | None) -> None:
        """Accept only None, since the range is set by the file.

        Raises:
            ValueError: ``clip`` is not None.
        """
        if clip is not None:
            raise ValueError(
                "a weight from an any-bit file uses the range of the file, which cannot be changed"
            )


def slice_weight(layer: QuantizedLayer, quantizer: SlicedWeight) -> None:
    """Replace the float weight of a layer by a sliced weight.

    A weight that is computed from parameters is still computed, but not used.
    """
    if has_own_weight(layer):
        vars(layer).pop("weight", None)
        layer._parameters.pop("weight", None)
        # None, so that state dicts neither load nor store it.
        layer.register_parameter("weight", None)
        vars(layer)["weight"] = StandIn.of(quantizer)
    layer.weight_quantizer = quantizer.train(layer.training)


def has_own_weight(layer: QuantizedLayer) -> bool:
    """Return whether a layer's weight is a parameter, or was one before loading an any-bit file."""
    return not layer.is_computed or isinstance(vars(layer).get("weight"), StandIn)


def refuse_sliced(model: nn.Module, caller: str) -> None:
    """Raise if a model has no float weights; ``caller`` is used in the message.

    Raises:
        ValueError: a layer holds codes; the message names it.
    """
    for name, layer in named_layers(model).items():
        if isinstance(layer.weight_quantizer, SlicedWeight):
            raise ValueError(f"{caller}: {name!r} was loaded from an any-bit file and has no float weight")
