"""Operators of fake quantization with the straight-through estimator and a probe.

Derivation: with the mask of values that were not clamped, ``dx = mask * dy`` and ``l1 = sum |dy|``, so
``d_dy = mask * d_dx + d_l1 * sign(dy)``. The mask is piecewise constant, so x, scale and zero point get no
gradient from double backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.ops._library import Operator

_GRID = "Tensor scale, Tensor zero_point, int q_min, int q_max, int? axis"


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.q_min, ctx.q_max, ctx.axis, probe = inputs
    # An alias without the Python attributes of x, which could create a reference cycle through the graph.
    ctx.save_for_backward(x.detach(), scale, zero_point)
    ctx.has_probe = probe is not None and probe.requires_grad


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # The l1 term is needed only for double backprop, so an ordinary backward pass skips it.
    with_l1 = ctx.has_probe and torch.is_grad_enabled()
    dx, l1 = fake_quantize_backward(dy, *ctx.saved_tensors, ctx.q_min, ctx.q_max, ctx.axis, with_l1)
    return dx, None, None, None, None, None, l1 if with_l1 else None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.q_min, ctx.q_max, ctx.axis, _ = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, d_dx: Tensor | None, d_l1: Tensor | None) -> tuple[Tensor | None, ...]:
    d_dy = fake_quantize_double_backward(d_dx, d_l1, *ctx.saved_tensors, ctx.q_min, ctx.q_max, ctx.axis)
    return d_dy, *[None] * 7


def _fake_l1(dy: Tensor, with_l1: bool) -> Tensor:
    if not with_l1:
        return dy.new_empty((0,))
    return dy.new_empty((), dtype=sum_dtype(dy.dtype))


fake_quantize_forward = Operator(
    "fake_quantize",
    f"fake_quantize_forward(Tensor x, {_GRID}, Tensor? probe) -> Tensor",
    lambda x, *_: torch.empty_like(x),
)
fake_quantize_backward = Operator(
    "fake_quantize",
    f"fake_quantize_backward(Tensor dy, Tensor x, {_GRID}, bool with_l1) -> (Tensor, Tensor)",
    lambda dy, x, *rest: (torch.empty_like(x), _fake_l1(dy, rest[-1])),
)
fake_quantize_double_backward = Operator(
    "fake_quantize",
    f"fake_quantize_double_backward(Tensor? d_dx, Tensor? d_l1, Tensor dy, Tensor x, {_GRID}) -> Tensor",
    lambda d_dx, d_l1, dy, x, *_: torch.empty_like(x),
)
fake_quantize_forward.differentiate(_save, _backward)
fake_quantize_backward.differentiate(_save_backward, _double_backward)
fake_quantize_double_backward.refuse_third_order()
