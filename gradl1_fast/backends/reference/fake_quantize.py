"""Fake quantization with the straight-through estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.backends.reference._tensors import (
    absent,
    add_l1_gradient,
    in_layout_of,
    l1,
    widen,
)


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None
) -> Tensor:
    """Return ``s * (clamp(rint(x / s) + z, q_min, q_max) - z)``; clamping happens in floating point."""
    s, z = _along(scale, x, axis), _along(zero_point, x, axis)
    return in_layout_of((_codes(x, s, z).clamp_(q_min, q_max) - z).mul_(s), x)


def fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    q_min: int,
    q_max: int,
    axis: int | None,
    with_l1: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``dx = dy`` where the code was not clamped and 0 elsewhere, and ``l1 = sum |dy|``."""
    dx = torch.where(unclamped(x, scale, zero_point, q_min, q_max, axis), dy, 0)
    return in_layout_of(dx, x), l1(dy) if with_l1 else absent(dy)


def fake_quantize_double_backward(
    d_dx: Tensor | None,
    d_l1: Tensor | None,
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    q_min: int,
    q_max: int,
    axis: int | None,
) -> Tensor:
    """Return ``d_dy = mask * d_dx + d_l1 * sign(dy)``."""
    d_dy = None
    if d_dx is not None:
        d_dy = torch.where(unclamped(x, scale, zero_point, q_min, q_max, axis), d_dx, 0)
    return add_l1_gradient(d_dy, d_l1, dy, x)


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return per-tensor or per-channel ``values`` in a shape that broadcasts against ``x``."""
    values = values.to(sum_dtype(x.dtype))
    if axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _codes(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
    return (widen(x) / s).round_().add_(z)


def unclamped(
    x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None
) -> Tensor:
    """Return the mask of values of ``x`` whose code is not clamped."""
    codes = _codes(x, _along(scale, x, axis), _along(zero_point, x, axis))
    return (codes >= q_min) & (codes <= q_max)
