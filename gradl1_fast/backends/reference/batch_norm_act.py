"""Batch normalisation with an optional residual, an activation and fake quantization: the three passes.

With ``xh = (x - mean) * rstd``, the gradient is ``dx = N(g) = gamma * rstd * (g - A/M - xh * B/M)`` for the
per-channel sums ``A = sum g`` and ``B = sum g * xh`` over M values. N is symmetric, so the gradient with
respect to ``g`` is N applied to the incoming ``d_dx``, and PyTorch's first-order routine computes both. The
gradient with respect to x has the closed form of `_normalisation.d_x_training`.

Fake quantization passes the gradient where the code was not clamped. This multiplies the mask between ``dy``
and ``g`` by another factor. The l1 term still measures ``dy``, the gradient at the quantizer's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast._masks import is_masked
from gradl1_fast.backends.reference._normalisation import (
    affine,
    column,
    d_x_training,
    normalise_backward,
    sums,
)
from gradl1_fast.backends.reference._tensors import absent, add_l1_gradient, in_layout_of, l1, widen
from gradl1_fast.backends.reference.fake_quantize import fake_quantize_forward, unclamped


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
    """Return ``y = q(act(norm(x) * weight + bias + residual))``, ``activated``, mean and 1/std.

    q is per-tensor fake quantization; without a ``scale`` it is the identity. ``activated`` is the input of
    q if later passes cannot recompute it from ``x``, that is with a scale and a residual; otherwise it is
    absent. Mean and 1/std are per channel: those of the batch in training (biased variance), and the running
    ones otherwise.
    """
    wide = widen(x)
    weight, bias = _widen(weight), _widen(bias)
    if not x.numel():
        # PyTorch's routines below divide by the number of values.
        mask_source = absent(x) if scale is None or residual is None else torch.empty_like(x)
        return torch.empty_like(x), mask_source, wide.new_zeros(x.shape[1]), wide.new_ones(x.shape[1])
    if training:
        z, mean, rstd = torch.native_batch_norm(wide, weight, bias, None, None, True, 0.0, eps)
    else:
        assert running_mean is not None  # checked by functional.batch_norm_act
        assert running_var is not None
        # A copy, because an operator must not return its argument.
        mean, rstd = widen(running_mean).clone(), (widen(running_var) + eps).rsqrt()
        if scale is None:
            z = torch.native_batch_norm(wide, weight, bias, mean, widen(running_var), False, 0.0, eps)[0]
        else:
            z = _renormalised(wide, weight, bias, mean, rstd)  # the mask needs bitwise equal values
    if residual is not None:
        z.add_(residual)
    activated = in_layout_of(_activate_(z, activation), x)
    if scale is None:
        return activated, absent(x), mean, rstd
    assert zero_point is not None  # checked by functional.batch_norm_act
    y = fake_quantize_forward(activated, scale, zero_point, q_min, q_max, None)
    return y, absent(x) if residual is None else activated, mean, rstd


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
    """Return ``dx, dweight, dbias, dresidual, l1`` with ``l1 = sum |dy|``.

    ``dresidual`` and ``l1`` are absent if not requested. ``dresidual`` is also absent without activation and
    scale, where it equals ``dy``. ``activated`` determines the mask. It is the result of the forward pass
    with that name or, without a scale, ``y``, which the next operation saves anyway; it is None if that
    result was absent and if there is no mask. With ``bias`` a kernel can recompute the mask from ``x``
    instead.
    """
    wide = widen(x)
    vectors, grid = (weight, bias, mean, rstd), (scale, zero_point, q_min, q_max)
    activated, within = _mask(activated, wide, vectors, grid, activation, x.dtype)
    g = _masked(_dense(dy, wide), activated, within, activation)
    dx, dweight, dbias = normalise_backward(g, wide, weight, mean, rstd, training)
    masked_residual = with_residual and is_masked(activation, scale)
    return (
        in_layout_of(dx, x),
        dweight,
        dbias,
        in_layout_of(g, x) if masked_residual else absent(x),
        l1(dy) if with_l1 else absent(mean),
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
    """Return ``d_dy, d_x, d_weight`` for the cotangents of the five results of the backward.

    ``with_residual`` tells a kernel whether it can recompute the mask from ``x``.
    """
    wide = widen(x)
    vectors, grid = (weight, bias, mean, rstd), (scale, zero_point, q_min, q_max)
    activated, within = _mask(activated, wide, vectors, grid, activation, x.dtype)
    g = _masked(_dense(dy, wide), activated, within, activation)
    v = torch.zeros_like(wide) if d_dx is None else _dense(d_dx, wide)
    d_g, q, p = normalise_backward(v, wide, weight, mean, rstd, training)
    s = sums(g, v, torch.zeros_like(mean), torch.ones_like(rstd))[0]
    direct = None if d_dweight is None else d_dweight * rstd
    if training:
        d_x, d_weight = d_x_training(wide, g, v, (_widen(weight), mean, rstd, direct), (p, q, s))
    else:
        d_x = torch.zeros_like(g) if direct is None else g * column(direct, x)
        d_weight = rstd * s
    if d_dweight is not None:
        d_g.addcmul_(wide - column(mean, x), column(d_dweight * rstd, x))
    for term in (None if d_dbias is None else column(d_dbias, x), d_dresidual):
        if term is not None:
            d_g.add_(term)
    d_dy = add_l1_gradient(_masked(d_g, activated, within, activation, into=d_g), d_l1, dy, x)
    return d_dy, in_layout_of(d_x, x), d_weight


def _activate_(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return z.relu_()
    return z.clamp_(0, 6) if activation == "relu6" else z


def _mask(
    activated: Tensor | None,
    x: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor, Tensor],
    grid: tuple[Tensor | None, Tensor | None, int, int],
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the tensor that determines the activation's slope, and the mask of unclamped codes or None."""
    scale, zero_point, q_min, q_max = grid
    if scale is None:
        return activated, None
    assert zero_point is not None  # checked by functional.batch_norm_act
    if activated is None:
        weight, bias, mean, rstd = vectors
        z = _renormalised(x, _widen(weight), _widen(bias), mean, rstd)
        activated = _activate_(z, activation).to(dtype)  # rounded as when it was stored
    return activated, unclamped(activated, scale, zero_point, q_min, q_max, None)


def _renormalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Return the normalised values from the saved statistics, on a CPU bitwise equal to the forward pass.

    PyTorch's routine computes a factor and an offset per channel and applies them, as this function does.
    """
    factor, product = (rstd, mean * rstd) if weight is None else (rstd * weight, mean * weight * rstd)
    offset = -product if bias is None else bias - product
    return affine(x, factor, offset)


def _masked(
    g: Tensor,
    activated: Tensor | None,
    within: Tensor | None,
    activation: str,
    *,
    into: Tensor | None = None,
) -> Tensor:
    """Return ``g`` where the activation has slope 1 and the code was not clamped, and 0 elsewhere.

    The result may be written into ``into``.
    """
    g = g if within is None else torch.where(within, g, 0)
    if activation == "none" or activated is None:
        return g
    if activation == "relu6":
        return torch.where((activated > 0) & (activated < 6), g, 0)
    if into is not None:
        return torch.ops.aten.threshold_backward.grad_input(g, widen(activated), 0, grad_input=into)
    return torch.ops.aten.threshold_backward(g, widen(activated), 0)


def _widen(x: Tensor | None) -> Tensor | None:
    return None if x is None else widen(x)


def _dense(x: Tensor, like: Tensor) -> Tensor:
    return in_layout_of(x, like)
