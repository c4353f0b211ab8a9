"""Layers that are twice differentiable at full speed and quantizable on demand, as subclasses of torch's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradl1_fast import functional as F
from gradl1_fast.nn.arming import Arming, is_armed
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.sharing import pass_through
from gradl1_fast.nn.twins import retype

__all__ = [
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QLinear",
    "QuantizedLayer",
]


class QuantizedLayer(nn.Module):
    """Base class of the layers: a quantizer for the weight, a site at the input, and the switch of the model.

    Attributes:
        twin: the class of torch that the layer is a subclass of.
        out_axis: the axis of the weight that counts output channels.
        weight_quantizer: of the weight.
        input_quantizer: of the input; layers that are given the very same tensor share one. None for a layer
            whose input is not an activation, such as an embedding.
        arming: whether a penalty will differentiate the present forward pass.
        was_called: whether the forward pass of the layer has run since it was made. A weight that others use
            by function stays in float.

    """

    twin: ClassVar[type[nn.Module]]
    out_axis: ClassVar[int] = 0
    has_site: ClassVar[bool] = True
    weight: Tensor
    bias: Tensor | None
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    arming: Arming
    was_called: bool
    _used_weights: tuple[int, list[weakref.ref[Tensor]]]

    def _add_quantizers(self, per_channel: bool, arming: Arming | None = None) -> None:
        self.weight_quantizer = WeightQuantizer(per_channel=per_channel, out_axis=self.out_axis)
        self.input_quantizer = None
        if self.has_site:
            self.input_quantizer = ActivationQuantizer().to(next(self.parameters()))
        self.use(Arming() if arming is None else arming)
        self.was_called = False
        self._used_weights = (0, [])
        self.weight_quantizer.train(self.training)
        if self.input_quantizer is not None:
            self.input_quantizer.train(self.training)

    def use(self, arming: Arming) -> None:
        """Take the switch of a model as that of this layer and its site."""
        self.arming = arming
        if self.input_quantizer is not None:
            self.input_quantizer.arming = arming

    @classmethod
    def from_float(
        cls, module: nn.Module, *, per_channel: bool = False, arming: Arming | None = None
    ) -> QuantizedLayer:
        """Return this layer with the parameters, hooks and mode of its torch twin, which stays as it is.

        Args:
            module: of the class of the twin.
            per_channel: quantize the weight with one range for each output channel.
            arming: the switch of the model that the layer is part of.

        Raises:
            TypeError: ``module`` is not exactly the twin; a subclass may compute something else.
        """
        layer = retype(module, cls.twin, cls)
        layer._add_quantizers(per_channel, arming)
        return layer

    def to_float(self) -> nn.Module:
        """Return the torch twin with the same parameters, hooks and mode."""
        return retype(self, type(self), self.twin, without=_OWN_ATTRIBUTES)

    @property
    def is_computed(self) -> bool:
        """Whether the weight is computed from parameters, rather than one itself."""
        return self._parameters.get("weight") is None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a forward pass."""
        return {**super().__getstate__(), "_used_weights": (0, [])}

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return pass_through(self, x), self._quantized(self.weight)

    def _quantized(self, weight: Tensor) -> Tensor:
        """Return the weight at the present width, after taking note of it if a penalty needs to find it."""
        if not torch.compiler.is_compiling():
            if not self.was_called:
                self.was_called = True
            if self.arming.armed:
                self._take_note(weight, self.arming.note_run())
        return weight if self.weight_quantizer.bits is None else self.weight_quantizer(weight)

    def weights_in_use(self) -> list[Tensor]:
        """Return the weights that the last armed forward pass has used, as far as its graph is alive."""
        number, references = self._used_weights
        weights = [reference() for reference in references] if number == self.arming.passes else []
        return [weight for weight in weights if weight is not None]

    def _take_note(self, weight: Tensor, number: int) -> None:
        """Remember the weight in use, which may be computed or put there by ``functional_call``."""
        if weight.requires_grad and torch.is_grad_enabled():
            references = self._used_weights[1] if self._used_weights[0] == number else []
            others = [r for r in references if r() is not None and r() is not weight]
            self._used_weights = number, [*others, weakref.ref(weight)]


