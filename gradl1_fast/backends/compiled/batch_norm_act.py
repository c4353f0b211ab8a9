"""batch_norm_act computed by the extension.

The mask is recomputed from ``x``; ``activated`` is read only if a residual was added.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradl1_fast._masks import is_masked
from gradl1_fast.backends import reference
from gradl1_fast.backends.compiled._tensors import (
    DTYPES,
    Span,
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

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}


def batch_norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    q_min: int,
    q_max: int,
    training: bool,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``y = q(act(norm(x) * weight + bias + residual))``, ``activated``, mean and 1/std."""
    if not x.numel():
        return reference.batch_norm_act_forward(
            x, weight, bias, running_mean, running_var, residual, scale, zero_point, q_min, q_max,
            training, eps, activation,
        )  # fmt: skip
    x = dense(x)
    added = None if residual is None else beside(residual.expand_as(x), x)
    vectors = _vectors(x, *(None, None) if training else (running_mean, running_var), weight, bias)
    (scale, zero_point), y = _vectors(x, scale, zero_point), torch.empty_like(x)
    activated = None if added is None or scale is None else torch.empty_like(x)
    mean, rstd = new_vector(x, x.shape[1]), new_vector(x, x.shape[1])
    room, sizes = scratch(x, layout(x, 1)), layout(x, 1)
    engine_for(x).batch_norm_act_forward(
        where(x), DTYPES[x.dtype], sizes, _options(training, False, activation, eps), _spans(vectors),
        (span(scale), span(zero_point), q_min, q_max), span(x), span(added),
        _spans((y, activated, mean, rstd)), span(room),
    )  # fmt: skip
    return y, absent(x) if activated is None else activated, mean, rstd


def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    activated: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    q_min: int,
    q_max: int,
    training: bool,
    activation: str,
    with_residual: bool,
    with_l1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``dx, dweight, dbias, dresidual, l1`` with ``l1 = sum |dy|``."""
    if not x.numel():
        return reference.batch_norm_act_backward(
            dy, x, activated, weight, bias, mean, rstd, scale, zero_point, q_min, q_max,
            training, activation, with_residual, with_l1,
        )  # fmt: skip
    x = dense(x)
    masked_residual = with_residual and is_masked(activation, scale)
    g, mask = beside(dy, x), _mask_source(activated, x, masked_residual)
    vectors, (scale, zero_point) = _vectors(x, mean, rstd, weight, bias), _vectors(x, scale, zero_point)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    dresidual, l1 = None if mask is None else torch.empty_like(x), new_vector(x) if with_l1 else None
    results = _spans((dx, dweight, dbias, dresidual, l1))
    room, sizes = scratch(x, layout(x, 1)), layout(x, 1)
    engine_for(x).batch_norm_act_backward(
        where(x), DTYPES[x.dtype], sizes, _options(training, with_residual, activation), _spans(vectors),
        (span(scale), span(zero_point), q_min, q_max), span(g), span(x), span(mask), results, span(room),
    )  # fmt: skip
    return (
        dx,
        dweight,
        dbias,
        absent(x) if dresidual is None else dresidual,
        absent(mean) if l1 is None else l1,
    )


def batch_norm_act_double_backward(
    d_dx: Tensor | None,
    d_dweight: Tensor | None,
    d_dbias: Tensor | None,
    d_dresidual: Tensor | None,
    d_l1: Tensor | None,
    dy: Tensor,
    x: Tensor,
    activated: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    q_min: int,
    q_max: int,
    training: bool,
    activation: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``d_dy, d_x, d_weight`` for the cotangents of the five results of the backward."""
    masked_residual = with_residual and is_masked(activation, scale)
    if not x.numel() or (d_dresidual is not None and not masked_residual):
        return reference.batch_norm_act_double_backward(
            d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, x, activated, weight, bias, mean, rstd,
            scale, zero_point, q_min, q_max, training, activation, with_residual,
        )  # fmt: skip
    x = dense(x)
    g, mask = beside(dy, x), _mask_source(activated, x, masked_residual)
    v = torch.zeros_like(x) if d_dx is None else beside(d_dx, x)
    u = None if d_dresidual is None else beside(d_dresidual, x)
    cotangents = (v, vector(d_dweight, x), vector(d_dbias, x), u, vector(d_l1, x))
    vectors, (scale, zero_point) = _vectors(x, mean, rstd, weight, bias), _vectors(x, scale, zero_point)
    d_dy, d_x, d_weight = torch.empty_like(x), torch.empty_like(x), torch.empty_like(mean)
    room, sizes = scratch(x, layout(x, 1)), layout(x, 1)
    engine_for(x).batch_norm_act_double_backward(
        where(x), DTYPES[x.dtype], sizes, _options(training, with_residual, activation), _spans(vectors),
        (span(scale), span(zero_point), q_min, q_max), _spans(cotangents), span(g), span(x), span(mask),
        _spans((d_dy, d_x, d_weight)), span(room),
    )  # fmt: skip
    return in_layout_of(d_dy, dy), d_x, d_weight


def _mask_source(activated: Tensor | None, x: Tensor, masked_residual: bool) -> Tensor | None:
    """Return the output of the activation if the mask cannot be recomputed from ``x``."""
    return beside(activated, x) if activated is not None and masked_residual else None


def _options(training: bool, with_residual: bool, activation: str, eps: float = 0.0) -> tuple[object, ...]:
    return training, with_residual, ACTIVATIONS[activation], eps


def _vectors(x: Tensor, *vectors: Tensor | None) -> list[Tensor | None]:
    return [vector(v, x) for v in vectors]


def _spans(tensors: Iterable[Tensor | None]) -> tuple[Span | None, ...]:
    return tuple(map(span, tensors))
