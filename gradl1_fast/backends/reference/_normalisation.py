"""Derivatives of batch normalisation, computed from its saved statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from gradl1_fast.backends.reference._tensors import widen


def d_x_training(
    x: Tensor,
    g: Tensor,
    v: Tensor,
    vectors: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    of_v: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``sum v * N(g) + sum d_dweight * B`` with respect to x and to the weight.

    Derived by hand from N; with P = sum v, Q = sum v * xh, S = sum g * v, D = d_dweight * rstd::

        d_x = gamma * rstd^2 / M * (xh * (A*P/M - S + 3*B*Q/M) + Q * (A/M - g) + B * (P/M - v))
              + D * (g - A/M - xh * B/M)
        d_weight = rstd * (S - A*P/M - B*Q/M)
    """
    weight, mean, rstd, direct = vectors
    p, q, s = of_v
    b, a = sums(g, x, mean, rstd)
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
    d_x = centred_affine(x, mean, rstd * of_xh, of_one)
    d_x.addcmul_(g, column(of_g, g)).addcmul_(v, column(-k * b, g))
    return d_x, rest.mul_(rstd)


def normalise_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``N(g)``, ``sum g * xh`` and ``sum g``."""
    weight = None if weight is None else widen(weight)
    if not g.numel():
        return torch.empty_like(g), torch.zeros_like(mean), torch.zeros_like(mean)
    # The routine computes 1/sqrt(var + eps) from the running variance, so the saved statistics replace it.
    var = None if training else rstd.square().reciprocal()
    return torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None if training else mean, var, mean, rstd, training, 0.0, [True, True, True]
    )


def sums(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum g * (x - mean) * rstd`` and ``sum g`` per channel, without intermediate products."""
    if not g.numel():
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, products, plain = torch.ops.aten.native_batch_norm_backward(
        g, x, None, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return products, plain


def centred_affine(x: Tensor, mean: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Return ``(x - mean) * factor + offset``, subtracting first so that a large mean costs no precision."""
    centred = x - column(mean, x)
    return torch.addcmul(column(offset, x), centred, column(factor, x), out=centred)


def affine(x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Return ``x * factor + offset`` in one pass over ``x``."""
    if not x.numel():
        return torch.empty_like(x)
    return torch.native_batch_norm(
        x, factor, offset, torch.zeros_like(factor), torch.ones_like(factor), False, 0.0, 0.0
    )[0]


def column(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))