_OWN_ATTRIBUTES = ("weight_quantizer", "input_quantizer", "arming", "was_called", "_used_weights")


class _QConv(QuantizedLayer):
    """Forward pass of the convolutions; the twin's attributes say how to convolve."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` as the torch twin does, at the present width."""
        x, weight = self._operands(x)
        own: Any = self
        if not is_armed(self.arming):
            return own._conv_forward(x, weight, self.bias)
        padding = own.padding
        if own.padding_mode != "zeros":
            x = nn.functional.pad(x, own._reversed_padding_repeated_twice, mode=own.padding_mode)
            padding = 0
        return F.conv(
            x, weight, self.bias, stride=own.stride, padding=padding, dilation=own.dilation, groups=own.groups
        )


class _QConvTranspose(QuantizedLayer):
    """Forward pass of the transposed convolutions."""

    out_axis = 1
    _function: ClassVar[Callable[..., Tensor]]

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve ``x`` as the torch twin does, at the present width."""
        own: Any = self
        dimensions = len(own.kernel_size)
        output_padding = own._output_padding(
            x, output_size, own.stride, own.padding, own.kernel_size, dimensions, own.dilation
        )
        x, weight = self._operands(x)
        if not is_armed(self.arming):
            function = type(self)._function
            return function(
                x, weight, self.bias, own.stride, own.padding, output_padding, own.groups, own.dilation
            )
        return F.conv_transpose(
            x,
            weight,
            self.bias,
            stride=own.stride,
            padding=own.padding,
            output_padding=output_padding,
            groups=own.groups,
            dilation=own.dilation,
        )


class _QLinear(QuantizedLayer):
    """Forward pass of the linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias`` at the present width."""
        x, weight = self._operands(x)
        function = F.linear if is_armed(self.arming) else nn.functional.linear
        return function(x, weight, self.bias)


class _QEmbedding(QuantizedLayer):
    """Forward pass of the embedding, whose weight alone is quantized."""

    has_site = False

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the weight at the present width that ``input`` names."""
        own: Any = self
        weight = self._quantized(self.weight)
        options = own.padding_idx, own.max_norm, own.norm_type, own.scale_grad_by_freq, own.sparse
        return nn.functional.embedding(input, weight, *options)


class QConv1d(_QConv, nn.Conv1d):
    """``nn.Conv1d`` that can be quantized on demand and differentiated twice.

    Args:
        *args: as for ``nn.Conv1d``.
        per_channel: quantize the weight with one range for each output channel.
        **kwargs: as for ``nn.Conv1d``.

    The state dict has the keys of ``nn.Conv1d``. Differentiable twice.
    """

    twin = nn.Conv1d

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)


class QConv2d(_QConv, nn.Conv2d):
    """``nn.Conv2d`` that can be quantized on demand and differentiated twice; see :class:`QConv1d`."""

    twin = nn.Conv2d

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)


class QConv3d(_QConv, nn.Conv3d):
    """``nn.Conv3d`` that can be quantized on demand and differentiated twice; see :class:`QConv1d`."""

    twin = nn.Conv3d

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)


class QConvTranspose1d(_QConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` that can be quantized on demand and differentiated twice.

    With ``per_channel`` the weight has one range for each index of its second axis, which the groups share.
    See :class:`QConv1d`.
    """

    twin = nn.ConvTranspose1d
    _function = nn.functional.conv_transpose1d

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)


class QConvTranspose2d(_QConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d``, quantizable and twice differentiable; see :class:`QConvTranspose1d`."""

    twin = nn.ConvTranspose2d
    _function = nn.functional.conv_transpose2d

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)


class QConvTranspose3d(_QConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d``, quantizable and twice differentiable; see :class:`QConvTranspose1d`."""

    twin = nn.ConvTranspose3d
    _function = nn.functional.conv_transpose3d

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)


class QLinear(_QLinear, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` that can be quantized on demand and differentiated twice; see :class:`QConv1d`."""

    twin = nn.Linear

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)


class QEmbedding(_QEmbedding, nn.Embedding):
    """``nn.Embedding`` whose weight can be quantized on demand; see :class:`QConv1d`.

    With ``per_channel`` each row, that is each word, has a range.
    """

    twin = nn.Embedding

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)
