"""Batch norm's passes; docs/mathematics.md has the derivation.

Reads and writes of tensors as large as x, in training, launch by launch:

=====================  ======================================  =============================
pass                   without a residual                      with a residual
=====================  ======================================  =============================
forward                x; x -> y (2R 1W)                       x; x, residual -> y (3R 1W)
backward               dy, x; dy, x -> dx (4R 1W)              dy, x, a -> dresidual;
                                                               dresidual, x -> dx (5R 2W)
double backward        dy, x, d_dx;                            the same, a in either pass and
                       dy, x, d_dx -> d_dy, d_x (6R 2W)        d_dresidual in the second (9R 2W)
=====================  ======================================  =============================

In evaluation the forward is one launch, the rest is the same. The mask of activation and quantizer is
recomputed from x by the forward's own formula, so no output is read; only a residual, which is not kept,
makes ``activated`` (a above) the source of the mask: y itself, or beside a quantizer one write more in
the forward. Where nothing is masked it is not read either. The quantizer and the l1 term of dy cost no
reads of their own. In layouts other than NCHW and channels_last without gaps, and where layouts differ,
each tensor concerned is copied first.
"""

from __future__ import annotations

from torch import Tensor

from gradl1_fast.backends import reference
from gradl1_fast.backends.reference._tensors import absent, in_layout_of
from gradl1_fast.backends.triton._prepared_batch_norm_act import BatchNormAct
from gradl1_fast.backends.triton._tiles import walkable


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

    See the reference for what they are.
    """
    if not x.numel():
        return reference.batch_norm_act_forward(
            x, weight, bias, running_mean, running_var, residual, scale, zero_point, q_min, q_max,
            training, eps, activation,
        )  # fmt: skip
    work, codes = walkable(x), None if scale is None else (q_min, q_max)
    op = BatchNormAct(work, training, eps, activation, residual is not None, codes, False)
    y, activated, mean, rstd, _ = op.forward(
        work, weight, bias, running_mean, running_var, residual, scale, zero_point
    )
    kept = absent(x) if activated is None else in_layout_of(activated, x)
    return in_layout_of(y, x), kept, mean, rstd


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

    ``dresidual`` and ``l1`` are absent where not asked for; so is ``dresidual`` without activation
    and scale, when it is ``dy`` itself. ``activated`` is read only where a residual was added.
    """
    if not x.numel():
        return reference.batch_norm_act_backward(
            dy, x, activated, weight, bias, mean, rstd, scale, zero_point, q_min, q_max,
            training, activation, with_residual, with_l1,
        )  # fmt: skip
    work, codes = walkable(x), None if scale is None else (q_min, q_max)
    op = BatchNormAct(work, training, 0.0, activation, with_residual, codes, False)
    dx, dweight, dbias, dresidual, l1 = op.backward(
        dy, work, activated, weight, bias, mean, rstd, scale, zero_point, with_l1, None, None
    )
    return (
        in_layout_of(dx, x),
        dweight,
        dbias,
        absent(x) if dresidual is None else in_layout_of(dresidual, x),
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
    """Return ``d_dy, d_x, d_weight`` for the cotangents of the five results of the backward pass."""
    if not x.numel():
        return reference.batch_norm_act_double_backward(
            d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, x, activated, weight, bias, mean, rstd,
            scale, zero_point, q_min, q_max, training, activation, with_residual,
        )  # fmt: skip
    work, codes = walkable(x), None if scale is None else (q_min, q_max)
    op = BatchNormAct(work, training, 0.0, activation, with_residual, codes, False)
    d_dy, d_x, d_weight = op.double_backward(
        d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, work, activated, weight, bias, mean, rstd, scale,
        zero_point,
    )  # fmt: skip
    return in_layout_of(d_dy, x), in_layout_of(d_x, x), d_weight
