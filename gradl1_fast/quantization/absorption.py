"""The arithmetic of folding: a layer takes in the affine map of a batch norm, which then maps nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradl1_fast.nn.codes import along
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.twins import shallow_copy

__all__ = ["Absorption", "along_outputs", "is_batch_norm", "is_neutral"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NEUTRAL = {"running_mean": 0.0, "running_var": 1.0, "weight": 1.0, "bias": 0.0}
_IS_NEUTRAL = "was_folded"  # in the table of a batch norm
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm: PyTorch's, a subclass, or a frozen one made of buffers."""
    return isinstance(module, _BatchNorm) or is_frozen(module)


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module is a batch norm whose parameters are buffers, as in torchvision's detectors."""
    named = type(module).__name__.startswith("FrozenBatchNorm") and hasattr(module, "eps")
    return named and module._buffers.keys() >= _NEUTRAL.keys()


def is_neutral(module: nn.Module) -> bool:
    """Return whether a batch norm maps every value to itself, since a layer has taken its map in."""
    return _IS_NEUTRAL in vars(module)


class Absorption:
    """What a batch norm's map does to a layer.

    Args:
        norm: a batch norm with running statistics.
        layer: the layer before it.

    Attributes:
        rest: what stands in the place of the batch norm afterwards.
    """

    def __init__(self, norm: Any, layer: QuantizedLayer) -> None:
        self._norm, self._layer = norm, layer
        self._factor = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            self._factor = self._factor * norm.weight.detach().double()
        self._shift = -norm.running_mean.double() * self._factor
        if norm.bias is not None:
            self._shift = self._shift + norm.bias.detach().double()
        self.rest = nn.Identity().train(norm.training) if type(norm) in _PLAIN else _neutral(norm)

    @torch.no_grad()
    def reason_against(self) -> str | None:
        """Return why the map cannot be taken in, or None."""
        if type(self._norm) not in _PLAIN and not self._is_map_and_rest():
            return "computes more than a batch norm before what follows it"
        return None

    @torch.no_grad()
    def apply(self) -> bool:
        """Give the layer a weight and a bias of its own; return False if it lost a stored range."""
        layer = self._layer
        bias = self._shift
        if layer.bias is not None:
            bias = bias + layer.bias.detach().double() * self._factor
        weight, requires_grad = layer.weight.detach(), layer.weight.requires_grad
        layer.weight = _parameter(
            weight.double() * along_outputs(self._factor, layer, weight), weight, requires_grad
        )
        layer.bias = _parameter(bias, weight, requires_grad)
        return self._scale_range()

    @torch.no_grad()
    def applies(self) -> bool:
        """Return whether a layer with a forward pass of its own uses the bias that it gets."""
        scratch: Any = shallow_copy(self._layer)
        x = _example_of(scratch)
        expected = self._mapped(scratch(x))
        absorption = Absorption(self._norm, scratch)
        scratch.weight_quantizer = shallow_copy(scratch.weight_quantizer)
        absorption.apply()
        return _are_close(scratch(x), expected)

    def _mapped(self, y: Tensor) -> Tensor:
        return (y.double() * along(self._factor, y, 1) + along(self._shift, y, 1)).to(y.dtype)

    def _scale_range(self) -> bool:
        quantizer = self._layer.weight_quantizer
        clip = quantizer.clip
        if clip is None:
            return True
        shared = self._layer.out_axis != 0 and getattr(self._layer, "groups", 1) > 1
        fits = quantizer.axis is not None and not shared
        quantizer.set_clip((clip * self._factor.abs()).to(clip.dtype) if fits else None)
        return fits

    def _is_map_and_rest(self) -> bool:
        """Return whether the batch norm is its map and then the rest, on random values."""
        generator = torch.Generator().manual_seed(0)
        like = self._norm.running_mean
        for dimensions in (4, 3, 2, 5):
            shape = 2, len(like), *[4] * (dimensions - 2)
            x = torch.randn(shape, generator=generator).to(like)
            try:
                return _are_close(self.rest(self._mapped(x)), self._norm(x))
            except Exception:  # it takes another number of dimensions, or is of no known kind
                continue
        return False


def along_outputs(factor: Tensor, layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Return a factor for each output channel in a shape that broadcasts against the weight."""
    axis, groups = layer.out_axis, getattr(layer, "groups", 1)
    if axis == 0 or groups == 1:
        return along(factor, weight, axis)
    # A transposed convolution: the rows of a group have the output channels of that group.
    rows = factor.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))


def _neutral(norm: nn.Module) -> nn.Module:
    """Return a copy of a batch norm that maps every value to itself; what else it does, it does."""
    copy: Any = shallow_copy(norm)
    for name, value in _NEUTRAL.items():
        old = getattr(norm, name)
        if isinstance(old, nn.Parameter):
            setattr(copy, name, nn.Parameter(torch.full_like(old, value), requires_grad=old.requires_grad))
        elif old is not None:
            setattr(copy, name, torch.full_like(old, value))
    if getattr(norm, "num_batches_tracked", None) is not None:
        copy.num_batches_tracked = copy.num_batches_tracked.clone()
    copy.eps = 0.0
    vars(copy)[_IS_NEUTRAL] = True
    return copy


def _parameter(value: Tensor, like: Tensor, requires_grad: bool) -> nn.Parameter:
    value = value.to(like.dtype)
    if like.dim() == value.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        value = value.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(value, requires_grad=requires_grad)


def _example_of(layer: Any) -> Tensor:
    """Return random values that a convolution or linear layer can take."""
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] = (2, getattr(layer, "in_features", 0))
    if not shape[1]:
        shape = (
            2,
            layer.in_channels,
            *(d * k + 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)),
        )
    return torch.randn(shape, generator=generator).to(layer.weight)


def _are_close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    scale = float(other.abs().max()) if other.numel() else 1.0
    return bool((one - other).abs().max() <= _CLOSE.get(one.dtype, 2e-2) * max(scale, 1e-6))
