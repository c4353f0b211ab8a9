"""fake_quantize computed by the extension."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.backends import reference
from gradl1_fast.backends.compiled._tensors import (
    Settings,
    beside,
    dense,
    new_vector,
    run,
    scratch,
    settings_of,
    vector,
)
from gradl1_fast.backends.reference._tensors import absent


def fake_quantize_forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None
) -> Tensor:
    """Return ``s * (clamp(rint(x / s) + z, q_min, q_max) - z)``."""
    if not x.numel():
        return torch.empty_like(x)
    x, y = dense(x), torch.empty_like(x)
    settings, qparams = _settings(x, q_min, q_max, axis), _qparams(x, scale, zero_point)
    run("fake_quantize_forward", x, settings, x=x, y=y, **qparams, scratch=scratch(x, settings))
    return y


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
    """Return ``dx = mask * dy``, the mask being 1 where the code was not clamped, and ``l1 = sum |dy|``."""
    if not x.numel():
        return reference.fake_quantize_backward(dy, x, scale, zero_point, q_min, q_max, axis, with_l1)
    x = dense(x)
    dx, l1 = torch.empty_like(x), new_vector(x) if with_l1 else None
    settings, qparams = _settings(x, q_min, q_max, axis), _qparams(x, scale, zero_point)
    run(
        "fake_quantize_backward", x, settings,
        dy=beside(dy, x), x=x, **qparams, dx=dx, l1=l1, scratch=scratch(x, settings),
    )  # fmt: skip
    return dx, absent(dy) if l1 is None else l1


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
    v, d_dy = None if d_dx is None else beside(d_dx, x), torch.empty_like(x)
    settings, qparams = _settings(x, q_min, q_max, axis), _qparams(x, scale, zero_point)
    run(
        "fake_quantize_double_backward", x, settings,
        d_dx=v, d_l1=vector(d_l1, x), dy=beside(dy, x), x=x, **qparams, d_dy=d_dy,
        scratch=scratch(x, settings),
    )  # fmt: skip
    return d_dy


def _settings(x: Tensor, q_min: int, q_max: int, axis: int | None) -> Settings:
    return settings_of(x, axis, code_min=q_min, code_max=q_max)


def _qparams(x: Tensor, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor | None]:
    """Return one value for each channel in the type of the sums."""
    return {"scale": vector(scale, x), "zero_point": vector(zero_point, x)}
