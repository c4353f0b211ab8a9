"""The arithmetic of folding: a layer absorbs the affine map of a batch norm, which becomes the identity."""

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
_IS_NEUTRAL = "was_folded"  # attribute of a batch norm
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm of PyTorch, a subclass, or a frozen one made of buffers."""
    return isinstance(module, _BatchNorm) or is_frozen(module)


def is_frozen(module: nn.Module) -> bool:
    """Return whether a module is a batch norm whose parameters are buffers, as in torchvision's detectors."""
    named = type(module).__name__.startswith("FrozenBatchNorm") and hasattr(module, "eps")
    return named and module._buffers.keys() >= _NEUTRAL.keys()


def is_neutral(module: nn.Module) -> bool:
    """Return whether a batch norm is the identity because a layer has absorbed it."""
    return _IS_NEUTRAL in vars(module)


class Absorption:
    """The effect of a batch norm's map on the preceding layer.

    Args:
        norm: a batch norm with running statistics.
        layer: the layer before it.

    Attributes:
        rest: the module that replaces the batch norm.
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
        """Return why the layer cannot absorb the map, or None."""
        if type(self._norm) not in _PLAIN and not self._is_map_and_rest():
            return "computes more than a batch norm before what follows it"
        return None

    @torch.no_grad()
    def apply(self) -> bool:
        """Give the layer a new weight and bias; return False if a stored range was dropped."""
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
        """Return whether a layer with a custom forward pass uses the bias that it is given."""
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
        """Return whether the batch norm equals its map followed by the rest, on random values."""
        generator = torch.Generator().manual_seed(0)
        like = self._norm.running_mean
        for dimensions in (4, 3, 2, 5):
            shape = 2, len(like), *[4] * (dimensions - 2)
            x = torch.randn(shape, generator=generator).to(like)
            try:
                return _are_close(self.rest(self._mapped(x)), self._norm(x))
            except Exception:  # other number of dimensions, or unsupported
                continue
        return False


def along_outputs(factor: Tensor, layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Return a factor per output channel, in a shape that broadcasts against the weight."""
    axis, groups = layer.out_axis, getattr(layer, "groups", 1)
    if axis == 0 or groups == 1:
        return along(factor, weight, axis)
    # In a transposed convolution, the rows of a group hold the output channels of that group.
    rows = factor.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return rows.reshape(*rows.shape, *[1] * (weight.dim() - 2))


def _neutral(norm: nn.Module) -> nn.Module:
    """Return a copy of a batch norm whose affine map is the identity."""
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
    """Return random input for a convolution or linear layer."""
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...] = (2, getattr(layer, "in_features", 0))
    if not shape[1]:
        shape = (
            2,
            layer.in_channels,
            *(d * k + 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)),
        )
    return torch.randn(shape, generator=generator).to(layer.weight)


def _are_close(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.shape != second.shape:
        return False
    scale = float(second.abs().max()) if second.numel() else 1.0
    return bool((first - second).abs().max() <= _CLOSE.get(first.dtype, 2e-2) * max(scale, 1e-6))
