"""tap computed by the extension."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.backends import reference
from gradl1_fast.backends.compiled._tensors import (
    beside,
    dense,
    new_vector,
    run,
    scratch,
    settings_of,
    vector,
)


def tap_backward(dy: Tensor) -> Tensor:
    """Return ``l1 = sum |dy|``."""
    if not dy.numel():
        return reference.tap_backward(dy)
    dy, l1 = dense(dy), new_vector(dy)
    settings = settings_of(dy, None)
    run("tap_backward", dy, settings, dy=dy, l1=l1, scratch=scratch(dy, settings))
    return l1


def tap_double_backward(d_dx: Tensor | None, d_l1: Tensor | None, dy: Tensor) -> Tensor:
    """Return ``d_dy = d_dx + d_l1 * sign(dy)``."""
    if not dy.numel() or d_l1 is None:
        return reference.tap_double_backward(d_dx, d_l1, dy)
    dy, d_dy = dense(dy), torch.empty_like(dy)
    d_dx, d_l1 = None if d_dx is None else beside(d_dx, dy), vector(d_l1, dy)
    run("tap_double_backward", dy, settings_of(dy, None), d_dx=d_dx, d_l1=d_l1, dy=dy, d_dy=d_dy)
    return d_dy
