"""Batch norm's sweeps; the derivation stands in the reference.

Reads and writes of tensors as large as x, in training (a pass each):

=====================  ======================================  =============================
sweep                  without a residual                      with a residual
=====================  ======================================  =============================
forward                x; x -> y (2R 1W)                       x; x, residual -> y (3R 1W)
backward               dy, x; dy, x -> dx (4R 1W)              dy, x, a -> dresidual;
                                                               dresidual, x -> dx (5R 2W)
double backward        dy, x, d_dx;                            the same, a in either pass and
                       dy, x, d_dx -> d_dy, d_x (6R 2W)        d_dresidual in the second (9R 2W)
=====================  ======================================  =============================

In evaluation the forward is one pass, the rest is the same. The mask of activation and quantizer is
recomputed from x by the forward's own formula, so no output is read; only a residual, which is not kept,
makes ``activated`` (a above) the source of the mask: y itself, or beside a quantizer one write more in
the forward. Where nothing is masked it is not read either. The quantizer and the l1 term of dy cost no
pass of their own. In layouts other than NCHW and channels_last without gaps, and where layouts differ,
each tensor concerned is copied first.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gradl1_fast._masks import is_masked
from gradl1_fast.backends import reference
from gradl1_fast.backends.reference._tensors import absent, in_layout_of, widen
from gradl1_fast.backends.triton import _batch_norm_act_kernels as kernels
from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._tiles import Plan, plan, walkable


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
    with _launch.on_device_of(x):
        work = walkable(x)
        cut, y = plan(work), torch.empty_like(work)
        activated = None if residual is None or scale is None else torch.empty_like(work)
        if training:
            mean, rstd = _statistics(work, cut, eps)
        else:
            # A copy: an operator must not return what it was given.
            mean, rstd = _wide(running_mean, x).clone(), (_wide(running_var, x) + eps).rsqrt()
        kernels._batch_norm_act_forward_kernel[cut.grid](
            work,
            _vector(weight),
            _vector(bias),
            mean,
            rstd,
            _launch.in_layout_of(residual, work),
            _quantizer(scale, zero_point, q_min, q_max),
            y,
            activated,
            ACTIVATION=activation,
            **cut.arguments,
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
    with _launch.on_device_of(x):
        work = walkable(x)
        cut, dx = plan(work), torch.empty_like(work)
        weight, bias, quantizer = _vector(weight), _vector(bias), _quantizer(scale, zero_point, q_min, q_max)
        dy = _launch.in_layout_of(dy, work)
        masked_residual = with_residual and is_masked(activation, scale)
        dresidual = torch.empty_like(work) if masked_residual else None
        sums = _launch.partials(x, 2 + with_l1, cut.splits, cut.channels)
        kernels._batch_norm_act_backward_sums_kernel[cut.grid](
            dy,
            work,
            _launch.in_layout_of(activated, work) if masked_residual else None,
            weight,
            bias,
            mean,
            rstd,
            quantizer,
            dresidual,
            sums,
            ACTIVATION=activation,
            WITH_L1=with_l1,
            **cut.arguments,
        )
        dbias, dweight, *l1 = (torch.empty_like(mean) for _ in range(2 + with_l1))
        _launch.finish(sums, (dbias, dweight, *l1))
        # What goes to the residual has been masked already.
        kernels._batch_norm_act_backward_kernel[cut.grid](
            dy if dresidual is None else dresidual,
            work,
            weight,
            bias,
            mean,
            rstd,
            quantizer if dresidual is None else None,
            dweight,
            dbias,
            dx,
            cut.size_of_channel,
            ACTIVATION=activation if dresidual is None else "none",
            TRAINING=training,
            **cut.arguments,
        )
        return (
            in_layout_of(dx, x),
            dweight,
            dbias,
            absent(x) if dresidual is None else in_layout_of(dresidual, x),
            _launch.total(l1[0]) if with_l1 else absent(mean),
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
    if not x.numel():
        return reference.batch_norm_act_double_backward(
            d_dx, d_dweight, d_dbias, d_dresidual, d_l1, dy, x, activated, weight, bias, mean, rstd,
            scale, zero_point, q_min, q_max, training, activation, with_residual,
        )  # fmt: skip
    with _launch.on_device_of(x):
        work = walkable(x)
        cut, d_dy, d_x = plan(work), torch.empty_like(work), torch.empty_like(work)
        d_dx, d_dresidual, gradient = (_launch.in_layout_of(t, work) for t in (d_dx, d_dresidual, dy))
        masked_residual = with_residual and is_masked(activation, scale)
        activated = _launch.in_layout_of(activated, work) if masked_residual else None
        quantizer = _quantizer(scale, zero_point, q_min, q_max)
        saved = (gradient, work, activated, _vector(weight), _vector(bias), mean, rstd, quantizer)
        shares = _launch.partials(x, 5, cut.splits, cut.channels)
        kernels._batch_norm_act_double_backward_sums_kernel[cut.grid](
            d_dx, *saved, shares, ACTIVATION=activation, **cut.arguments
        )
        sums = _launch.partials(x, 5, cut.channels).unbind()
        _launch.finish(shares, sums)
        d_weight = torch.empty_like(mean)
        kernels._batch_norm_act_double_backward_kernel[cut.grid](
            d_dx,
            _vector(d_dweight),
            _vector(d_dbias),
            d_dresidual,
            d_l1,
            *saved,
            sums,
            d_dy,
            d_x,
            d_weight,
            cut.size_of_channel,
            ACTIVATION=activation,
            TRAINING=training,
            **cut.arguments,
        )
        return in_layout_of(d_dy, dy), in_layout_of(d_x, x), d_weight


def _statistics(x: Tensor, cut: Plan, eps: float) -> tuple[Tensor, Tensor]:
    """Return the mean and 1/std of each channel of the walkable tensor ``x``."""
    shares = _launch.partials(x, 3, cut.splits, cut.channels)
    kernels._batch_norm_act_statistics_kernel[cut.grid](x, shares, **cut.arguments)
    mean, rstd = _launch.partials(x, cut.channels), _launch.partials(x, cut.channels)
    width = min(triton.next_power_of_2(cut.channels), 32)
    kernels._batch_norm_act_statistics_finish_kernel[(triton.cdiv(cut.channels, width),)](
        x,
        shares,
        mean,
        rstd,
        1 if cut.arguments["LAST"] else cut.arguments["width"],
        cut.splits,
        cut.channels,
        EPS=eps,
        ROWS=256 // width,
        COLS=width,
        **_launch.OPTIONS,
    )
    return mean, rstd


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _quantizer(
    scale: Tensor | None, zero_point: Tensor | None, q_min: int, q_max: int
) -> tuple[Tensor, Tensor, float, float] | None:
    return None if scale is None or zero_point is None else (scale, zero_point, float(q_min), float(q_max))


def _wide(values: Tensor | None, x: Tensor) -> Tensor:
    assert values is not None  # the caller checks that evaluation has its statistics
    return widen(values)
