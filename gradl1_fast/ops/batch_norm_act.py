"""Operators of batch normalisation with residual and activation; the derivation stands in the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.ops._library import Operator

_SAVED = (
    "Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "bool training, str activation"
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, residual, ctx.training, _, ctx.activation, probe = inputs
    y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # Without an activation nothing needs y, and changing it in place is then no error.
    ctx.save_for_backward(x, None if ctx.activation == "none" else y, weight, bias, mean, rstd)
    ctx.has_residual, ctx.has_probe = residual is not None, probe is not None and probe.requires_grad


def _backward(ctx: Any, dy: Tensor, _mean: None, _rstd: None) -> tuple[Tensor | None, ...]:
    # The l1 term exists for double backprop; an ordinary backward pass does not pay for it.
    with_l1 = ctx.has_probe and torch.is_grad_enabled()
    dx, dweight, dbias, dresidual, l1 = batch_norm_act_backward(
        dy, *ctx.saved_tensors, ctx.training, ctx.activation, ctx.has_residual, with_l1
    )
    if ctx.activation == "none":
        dresidual = dy
    needed = ctx.needs_input_grad
    return (
        dx,
        dweight if needed[1] else None,
        dbias if needed[2] else None,
        None,
        None,
        dresidual if ctx.has_residual else None,
        None,
        None,
        None,
        l1 if with_l1 else None,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.training, ctx.activation, ctx.with_residual, _ = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    d_dy, d_x, d_weight = batch_norm_act_double_backward(
        *cotangents, *ctx.saved_tensors, ctx.training, ctx.activation, ctx.with_residual
    )
    return d_dy, d_x, None, d_weight if ctx.needs_input_grad[3] else None, *[None] * 7


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[1],), dtype=sum_dtype(x.dtype))


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _statistics(x), _statistics(x)


def _fake_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    activation, with_residual, with_l1 = rest[-3:]
    dresidual = torch.empty_like(x) if with_residual and activation != "none" else x.new_empty((0,))
    l1 = _statistics(x).new_empty(() if with_l1 else (0,))
    return torch.empty_like(x), _statistics(x), _statistics(x), dresidual, l1


def _fake_double_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, x = args[5:7]
    return torch.empty_like(dy), torch.empty_like(x), _statistics(x)


batch_norm_act_forward = Operator(
    "batch_norm_act",
    "batch_norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? residual, bool training, float eps, str activation, Tensor? probe) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
batch_norm_act_backward = Operator(
    "batch_norm_act",
    f"batch_norm_act_backward({_SAVED}, bool with_residual, bool with_l1) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
batch_norm_act_double_backward = Operator(
    "batch_norm_act",
    "batch_norm_act_double_backward(Tensor? d_dx, Tensor? d_dweight, Tensor? d_dbias, "
    f"Tensor? d_dresidual, Tensor? d_l1, {_SAVED}, bool with_residual) -> (Tensor, Tensor, Tensor)",
    _fake_double_backward,
)
batch_norm_act_forward.differentiate(_save, _backward)
batch_norm_act_backward.differentiate(_save_backward, _double_backward)
batch_norm_act_double_backward.end_the_line()
