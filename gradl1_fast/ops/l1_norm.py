"""Operators of the l1 norms of many tensors at once.

Derivation: ``y_i = sum |x_i|``, ``dx_i = dy_i * sign(x_i)``, ``d_dy_i = sum d_dx_i * sign(x_i)``;
the tensors receive nothing from the double backward, the sign being piecewise constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradl1_fast.ops._library import define, differentiate, end_of_the_line

_ops = torch.ops.gradl1_fast


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = inputs[-1]
    ctx.save_for_backward(*tensors)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs, output)
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, dy: Tensor) -> list[Tensor]:
    return _ops.l1_norm_backward(dy, list(ctx.saved_tensors))


def _double_backward(ctx: Any, d_dx: list[Tensor]) -> tuple[Tensor, list[None]]:
    tensors = list(ctx.saved_tensors)
    filled = [torch.zeros_like(t) if v is None else v for v, t in zip(d_dx, tensors, strict=True)]
    return _ops.l1_norm_double_backward(filled, tensors), [None] * len(tensors)


def _fake_norms(tensors: list[Tensor]) -> Tensor:
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tensors[0].new_empty((len(tensors),), dtype=widest)


define("l1_norm", "l1_norm_forward(Tensor[] tensors) -> Tensor", _fake_norms)
define(
    "l1_norm",
    "l1_norm_backward(Tensor dy, Tensor[] tensors) -> Tensor[]",
    lambda dy, tensors: [torch.empty_like(t) for t in tensors],
)
define(
    "l1_norm",
    "l1_norm_double_backward(Tensor[] d_dx, Tensor[] tensors) -> Tensor",
    lambda d_dx, tensors: _fake_norms(tensors),
)
differentiate("l1_norm_forward", _save, _backward)
differentiate("l1_norm_backward", _save_backward, _double_backward)
end_of_the_line("l1_norm_double_backward")
