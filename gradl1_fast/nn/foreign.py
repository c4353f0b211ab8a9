"""Twins of foreign layers: subclasses of convolutions and linear layers, and transformers' Conv1D.

A twin is a subclass of the foreign class, created on demand. A ``forward`` that the class defines itself
(weight standardisation, "same" padding) is run unchanged, except that the weight it passes to a convolution
or a matrix product is replaced by the quantized weight. The weight is thus quantized as the forward pass
uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from gradl1_fast import functional as F
from gradl1_fast.nn import layers
from gradl1_fast.nn.arming import Arming, is_armed
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.second_pass import random_state_kept
from gradl1_fast.nn.sharing import pass_through
from gradl1_fast.nn.twins import retype

__all__ = ["Product", "foreign_twin", "is_conv1d_of_transformers", "product_in", "used_weight"]

_functional = nn.functional
_Products = dict[Callable[..., Any], Callable[..., Any] | None]

# The functions that a layer's forward pass may call with a weight as the second argument, and their twice
# differentiable form.
_CONVOLUTIONS: _Products = dict.fromkeys(
    (_functional.conv1d, _functional.conv2d, _functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
    F.conv,
)
_TRANSPOSED: _Products = dict.fromkeys(
    (_functional.conv_transpose1d, _functional.conv_transpose2d, _functional.conv_transpose3d)
)  # their own second derivative is exact, but slow
_PRODUCTS: _Products = {**_CONVOLUTIONS, **_TRANSPOSED, _functional.linear: F.linear}
_BASES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: layers._QConv,
    nn.Conv2d: layers._QConv,
    nn.Conv3d: layers._QConv,
    nn.ConvTranspose1d: layers._QConvTranspose,
    nn.ConvTranspose2d: layers._QConvTranspose,
    nn.ConvTranspose3d: layers._QConvTranspose,
    nn.Linear: layers._QLinear,
    nn.Embedding: layers._QEmbedding,
}


_OF_EVERY_CLASS = ("__dict__", "__weakref__", "__module__", "__doc__")
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class _Found(Exception):  # noqa: N818  # ends a forward pass early; no error
    """Raised to end a forward pass; carries the arguments of its first product."""


@dataclass(frozen=True)
class Product:
    """The operand by which a layer multiplies its weight.

    Attributes:
        x: the input of the product, quantized by its site and padded if the layer pads it itself.
        kernel: the kernel size of a convolution; ``()`` for a linear layer, where ``x`` is ``(*, in)``.
        options: the stride, padding, dilation and groups that were passed to a convolution.
    """

    x: Tensor
    kernel: tuple[int, ...]
    options: Mapping[str, Any]


class _Stop(TorchFunctionMode):
    """Ends a forward pass at its first convolution or linear function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {**dict(zip(_NAMES, args, strict=False)), **(kwargs or {})}
        if func is _functional.linear:
            raise _Found(Product(named["input"], (), {}))
        if func in _CONVOLUTIONS:
            options = {key: named[key] for key in _NAMES[3:] if key in named}
            raise _Found(Product(named["input"], tuple(named["weight"].shape[2:]), options))
        return func(*args, **(kwargs or {}))


class _Weights(TorchFunctionMode):
    """Replaces the weight of each product in a layer's forward pass."""

    def __init__(self, replace: Callable[[Tensor], Tensor], armed: bool) -> None:
        super().__init__()
        self._replace, self._armed = replace, armed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        if len(args) > 1:
            args = args[0], self._replace(args[1]), *args[2:]
        else:
            kwargs = {**kwargs, "weight": self._replace(kwargs["weight"])}
        ours = _PRODUCTS[func] if self._armed else None
        return func(*args, **kwargs) if ours is None else _twice_differentiable(ours, *args, **kwargs)


def _twice_differentiable(
    function: Callable[..., Any], input: Tensor, weight: Tensor, *values: Any, **options: Any
) -> Any:
    names = ("bias", "stride", "padding", "dilation", "groups")
    return function(input, weight, **dict(zip(names, values, strict=False)), **options)


