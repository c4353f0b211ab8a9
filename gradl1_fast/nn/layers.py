"""Convolution and linear layers that are twice differentiable at full speed and quantizable on demand."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradl1_fast import functional as F
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.twins import retype

__all__ = ["QConv1d", "QConv2d", "QConv3d", "QLinear", "QuantizedLayer"]


class QuantizedLayer(nn.Module):
    """What the layers share: a quantizer for the weight and, standing alone, one for the input.

    ``input_quantizer`` is None where the producer of the input already quantizes it, which is how
    :func:`gradl1_fast.convert` builds a network.
    """

    twin: ClassVar[type[nn.Module]]
    weight: Tensor
    bias: Tensor | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None

    def _add_quantizers(self, per_channel: bool, quantize_input: bool) -> None:
        self.weight_quantizer = WeightQuantizer(per_channel=per_channel)
        self.input_quantizer = ActivationQuantizer().to(self.weight) if quantize_input else None
        self.train(self.training)

    @classmethod
    def from_float(
        cls, module: nn.Module, *, per_channel: bool = False, quantize_input: bool = True
    ) -> QuantizedLayer:
        """Return this layer with the parameters, hooks and mode of its torch twin, which stays as it is.

        Raises:
            TypeError: ``module`` is not exactly the twin; a subclass may compute something else.
        """
        layer = retype(module, cls.twin, cls)
        layer._add_quantizers(per_channel, quantize_input)
        return layer

    def to_float(self) -> nn.Module:
        """Return the torch twin with the same parameters, hooks and mode."""
        return retype(self, type(self), self.twin, without=("weight_quantizer", "input_quantizer"))

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return x, self.weight if self.weight_quantizer.bits is None else self.weight_quantizer(self.weight)


class _QConv(QuantizedLayer):
    """Forward pass of the convolutions; the twin's attributes say how to convolve."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` as the torch twin does, at the present width."""
        x, weight = self._operands(x)
        own: Any = self
        padding = own.padding
        if own.padding_mode != "zeros":
            x = torch.nn.functional.pad(x, own._reversed_padding_repeated_twice, mode=own.padding_mode)
            padding = 0
        return F.conv(
            x,
            weight,
            self.bias,
            stride=own.stride,
            padding=padding,
            dilation=own.dilation,
            groups=own.groups,
        )


class QConv1d(_QConv, nn.Conv1d):
    """``nn.Conv1d`` that can be quantized on demand and differentiated twice.

    Args:
        *args: as for ``nn.Conv1d``.
        per_channel: quantize the weight with one range for each output channel.
        quantize_input: own a quantizer for the input; False if the producer has one.
        **kwargs: as for ``nn.Conv1d``.

    The state dict has the keys of ``nn.Conv1d``.
    """

    twin = nn.Conv1d

    def __init__(
        self, *args: Any, per_channel: bool = False, quantize_input: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel, quantize_input)


class QConv2d(_QConv, nn.Conv2d):
    """``nn.Conv2d`` that can be quantized on demand and differentiated twice; see :class:`QConv1d`."""

    twin = nn.Conv2d

    def __init__(
        self, *args: Any, per_channel: bool = False, quantize_input: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel, quantize_input)


class QConv3d(_QConv, nn.Conv3d):
    """``nn.Conv3d`` that can be quantized on demand and differentiated twice; see :class:`QConv1d`."""

    twin = nn.Conv3d

    def __init__(
        self, *args: Any, per_channel: bool = False, quantize_input: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel, quantize_input)


class QLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` that can be quantized on demand and differentiated twice; see :class:`QConv1d`."""

    twin = nn.Linear

    def __init__(
        self, *args: Any, per_channel: bool = False, quantize_input: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel, quantize_input)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` at the present width."""
        return F.linear(*self._operands(x), self.bias)
