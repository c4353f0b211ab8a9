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

from gradl1_fast.ops._library import Operator, recorded


def differentiate_bilinear(
    forward: Operator, backward: Operator, double_backward: Operator, channel_axis: int
) -> None:
    """Register the derivatives of ``forward(x, weight, bias, *geometry)`` and of its ``backward``.

    Args:
        forward: the operator itself.
        backward: the first sweep.
        double_backward: the second sweep.
        channel_axis: the axis of the output along which the bias runs.
    """

    def kernel(
        values: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
    ) -> Tensor:
        y = values(x, weight, bias, *geometry)
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

    forward.differentiate_by(kernel)
    _differentiate_backward(backward, double_backward)
    double_backward.end_the_line()


class _Output(torch.autograd.Function):
    """The output as the sum of its edges; each of them receives its gradient as it is."""

    @staticmethod
    def forward(ctx: Any, y: list[Tensor], *edges: Tensor) -> Tensor:
        return y[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[dy if needed else None for needed in ctx.needs_input_grad[1:]]


class _Edge(torch.autograd.Function):
    """A summand in the shape of the output that passes its gradient on to one operand, by dgrad or wgrad."""

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
        return operand.new_empty(()).expand(shape)  # nobody reads the values

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient(dy, *ctx.saved_tensors, ctx.index), None, None, None, None


def _bias_edge(bias: Tensor, y: Tensor, channel_axis: int) -> Tensor:
    shape = [1] * y.dim()
    shape[channel_axis] = -1
    return bias.reshape(shape).expand(y.shape)


def _differentiate_backward(backward: Operator, double_backward: Operator) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        dy, x, weight, *geometry, _ = inputs
        ctx.save_for_backward(dy, x, weight)
        ctx.geometry = geometry

    def formula(ctx: Any, d_dx: Tensor | None, d_dweight: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1] and d_dweight is not None,
            ctx.needs_input_grad[2] and d_dx is not None,
        ]
        grads = double_backward(d_dx, d_dweight, *ctx.saved_tensors, *ctx.geometry, wanted)
        kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return *kept, *[None] * (len(ctx.geometry) + 1)

    backward.differentiate(save, formula)
