"""A layer whose weight is read out of codes: as many of their first bits as the present width has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import WeightQuantizer
from gradl1_fast.nn.sites import named_layers
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

    Attributes:
        stand_in: what the layer has in the place of its weight: NaN in the shape, type and place of the
            weight, of which one value is stored. None where the layer computes its weight from parameters
            that it keeps.
        is_dense: whether the stand-in holds the values at the present width, for functions that use it.
    """

    stand_in: Tensor | None
    is_dense: bool
    codes: Tensor
    scale: Tensor
    like: Tensor
    _ranges = ("scale", "clip")

    def __init__(
        self, codes: Tensor, scale: Tensor, widest: int, dtype: torch.dtype, axis: int | None = None
    ) -> None:
        self.widest = widest
        self._bits = widest
        self.stand_in, self.is_dense = None, False
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
                f"a weight read with {self.widest} bits has widths of 1 to {self.widest}, got {value}"
            )
        self._bits = self.widest if value is None else value
        if self.is_dense and self.stand_in is not None:
            self.stand_in.copy_(self())

    def stand_in_now(self) -> Tensor:
        """Return a new tensor to stand in for the weight."""
        return self().clone() if self.is_dense else self.like.new_full((), torch.nan).expand(self.codes.shape)

    def forward(self, weight: object = None) -> Tensor:
        """Return the weight at the present width; the layer has no other."""
        return bit_planes.decode(self.codes, self.scale, self.bits, self.axis).to(self.like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.stand_in is not None:
            moved = self.stand_in_now()
            if torch._has_compatible_shallow_copy_type(self.stand_in, moved):
                self.stand_in.data = moved  # the very tensor that the layer has
            else:
                torch.utils.swap_tensors(self.stand_in, moved)
        return self

    def grid(self, weight: Any, bits: int) -> tuple[Tensor, Tensor, int, int]:
        """Refuse: below 8 bits the values lie half a step beside the grid of any integers."""
        raise RuntimeError("a weight from an any-bit file has no grid of integers around zero; use its run")

    def step(self, weight: Any, bits: int) -> Tensor:
        """Refuse as :meth:`grid` does."""
        return self.grid(weight, bits)[0]

    def set_clip(self, clip: Tensor | None) -> None:
        """Take no range: the file has set it.

        Raises:
            ValueError: ``clip`` is not None.
        """
        if clip is not None:
            raise ValueError("a weight from an any-bit file has the range of the file, and takes no other")


def slice_weight(layer: QuantizedLayer, quantizer: SlicedWeight, *, dense: bool = False) -> None:
    """Take the float weight of a layer away; from now on it computes with the sliced one.

    A weight that is no parameter, but computed from some, goes on being computed, and is not used.

    Args:
        layer: to be changed.
        quantizer: the sliced weight.
        dense: keep a tensor with the values as well, for functions that use the weight without the layer.
    """
    if has_own_weight(layer):
        quantizer.is_dense = dense
        quantizer.stand_in = quantizer.stand_in_now()
        vars(layer).pop("weight", None)
        layer._parameters.pop("weight", None)
        # None to state dicts, which neither take nor give it; code that asks for its shape, type or device
        # gets an answer, and a product with it is NaN rather than something plausible.
        layer.register_parameter("weight", None)
        vars(layer)["weight"] = quantizer.stand_in
    layer.weight_quantizer = quantizer.train(layer.training)


def has_own_weight(layer: QuantizedLayer) -> bool:
    """Return whether a layer's weight is a parameter, or was until it was read from an any-bit file."""
    quantizer = layer.weight_quantizer
    return not layer.is_computed or (isinstance(quantizer, SlicedWeight) and quantizer.stand_in is not None)


def refuse_sliced(model: nn.Module, what: str) -> None:
    """Refuse a model without float weights; ``what`` names the caller, which needs them.

    Raises:
        ValueError: a layer holds codes; the message names it.
    """
    for name, layer in named_layers(model).items():
        if isinstance(layer.weight_quantizer, SlicedWeight):
            raise ValueError(f"{what}: {name!r} holds bits of an any-bit file and no float weight")
