"""Autograd of operations that are linear in input and weight: convolutions and the linear layer.

The gradient of the weight is computed by a separate node. The formula of a node cannot see which gradients
``autograd.grad`` requests, but the engine runs only the nodes it needs. A penalty on activations only
therefore never computes a weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.ops._library import Operator, recorded

# Takes dy, x, weight and the index of the gradient: 0 for the input, 1 for the weight.
_Gradient = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def differentiate_bilinear(
    forward: Operator, backward: Operator, double_backward: Operator, channel_axis: int
) -> None:
    """Register the derivatives of ``forward(x, weight, bias, *geometry)`` and of its ``backward``.

    Args:
        forward: the operator of the forward pass.
        backward: the operator of its backward pass.
        double_backward: the operator of its double backward pass.
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

        edges = []
        if weight.requires_grad:
            edges.append(_WeightEdge.apply(weight, [x, weight], y.shape, gradient))
        if bias is not None and bias.requires_grad:
            edges.append(_bias_edge(bias, y, channel_axis))
        return _Output.apply([y], [x, weight], gradient, x, *edges)

    forward.differentiate_by(kernel)
    _differentiate_backward(backward, double_backward)
    double_backward.refuse_third_order()


class _Output(torch.autograd.Function):
    """The output. Its gradient goes to the input by dgrad, and unchanged to the other edges.

    Tensors in lists are saved without becoming edges of the graph.
    """

    @staticmethod
    def forward(
        ctx: Any, y: list[Tensor], operands: list[Tensor], gradient: _Gradient, x: Tensor, *edges: Tensor
    ) -> Tensor:
        if x.requires_grad:
            ctx.save_for_backward(*operands)
            ctx.gradient = gradient
        return y[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        of_x, *of_edges = ctx.needs_input_grad[3:]
        dx = ctx.gradient(dy, *ctx.saved_tensors, 0) if of_x else None
        return None, None, None, dx, *[dy if needed else None for needed in of_edges]


class _WeightEdge(torch.autograd.Function):
    """A zero summand in the shape of the output, whose gradient goes to the weight by wgrad."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, operands: list[Tensor], shape: torch.Size, gradient: _Gradient
    ) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.gradient = gradient
        return weight.new_empty(()).expand(shape)  # the values are never read

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient(dy, *ctx.saved_tensors, 1), None, None, None


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
