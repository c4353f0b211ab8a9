"""Batch normalisation, an optional residual and an activation: forward, backward, double backward.

With ``xh = (x - mean) * rstd`` the first gradient is ``dx = N(g) = gamma * rstd * (g - A/M - xh * B/M)``
for the per-channel sums ``A = sum g``, ``B = sum g * xh`` over M values. N is symmetric, so the
gradient with respect to ``g`` is N again, applied to the incoming ``d_dx``: PyTorch's own first-order
routine serves both. The gradient with respect to x has the closed form of `_d_x_training`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.backends.reference._tensors import absent, add_l1_gradient, in_layout_of, l1, widen


def batch_norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``y = act(norm(x) * weight + bias + residual)`` with the mean and 1/std of each channel.

    In training they are the batch's (biased variance), otherwise the running ones.
    """
    wide = widen(x)
    weight, bias = _widen(weight), _widen(bias)
    if not x.numel():
        # PyTorch's routines below divide by the number of values.
        return torch.empty_like(x), wide.new_zeros(x.shape[1]), wide.new_ones(x.shape[1])
    if training:
        z, mean, rstd = torch.native_batch_norm(wide, weight, bias, None, None, True, 0.0, eps)
    else:
        assert running_mean is not None  # functional.batch_norm_act has checked
        assert running_var is not None
        # A copy: an operator must not return what it was given.
        mean, rstd = widen(running_mean).clone(), (widen(running_var) + eps).rsqrt()
        z = torch.native_batch_norm(wide, weight, bias, mean, widen(running_var), False, 0.0, eps)[0]
    if residual is not None:
        z.add_(residual)
    return in_layout_of(_activate_(z, activation), x), mean, rstd


def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    activation: str,
    with_residual: bool,
    with_l1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``dx, dweight, dbias, dresidual, l1`` with ``l1 = sum |dy|``.

    ``dresidual`` and ``l1`` are absent where not asked for; so is ``dresidual`` without an
    activation, when it is ``dy`` itself. The mask of the activation comes from ``y``, which the
    next operation keeps anyway (None without an activation); ``bias`` lets a kernel recompute it
    from ``x`` instead.
    """
    wide = widen(x)
    g = _masked(_dense(dy, wide), y, activation)
    dx, dweight, dbias = _normalise_backward(g, wide, weight, mean, rstd, training)
    masked_residual = with_residual and activation != "none"
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
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    activation: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``d_dy, d_x, d_weight`` for the cotangents of the five results of the backward.

    ``with_residual`` tells whether the mask can be recomputed from ``x``, as a kernel may; here it
    always comes from ``y``.
    """
    wide = widen(x)
    g = _masked(_dense(dy, wide), y, activation)
    v = torch.zeros_like(wide) if d_dx is None else _dense(d_dx, wide)
    d_g, q, p = _normalise_backward(v, wide, weight, mean, rstd, training)
    s = _sums(g, v, torch.zeros_like(mean), torch.ones_like(rstd))[0]
    direct = None if d_dweight is None else d_dweight * rstd
    if training:
        d_x, d_weight = _d_x_training(wide, g, v, (_widen(weight), mean, rstd, direct), (p, q, s))
    else:
        d_x = torch.zeros_like(g) if direct is None else g * _column(direct, x)
        d_weight = rstd * s
    if d_dweight is not None:
        d_g.add_(_affine(wide, mean, rstd, d_dweight, torch.zeros_like(mean)))
    for term in (None if d_dbias is None else _column(d_dbias, x), d_dresidual):
        if term is not None:
            d_g.add_(term)
    d_dy = add_l1_gradient(_masked(d_g, y, activation, into=d_g), d_l1, dy)
    return d_dy, in_layout_of(d_x, x), d_weight


def _d_x_training(
    x: Tensor,
    g: Tensor,
    v: Tensor,
    vectors: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    sums: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``sum v * N(g) + sum d_dweight * B`` with respect to x and to the weight.

    Derived by hand from N; with P = sum v, Q = sum v * xh, S = sum g * v, D = d_dweight * rstd::

        d_x = gamma * rstd^2 / M * (xh * (A*P/M - S + 3*B*Q/M) + Q * (A/M - g) + B * (P/M - v))
              + D * (g - A/M - xh * B/M)
        d_weight = rstd * (S - A*P/M - B*Q/M)
    """
    weight, mean, rstd, direct = vectors
    p, q, s = sums
    b, a = _sums(g, x, mean, rstd)
    share = 1 / max(g.numel() // max(g.shape[1], 1), 1)
    k = rstd.square().mul_(share) if weight is None else rstd.square().mul_(weight).mul_(share)
    bq = b * q * share
    rest = (s - bq).addcmul_(a, p, value=-share)  # S - A*P/M - B*Q/M
    of_xh = k * (2 * bq - rest)
    of_one = k * (q * a).addcmul_(b, p) * share
    of_g = -k * q
    if direct is not None:
        of_xh.addcmul_(direct, b, value=-share)
        of_one.addcmul_(direct, a, value=-share)
        of_g += direct
    d_x = _affine(x, mean, rstd, of_xh, of_one)
    d_x.addcmul_(g, _column(of_g, g)).addcmul_(v, _column(-k * b, g))
    return d_x, rest.mul_(rstd)


def _normalise_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``N(g)``, ``sum g * xh`` and ``sum g``."""
    weight = _widen(weight)
    if not g.numel():
        return torch.empty_like(g), torch.zeros_like(mean), torch.zeros_like(mean)
    # The saved statistics stand in for the running ones: the routine takes 1/sqrt(var + eps) from var.
    var = None if training else rstd.square().reciprocal()
    return torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None if training else mean, var, mean, rstd, training, 0.0, [True, True, True]
    )


def _sums(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum g * (x - mean) * rstd`` and ``sum g`` of each channel, in one pass without products."""
    if not g.numel():
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, products, plain = torch.ops.aten.native_batch_norm_backward(
        g, x, None, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return products, plain


def _affine(x: Tensor, mean: Tensor, rstd: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Return ``(x - mean) * rstd * factor + offset`` in one pass."""
    if not x.numel():
        return torch.empty_like(x)
    variance = rstd.square().reciprocal()
    return torch.native_batch_norm(x, factor, offset, mean, variance, False, 0.0, 0.0)[0]


def _activate_(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return z.relu_()
    return z.clamp_(0, 6) if activation == "relu6" else z


def _masked(g: Tensor, y: Tensor | None, activation: str, into: Tensor | None = None) -> Tensor:
    """Return ``g`` where the activation with output ``y`` has slope 1, and 0 elsewhere."""
    if activation == "none" or y is None:
        return g
    if activation == "relu6":
        return torch.where((y > 0) & (y < 6), g, 0)
    if into is not None:
        return torch.ops.aten.threshold_backward.grad_input(g, widen(y), 0, grad_input=into)
    return torch.ops.aten.threshold_backward(g, widen(y), 0)


def _widen(x: Tensor | None) -> Tensor | None:
    return None if x is None else widen(x)


def _dense(x: Tensor, like: Tensor) -> Tensor:
    return in_layout_of(x, like)


def _pixels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))
