"""Convolution and transposed convolution in 1, 2 and 3 dimensions, with fprop, dgrad and wgrad only.

A convolution is linear in its input and in its weight, so each of its gradients is one of three routines:
fprop (input and weight to output), dgrad (output gradient and weight to input gradient) and wgrad (input and
output gradient to weight gradient). The gradients of these routines are the same three routines. PyTorch's
double backward computes the weight gradient as a forward convolution with a filter of the size of the image;
this module uses wgrad. The same holds for transposed convolutions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradl1_fast.backends.reference._tensors import absent


class _Geometry(NamedTuple):
    """The arguments of ``torch.convolution`` that are not tensors, in order."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return ``y = fprop(x, weight) + bias``."""
    return _fprop(x, weight, bias, _plain(stride, padding, dilation, groups))


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return ``dx = dgrad(dy, weight)`` and ``dweight = wgrad(x, dy)``, each if requested by the mask."""
    return _backward(dy, x, weight, _plain(stride, padding, dilation, groups), output_mask)


def conv_double_backward(
    d_dx: Tensor | None,
    d_dweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``d_dy, d_x, d_weight``, each if requested by the mask.

    ``d_dy = fprop(d_dx, weight) + fprop(x, d_dweight)``, ``d_x = dgrad(dy, d_dweight)``,
    ``d_weight = wgrad(d_dx, dy)``.
    """
    geometry = _plain(stride, padding, dilation, groups)
    return _double_backward(d_dx, d_dweight, dy, x, weight, geometry, output_mask)


def conv_transpose_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """Return ``y = fprop(x, weight) + bias`` of the transposed convolution."""
    return _fprop(x, weight, bias, _Geometry(stride, padding, dilation, True, output_padding, groups))


def conv_transpose_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return ``dx`` and ``dweight``, see :func:`conv_backward`."""
    geometry = _Geometry(stride, padding, dilation, True, output_padding, groups)
    return _backward(dy, x, weight, geometry, output_mask)


def conv_transpose_double_backward(
    d_dx: Tensor | None,
    d_dweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``d_dy, d_x, d_weight``, see :func:`conv_double_backward`."""
    geometry = _Geometry(stride, padding, dilation, True, output_padding, groups)
    return _double_backward(d_dx, d_dweight, dy, x, weight, geometry, output_mask)


def _plain(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> _Geometry:
    return _Geometry(stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    dx = _dgrad(dy, x, weight, geometry) if output_mask[0] else absent(x)
    dweight = _wgrad(dy, x, weight, geometry) if output_mask[1] else absent(weight)
    return dx, dweight


def _double_backward(
    d_dx: Tensor | None,
    d_dweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: _Geometry,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    d_dy, d_x, d_weight = absent(dy), absent(x), absent(weight)
    if output_mask[0]:
        terms = [_fprop(d_dx, weight, None, geometry)] if d_dx is not None else []
        terms += [_fprop(x, d_dweight, None, geometry)] if d_dweight is not None else []
        d_dy = torch.zeros_like(dy) if not terms else terms[0] if len(terms) == 1 else terms[0].add_(terms[1])
    if output_mask[1]:
        d_x = torch.zeros_like(x) if d_dweight is None else _dgrad(dy, x, d_dweight, geometry)
    if output_mask[2]:
        d_weight = torch.zeros_like(weight) if d_dx is None else _wgrad(dy, d_dx, weight, geometry)
    return d_dy, d_x, d_weight


def _fprop(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    return torch.ops.aten.convolution(x, weight, bias, *geometry)


def _dgrad(dy: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, [True, False, False])[0]


def _wgrad(dy: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, [False, True, False])[1]
