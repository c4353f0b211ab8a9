"""tap computed by the extension."""

from __future__ import annotations

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


def tap_backward(dy: Tensor) -> Tensor:
    """Return ``l1 = sum |dy|``."""
    if not dy.numel():
        return reference.tap_backward(dy)
    dy, l1 = dense(dy), new_vector(dy)
    room = scratch(dy, layout(dy, None))
    engine_for(dy).tap_backward(where(dy), DTYPES[dy.dtype], dy.numel(), span(dy), span(l1), span(room))
    return l1


def tap_double_backward(d_dx: Tensor | None, d_l1: Tensor | None, dy: Tensor) -> Tensor:
    """Return ``d_dy = d_dx + d_l1 * sign(dy)``."""
    if not dy.numel() or d_l1 is None:
        return reference.tap_double_backward(d_dx, d_l1, dy)
    dy, out = dense(dy), torch.empty_like(dy)
    d_dx, d_l1 = None if d_dx is None else beside(d_dx, dy), vector(d_l1, dy)
    engine_for(dy).tap_double_backward(
        where(dy), DTYPES[dy.dtype], dy.numel(), span(d_dx), span(d_l1), span(dy), span(out)
    )
    return out
