"""fake_quantize computed by the extension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradl1_fast.backends import reference
from gradl1_fast.backends.compiled._tensors import (
    DTYPES,
    beside,
    dense,
    engine_for,
    layout,
    new_vector,
    scratch,
    span,
    vector,
    where,
)
from gradl1_fast.backends.reference._tensors import absent, in_layout_of


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None
) -> Tensor:
    """Return ``s * (clamp(rint(x / s) + z, q_min, q_max) - z)``."""
    if not x.numel():
        return torch.empty_like(x)
    x, out = dense(x), torch.empty_like(x)
    scale, zero_point = _along(scale, x), _along(zero_point, x)
    call = _Call(x, scale, zero_point, q_min, q_max, axis)
    call.engine.fake_quantize_forward(*call.head, span(x), span(out), span(call.scratch))
    return out


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
    if not x.numel():
        return reference.fake_quantize_backward(dy, x, scale, zero_point, q_min, q_max, axis, with_l1)
    x = dense(x)
    l1 = new_vector(x) if with_l1 else None
    out, g = torch.empty_like(x), beside(dy, x)
    scale, zero_point = _along(scale, x), _along(zero_point, x)
    call = _Call(x, scale, zero_point, q_min, q_max, axis)
    call.engine.fake_quantize_backward(*call.head, span(g), span(x), span(out), span(l1), span(call.scratch))
    return out, absent(dy) if l1 is None else l1


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
    if not x.numel() or (d_dx is None and d_l1 is None):
        return reference.fake_quantize_double_backward(
            d_dx, d_l1, dy, x, scale, zero_point, q_min, q_max, axis
        )
    x = dense(x)
    g, v, c = beside(dy, x), None if d_dx is None else beside(d_dx, x), vector(d_l1, x)
    out = torch.empty_like(x)
    scale, zero_point = _along(scale, x), _along(zero_point, x)
    call = _Call(x, scale, zero_point, q_min, q_max, axis)
    call.engine.fake_quantize_double_backward(
        *call.head, span(v), span(c), span(g), span(x), span(out), span(call.scratch)
    )
    return in_layout_of(out, dy)


class _Call:
    """Arguments common to the passes. Keeps the scratch memory alive, but not the tensors."""

    def __init__(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None
    ) -> None:
        sizes = layout(x, axis)
        grid = (span(scale), span(zero_point), q_min, q_max)
        self.engine: Any = engine_for(x)
        self.head = (where(x), DTYPES[x.dtype], sizes, grid)
        self.scratch = scratch(x, sizes)


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Return one value per channel, in the type of sums."""
    along = vector(values, x)
    assert along is not None
    return along