class _Foreign(QuantizedLayer):
    """Runs the forward pass of the foreign class on the output of the site, with the quantized weight."""

    computes_weight: bool

    def to_float(self) -> nn.Module:
        """Return the foreign layer with the same parameters, hooks and mode."""
        layer = super().to_float()
        del layer.computes_weight
        return layer

    @property
    def is_computed(self) -> bool:
        """Whether the weight is computed from parameters rather than being a parameter."""
        return self.computes_weight or super().is_computed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the foreign layer at the current width."""
        name = self.input_name()
        if args:
            args = pass_through(self, args[0]), *args[1:]
        elif name in kwargs:
            kwargs[name] = pass_through(self, kwargs[name])
        armed = is_armed(self.arming)
        if not armed and self.weight_quantizer.bits is None:
            self.was_called = True
            return super().forward(*args, **kwargs)
        with _Weights(self._quantized, armed):
            return super().forward(*args, **kwargs)


class _Conv1D(QuantizedLayer):
    """Forward pass of transformers' Conv1D: a linear layer whose weight is transposed."""

    out_axis = 1

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight + bias`` at the current width."""
        x, weight = self._operands(x)
        if is_armed(self.arming):
            return F.linear(x, weight.t(), self.bias)
        size = *x.shape[:-1], weight.shape[1]
        layer: Any = self
        return torch.addmm(layer.bias, x.view(-1, x.size(-1)), weight).view(size)


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Return whether a module is the transposed linear layer used by GPT-2 and similar models."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def foreign_twin(module: nn.Module, *, per_channel: bool, arming: Arming) -> QuantizedLayer | None:
    """Return a twin with the parameters, hooks and mode of a foreign layer; None if it is not supported."""
    foreign: Any = type(module)
    cls = _twin_class(foreign)
    if cls is None:
        return None
    layer = retype(module, type(module), cls)
    layer._add_quantizers(per_channel, arming)
    if isinstance(layer, _Foreign):
        try:
            with parametrize.cached():  # each look at a parametrized weight is another tensor otherwise
                layer.computes_weight = _weight_in_use(layer) is not layer.weight
        except Exception:  # a foreign forward pass may raise anything; the layer is then not supported
            return None
    return layer


@functools.cache
def _twin_class(foreign: type[nn.Module]) -> type[QuantizedLayer] | None:
    attributes: dict[str, Any] = {
        "twin": foreign,
        "__module__": foreign.__module__,
        "__reduce_ex__": _reduce,
        "__doc__": f"``{foreign.__name__}`` that can be quantized on demand and differentiated twice.",
    }
    original = _original_of(foreign)
    if original is not None:  # as PyTorch does, so that the parametrization can be removed
        of_class: Any = original
        inner = layers.LAYERS.get(original) or _twin_class(of_class)
        own = {name: value for name, value in vars(foreign).items() if name not in _OF_EVERY_CLASS}
        return inner and type(f"Parametrized{inner.__name__}", (inner,), {**own, **attributes})
    base = _base_of(foreign)
    if base is None:
        return None
    if base is _Foreign and issubclass(foreign, nn.modules.conv._ConvTransposeNd):
        attributes["out_axis"] = 1
    return type(f"Q{foreign.__name__}", (base, foreign), attributes)


def _original_of(foreign: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class from which ``torch.nn.utils.parametrize`` made a class; None for another one."""
    is_made = foreign.__name__.startswith("Parametrized") and len(foreign.__bases__) == 1
    has_tensors = any(isinstance(value, property) for value in vars(foreign).values())
    return foreign.__bases__[0] if is_made and has_tensors else None


def _base_of(foreign: type[nn.Module]) -> type[QuantizedLayer] | None:
    if foreign.__name__ == "Conv1D" and foreign.__module__ == "transformers.pytorch_utils":
        return _Conv1D
    for twin, base in _BASES.items():
        if issubclass(foreign, twin):
            same = foreign.forward is twin.forward and getattr(foreign, "_conv_forward", None) is getattr(
                twin, "_conv_forward", None
            )
            return base if same else None if twin is nn.Embedding else _Foreign
    return None


def _reduce(self: QuantizedLayer, protocol: int) -> Any:
    """Pickle by the foreign class, from which the twin is re-created."""
    return _rebuild, (self.twin,), self.__getstate__()


def _rebuild(foreign: type[nn.Module]) -> nn.Module:
    of_class: Any = foreign
    cls = _twin_class(of_class)
    assert cls is not None
    return cls.__new__(cls)


def used_weight(layer: QuantizedLayer) -> Tensor:
    """Return the weight as the layer's forward pass uses it, detached.

    For a foreign layer, it is found by a forward pass of zeros, which ends at the first product.

    Raises:
        RuntimeError: the layer calls no convolution and no linear function.
    """
    with torch.no_grad():
        return (_weight_in_use(layer) if isinstance(layer, _Foreign) else layer.weight).detach()


def _weight_in_use(layer: QuantizedLayer) -> Tensor:
    def found(weight: Tensor) -> Tensor:
        raise _Found(weight)

    forward: Any = layer.twin.forward
    try:
        with random_state_kept(), _Weights(found, armed=False):
            forward(layer, _small_input(layer))
    except _Found as result:
        return result.args[0]
    raise RuntimeError(f"{type(layer).__name__} calls no convolution and no linear function with a weight")


def product_in(layer: QuantizedLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product:
    """Return the operand by which a layer multiplies its weight when it is called with these arguments.

    The forward pass runs up to the product.

    Raises:
        RuntimeError: the layer calls no convolution and no linear function.
    """
    if isinstance(layer, _Conv1D):
        return Product(pass_through(layer, args[0] if args else kwargs["x"]), (), {})
    try:
        with _Stop(), torch.no_grad():
            layer.forward(*args, **kwargs)
    except _Found as result:
        return result.args[0]
    raise RuntimeError(f"{type(layer).__name__} calls no convolution and no linear function with a weight")


def _small_input(layer: Any) -> Tensor:
    like = next(layer.parameters())
    if isinstance(layer, nn.Linear):
        return like.new_zeros(1, layer.in_features)
    sizes = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return like.new_zeros(1, layer.in_channels, *sizes)
