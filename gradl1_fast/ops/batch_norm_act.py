"""Operators of batch norm with residual, activation and fake quantization; see the reference backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast._masks import is_masked
from gradl1_fast.ops._library import Operator

_GRID = "Tensor? scale, Tensor? zero_point, int q_min, int q_max"
_SAVED = (
    "Tensor dy, Tensor x, Tensor? activated, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    f"{_GRID}, bool training, str activation"
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, residual, scale, zero_point, *codes, training, _, activation, probe = inputs
    y, activated, mean, rstd = output
    ctx.mark_non_differentiable(activated, mean, rstd)
    # The tensor that determines the mask; if y is not needed, it may be changed in place.
    if scale is not None:
        source = None if residual is None else activated
    else:
        source = None if activation == "none" else y
    ctx.save_for_backward(x, source, weight, bias, mean, rstd, scale, zero_point)
    ctx.options, ctx.has_residual = (*codes, training, activation), residual is not None
    ctx.unmasked = not is_masked(activation, scale)
    ctx.has_probe = probe is not None and probe.requires_grad


def _backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    # The l1 term is needed only for double backprop, so an ordinary backward pass skips it.
    with_l1 = ctx.has_probe and torch.is_grad_enabled()
    dx, dweight, dbias, dresidual, l1 = batch_norm_act_backward(
        dy, *ctx.saved_tensors, *ctx.options, ctx.has_residual, with_l1
    )
    if ctx.unmasked:
        dresidual = dy
    needed = ctx.needs_input_grad
    return (
        dx,
        dweight if needed[1] else None,
        dbias if needed[2] else None,
        None,
        None,
        dresidual if ctx.has_residual else None,
        *[None] * 7,
        l1 if with_l1 else None,
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.options = inputs[:9], inputs[9:-1]
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    d_dy, d_x, d_weight = batch_norm_act_double_backward(*cotangents, *ctx.saved_tensors, *ctx.options)
    return d_dy, d_x, None, d_weight if ctx.needs_input_grad[3] else None, *[None] * 11


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[1],), dtype=sum_dtype(x.dtype))


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual, scale = rest[4:6]
    activated = x.new_empty((0,)) if residual is None or scale is None else torch.empty_like(x)
    return torch.empty_like(x), activated, _statistics(x), _statistics(x)


def _fake_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    scale, (activation, with_residual, with_l1) = rest[5], rest[-3:]
    masked_residual = with_residual and is_masked(activation, scale)
    dresidual = torch.empty_like(x) if masked_residual else x.new_empty((0,))
    l1 = _statistics(x).new_empty(() if with_l1 else (0,))
    return torch.empty_like(x), _statistics(x), _statistics(x), dresidual, l1


def _fake_double_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = args[6]
    return torch.empty_like(x), torch.empty_like(x), _statistics(x)


batch_norm_act_forward = Operator(
    "batch_norm_act",
    "batch_norm_act_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    f"Tensor? running_var, Tensor? residual, {_GRID}, bool training, float eps, str activation, "
    "Tensor? probe) -> (Tensor, Tensor, Tensor, Tensor)",
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
batch_norm_act_double_backward.refuse_third_order()
