"""Autograd of an operation that is linear in its input and in its weight: convolution, linear layer.

The gradients for input and weight hang on nodes of their own. A node's formula cannot see which of
its gradients a call of ``autograd.grad`` asks for, while the engine runs only the nodes it needs: so
a penalty on activations alone never pays for a weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.ops._library import (
    below_autograd,
    differentiate,
    differentiate_by,
    end_of_the_line,
    recorded,
)


def differentiate_bilinear(op: str, channel_axis: int) -> None:
    """Register the derivatives of ``<op>_forward(x, weight, bias, *geometry)`` and of its backward.

    Args:
        op: stem of the three operators.
        channel_axis: the axis of the output along which the bias runs.
    """
    forward = getattr(torch.ops.gradl1_fast, f"{op}_forward")
    backward = getattr(torch.ops.gradl1_fast, f"{op}_backward")

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        with below_autograd():
            y = forward(x, weight, bias, *geometry)
        if not recorded(x, weight, bias):
            return y

        def gradient(dy: Tensor, x: Tensor, weight: Tensor, index: int) -> Tensor:
            return backward(dy, x, weight, *geometry, [index == 0, index == 1])[index]

        edges = [
            _Edge.apply(operand, [x, weight], index, y.shape, gradient)
            for index, operand in enumerate((x, weight))
            if operand.requires_grad
        ]
        if recorded(bias):
            edges.append(_bias_edge(bias, y, channel_axis))
        return _Output.apply([y], *edges)

    differentiate_by(f"{op}_forward", kernel)
    _differentiate_backward(op)
    end_of_the_line(f"{op}_double_backward")


class _Output(torch.autograd.Function):
    """The output as the sum of its edges; each of them receives its gradient as it is."""

    @staticmethod
    def forward(ctx: Any, y: list[Tensor], *edges: Tensor) -> Tensor:
        return y[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[dy if needed else None for needed in ctx.needs_input_grad[1:]]


class _Edge(torch.autograd.Function):
    """Zeros in the shape of the output that pass its gradient on to one operand, by dgrad or wgrad."""

    @staticmethod
    def forward(
        ctx: Any,
        operand: Tensor,
        operands: list[Tensor],
        index: int,
        shape: torch.Size,
        gradient: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    ) -> Tensor:
        # In a list the other operand is saved without becoming an edge that the engine would follow.
        ctx.save_for_backward(*operands)
        ctx.index, ctx.gradient = index, gradient
        return operand.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient(dy, *ctx.saved_tensors, ctx.index), None, None, None, None


def _bias_edge(bias: Tensor, y: Tensor, channel_axis: int) -> Tensor:
    shape = [1] * y.dim()
    shape[channel_axis] = -1
    return bias.reshape(shape).expand(y.shape)


def _differentiate_backward(op: str) -> None:
    double_backward = getattr(torch.ops.gradl1_fast, f"{op}_double_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        dy, x, weight, *geometry, _ = inputs
        ctx.save_for_backward(dy, x, weight)
        ctx.geometry = geometry

    def backward(ctx: Any, d_dx: Tensor | None, d_dweight: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1] and d_dweight is not None,
            ctx.needs_input_grad[2] and d_dx is not None,
        ]
        grads = double_backward(d_dx, d_dweight, *ctx.saved_tensors, *ctx.geometry, wanted)
        kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return *kept, *[None] * (len(ctx.geometry) + 1)

    differentiate(f"{op}_backward", save, backward)
