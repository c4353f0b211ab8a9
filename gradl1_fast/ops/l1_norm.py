"""Operators of the l1 norms of many tensors, computed together.

Derivation: ``y_i = sum |x_i|``, ``dx_i = dy_i * sign(x_i)``, ``d_dy_i = sum d_dx_i * sign(x_i)``. The sign is
piecewise constant, so the tensors get no gradient from double backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.ops._library import Operator, recorded

_Values = Callable[..., Any]


class _L1Norm(torch.autograd.Function):
    # Flat arguments, because autograd does not track tensors in lists.
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return l1_norm_forward.values(list(tensors))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(l1_norm_backward(dy, list(ctx.saved_tensors)))


class _L1NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(l1_norm_backward.values(dy, list(tensors)))

    @staticmethod
    def backward(ctx: Any, *d_dx: Tensor) -> tuple[Tensor | None, ...]:
        d_dy = l1_norm_double_backward(list(d_dx), list(ctx.saved_tensors))
        return d_dy, *[None] * len(d_dx)


class _L1NormDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *pairs: Tensor) -> Tensor:
        half = len(pairs) // 2
        return l1_norm_double_backward.values(list(pairs[:half]), list(pairs[half:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("gradl1_fast::l1_norm_double_backward: first and second order gradients only")


def _forward_kernel(values: _Values, tensors: list[Tensor]) -> Any:
    return _L1Norm.apply(*tensors) if recorded(*tensors) else values(tensors)


def _backward_kernel(values: _Values, dy: Tensor, tensors: list[Tensor]) -> Any:
    if not recorded(dy, *tensors):
        return values(dy, tensors)
    return list(_L1NormBackward.apply(dy, *tensors))


def _double_backward_kernel(values: _Values, d_dx: list[Tensor], tensors: list[Tensor]) -> Any:
    if not recorded(*d_dx, *tensors):
        return values(d_dx, tensors)
    return _L1NormDoubleBackward.apply(*d_dx, *tensors)


def _fake_norms(tensors: list[Tensor]) -> Tensor:
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tensors[0].new_empty((len(tensors),), dtype=widest)


l1_norm_forward = Operator("l1_norm", "l1_norm_forward(Tensor[] tensors) -> Tensor", _fake_norms)
l1_norm_backward = Operator(
    "l1_norm",
    "l1_norm_backward(Tensor dy, Tensor[] tensors) -> Tensor[]",
    lambda dy, tensors: [torch.empty_like(t) for t in tensors],
)
l1_norm_double_backward = Operator(
    "l1_norm",
    "l1_norm_double_backward(Tensor[] d_dx, Tensor[] tensors) -> Tensor",
    lambda d_dx, tensors: _fake_norms(tensors),
)
l1_norm_forward.differentiate_by(_forward_kernel)
l1_norm_backward.differentiate_by(_backward_kernel)
l1_norm_double_backward.differentiate_by(_double_backward_kernel)
