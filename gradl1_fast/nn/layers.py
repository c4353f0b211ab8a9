"""Subclasses of torch's layers with a fast second derivative and quantization on demand."""

from __future__ import annotations

import functools
import inspect
import warnings
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
    "LAYERS",
    "RANGES_MARK",
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

# Attribute of a weight quantizer, set by calibration: the weights that the ranges were found with.
RANGES_MARK = "ranges_found_with"


class QuantizedLayer(nn.Module):
    """Base class of the layers, with a quantizer for the weight, a site at the input and the arming state.

    Attributes:
        twin: the torch class that the layer extends.
        out_axis: the axis of the weight that counts output channels.
        weight_quantizer: the quantizer of the weight.
        input_quantizer: the quantizer of the input, shared by layers with the same input tensor. None if the
            input is not an activation, as for an embedding.
        arming: the arming state of the model.
        was_called: whether the layer's forward pass has run since its creation. A weight that is used by a
            function without calling the layer stays in float.

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
        """Use the arming state of a model for this layer and its site."""
        self.arming = arming
        if self.input_quantizer is not None:
            self.input_quantizer.arming = arming

    @classmethod
    def from_float(
        cls, module: nn.Module, *, per_channel: bool = False, arming: Arming | None = None
    ) -> QuantizedLayer:
        """Return this layer with the parameters, hooks and mode of its torch twin, which is not changed.

        Args:
            module: an instance of the twin.
            per_channel: quantize the weight with one range per output channel.
            arming: the arming state of the model that contains the layer.

        Raises:
            TypeError: the class of ``module`` is not exactly the twin; a subclass may compute something else.
        """
        layer = retype(module, cls.twin, cls)
        layer._add_quantizers(per_channel, arming)
        return layer

    def to_float(self) -> nn.Module:
        """Return the torch twin with the same parameters, hooks and mode."""
        return retype(self, type(self), self.twin, without=_OWN_ATTRIBUTES)

    @classmethod
    @functools.cache
    def input_name(cls) -> str:
        """Return the name of the argument of ``forward`` that passes the site, which is the first one."""
        return [*inspect.signature(cls.twin.forward).parameters, ""][1]

    @property
    def is_computed(self) -> bool:
        """Whether the weight is computed from parameters rather than being a parameter."""
        return self._parameters.get("weight") is None

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the state of a forward pass."""
        return {**super().__getstate__(), "_used_weights": (0, [])}

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return pass_through(self, x), self._quantized(self.weight)

    def _quantized(self, weight: Tensor) -> Tensor:
        """Return the weight at the current width, and record it if a penalty needs it."""
        if not torch.compiler.is_compiling():
            if not self.was_called:
                self.was_called = True
            if self.arming.armed:
                self._record_weight(weight, self.arming.note_run())
            if not self.training and RANGES_MARK in vars(self.weight_quantizer):
                self._warn_if_stale()
        quantizer: Any = self._modules["weight_quantizer"]  # faster than the attribute
        return weight if quantizer.bits is None else quantizer(weight)

    def _warn_if_stale(self) -> None:
        """Warn once if the site has a width and its range is older than a change of the weight in place."""
        site = self.input_quantizer
        if site is None or site.bits is None or site.observer is not None:
            return
        if any(mark.has_changed() for mark in vars(self.weight_quantizer)[RANGES_MARK]):
            del vars(self.weight_quantizer)[RANGES_MARK]
            warnings.warn(
                "the weights have changed since the activation ranges were calibrated: "
                "call gradl1_fast.calibrate(model, batches) again",
                stacklevel=4,
            )

    def weights_in_use(self) -> list[Tensor]:
        """Return the weights used by the last armed forward pass, if its graph is still alive."""
        number, references = self._used_weights
        weights = [reference() for reference in references] if number == self.arming.passes else []
        return [weight for weight in weights if weight is not None]

    def _record_weight(self, weight: Tensor, number: int) -> None:
        """Record the weight in use, which may be computed, or passed by ``functional_call``."""
        if weight.requires_grad and torch.is_grad_enabled():
            before, references = self._used_weights
            if len(references) != 1 or references[0]() is not weight:
                others = references if before == number else []
                others = [r for r in others if r() is not None and r() is not weight]
                references = [*others, weakref.ref(weight)]
            vars(self)["_used_weights"] = number, references  # faster than setting an attribute of a module


_OWN_ATTRIBUTES = ("weight_quantizer", "input_quantizer", "arming", "was_called", "_used_weights")


class _QConv(QuantizedLayer):
    """Forward pass of the convolutions, with the geometry given by the attributes of the twin."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the result of the torch twin at the current width."""
        x, weight = self._operands(input)
        layer: Any = self
        if not is_armed(self.arming):
            return layer._conv_forward(x, weight, self.bias)
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        return F.conv(
            x,
            weight,
            self.bias,
            stride=layer.stride,
            padding=padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )


class _QConvTranspose(QuantizedLayer):
    """Forward pass of the transposed convolutions."""

    out_axis = 1
    _function: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the result of the torch twin at the current width."""
        layer: Any = self
        dimensions = len(layer.kernel_size)
        output_padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, dimensions, layer.dilation
        )
        x, weight = self._operands(input)
        if not is_armed(self.arming):
            function = type(self)._function
            return function(
                x,
                weight,
                self.bias,
                layer.stride,
                layer.padding,
                output_padding,
                layer.groups,
                layer.dilation,
            )
        return F.conv_transpose(
            x,
            weight,
            self.bias,
            stride=layer.stride,
            padding=layer.padding,
            output_padding=output_padding,
            groups=layer.groups,
            dilation=layer.dilation,
        )


class _QLinear(QuantizedLayer):
    """Forward pass of the linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias`` at the current width."""
        x, weight = self._operands(input)
        function = F.linear if is_armed(self.arming) else nn.functional.linear
        return function(x, weight, self.bias)


class _QEmbedding(QuantizedLayer):
    """Forward pass of the embedding, which quantizes only the weight."""

    has_site = False

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the weight with the indices ``input``, at the current width."""
        own: Any = self
        weight = self._quantized(self.weight)
        options = own.padding_idx, own.max_norm, own.norm_type, own.scale_grad_by_freq, own.sparse
        return nn.functional.embedding(input, weight, *options)


class QConv1d(_QConv, nn.Conv1d):
    """``nn.Conv1d`` that can be quantized on demand and differentiated twice.

    Args:
        *args: as for ``nn.Conv1d``.
        per_channel: quantize the weight with one range per output channel.
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

    With ``per_channel`` the weight has one range per index of its second axis, shared by the groups. See
    :class:`QConv1d`.
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

    With ``per_channel`` each row has its own range.
    """

    twin = nn.Embedding

    def __init__(self, *args: Any, per_channel: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_quantizers(per_channel)


LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    layer.twin: layer
    for layer in (
        *(QConv1d, QConv2d, QConv3d, QConvTranspose1d, QConvTranspose2d, QConvTranspose3d),
        *(QLinear, QEmbedding),
    )
}
