"""The operations of a region, each with the raw calls of its four passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gradl1_fast.conversion.regions.passes import Backward, DoubleBackward, Forward, NotFittingError

__all__ = ["Activation", "Add", "Cat", "Convolution", "Linear", "MaxPool", "Operation", "Pool", "Reshape"]

_aten: Any = torch.ops.aten
_convolution_backward = _aten.convolution_backward.default


class Operation(ABC):
    """An operation of a region.

    Attributes:
        index: its index in the region.
        out: the slot of its result.
        ends_slot: the slot of the tensor to which this operation adds the gradient of its smallest and
            largest value; None for most operations.
    """

    index: int
    out: int
    ends_slot: int | None = None

    @abstractmethod
    def reads(self) -> Sequence[int]:
        """Return the slots of the tensors from which the result is computed."""

    @abstractmethod
    def forward(self, run: Forward) -> None:
        """Compute the result."""

    @abstractmethod
    def backward(self, run: Backward, dy: Tensor) -> None:
        """Add the gradients of the inputs, given the gradient of the result."""

    @abstractmethod
    def double_backward(self, run: DoubleBackward, dy: Any) -> None:
        """Set the cotangent of ``dy``, which the first backward pass saved, and add those of the inputs."""

    def keeps(self) -> Sequence[int]:
        """Return the slots of the tensors that later passes read."""
        return ()

    def value(self, run: Backward) -> Tensor:
        """Return the tensor in ``ends_slot``."""
        raise NotImplementedError


class _Product(Operation):
    """An operation that is linear in its input and in its weight.

    Args:
        x: the slot of the input.
        weight: the index of the weight among the region's parameters.
        bias: the index of the bias, or None.
        needs: whether the input, the weight and the bias need gradients.
        dtype: the type in which autocast computes; None without autocast.
    """

    def __init__(
        self, x: int, weight: int, bias: int | None, needs: tuple[bool, bool, bool], dtype: torch.dtype | None
    ) -> None:
        self.x, self.weight, self.bias, self.dtype = x, weight, bias, dtype
        self.needs_x, self.needs_weight, self.needs_bias = needs
        self.x_dtype: torch.dtype | None = None

    @override
    def reads(self) -> Sequence[int]:
        return (self.x,)

    @override
    def forward(self, run: Forward) -> None:
        x, weight = run.values[self.x], run.args[self.weight]
        bias = None if self.bias is None else run.args[self.bias]
        if self.dtype is not None:
            self.x_dtype = x.dtype
            x, weight = x.to(self.dtype), weight.to(self.dtype)
            bias = None if bias is None else bias.to(self.dtype)
        run.values[self.out] = self.product(x, weight, bias)
        if run.saved is not None:
            run.saved[self.index] = x, weight

    @override
    def backward(self, run: Backward, dy: Tensor) -> None:
        x, weight = run.saved[self.index]
        if run.record is not None:
            run.record[self.index] = dy
        of_weight = self.needs_weight and run.of_weights
        if self.needs_x or of_weight:
            dx, dweight = self.gradients(dy, x, weight, self.needs_x, of_weight)
            if self.needs_x:
                run.add(self.x, self.cast_back(dx))
            if of_weight:
                run.give(self.weight, dweight)
        if self.needs_bias and run.of_others:
            run.give(self.bias, self.bias_gradient(dy))  # type: ignore[arg-type]

    @override
    def double_backward(self, run: DoubleBackward, dy: Tensor) -> None:
        x, weight = run.saved[self.index]
        v, d_weight = run.tangents[self.x], run.d_args[self.weight]
        if self.dtype is not None:
            v = None if v is None else v.to(self.dtype)
            d_weight = None if d_weight is None else d_weight.to(self.dtype)
        tangent = None if v is None else self.product(v, weight, None)
        if d_weight is not None:
            term = self.product(x, d_weight, None)
            tangent = term if tangent is None else tangent.add_(term)
        if self.bias is not None and run.d_args[self.bias] is not None:
            term = self.bias_tangent(run.d_args[self.bias], dy)  # type: ignore[arg-type]
            tangent = term if tangent is None else tangent.add_(term)
        run.tangents[self.out] = tangent
        of_x, of_weight = self.needs_x and d_weight is not None, self.needs_weight and v is not None
        if of_x or of_weight:
            like_x, like_weight = x if v is None else v, weight if d_weight is None else d_weight
            d_x, d_w = self.gradients(dy, like_x, like_weight, of_x, of_weight)
            if of_x:
                run.add(self.x, self.cast_back(d_x))
            if of_weight:
                run.give(self.weight, d_w)

    @override
    def keeps(self) -> Sequence[int]:
        return (self.x,)

    def cast_back(self, dx: Tensor) -> Tensor:
        """Return a gradient of the input, cast to the input's type."""
        return dx if self.dtype is None else dx.to(self.x_dtype)

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product."""

    @abstractmethod
    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the requested gradients of input and weight."""

    @abstractmethod
    def bias_gradient(self, dy: Tensor) -> Tensor:
        """Return the gradient of the bias."""

    @abstractmethod
    def bias_tangent(self, d_bias: Tensor, dy: Tensor) -> Tensor:
        """Return the cotangent of ``dy``, given that of the bias's gradient."""


class Convolution(_Product):
    """A convolution; ``geometry`` holds the arguments of ``torch.convolution`` that are not tensors."""

    def __init__(self, *args: Any, geometry: tuple[Any, ...]) -> None:
        super().__init__(*args)
        self.geometry = geometry

    @override
    def forward(self, run: Forward) -> None:
        if run.values[self.x].dim() != run.args[self.weight].dim():
            raise NotFittingError("the input of a convolution has no batch dimension")
        super().forward(run)

    @override
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *self.geometry)

    @override
    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor, Tensor]:
        mask = (of_x, of_weight, False)
        return _convolution_backward(dy, x, weight, None, *self.geometry, mask)[:2]

    @override
    def bias_gradient(self, dy: Tensor) -> Tensor:
        return dy.sum([0, *range(2, dy.dim())])

    @override
    def bias_tangent(self, d_bias: Tensor, dy: Tensor) -> Tensor:
        return d_bias.to(dy.dtype).view(1, -1, *[1] * (dy.dim() - 2)).expand_as(dy)


class Linear(_Product):
    """A linear layer."""

    @override
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch._C._nn.linear(x, weight, bias)

    @override
    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor, Tensor]:
        dx: Any = dy @ weight if of_x else None
        dweight: Any = dy.flatten(0, -2).t() @ x.flatten(0, -2) if of_weight else None
        return dx, dweight

    @override
    def bias_gradient(self, dy: Tensor) -> Tensor:
        return dy.sum(list(range(dy.dim() - 1)))

    @override
    def bias_tangent(self, d_bias: Tensor, dy: Tensor) -> Tensor:
        return d_bias.to(dy.dtype).expand_as(dy)


class _Unary(Operation):
    """An operation on one tensor whose gradient is linear in ``dy``."""

    def __init__(self, x: int) -> None:
        self.x = x

    @override
    def reads(self) -> Sequence[int]:
        return (self.x,)

    @override
    def backward(self, run: Backward, dy: Tensor) -> None:
        run.add(self.x, self.input_gradient(dy, run.saved[self.index]), owned=self.makes_new)

    @override
    def double_backward(self, run: DoubleBackward, dy: Any) -> None:
        tangent = run.tangents[self.x]
        if tangent is not None:
            run.tangents[self.out] = self.tangent(tangent, run.saved[self.index])

    makes_new = True

    @abstractmethod
    def input_gradient(self, dy: Tensor, saved: Any) -> Tensor:
        """Return ``dx``, the gradient of the input."""

    @abstractmethod
    def tangent(self, v: Tensor, saved: Any) -> Tensor:
        """Return the cotangent of ``dy``, given that of ``dx``."""


class Activation(_Unary):
    """ReLU or ReLU6."""

    def __init__(self, x: int, activation: str) -> None:
        super().__init__(x)
        self.is_relu = activation == "relu"

    @override
    def forward(self, run: Forward) -> None:
        x = run.values[self.x]
        run.values[self.out] = y = torch.relu(x) if self.is_relu else torch.clamp(x, 0, 6)
        if run.saved is not None:
            run.saved[self.index] = y if self.is_relu else x

    @override
    def input_gradient(self, dy: Tensor, saved: Any) -> Tensor:
        if self.is_relu:
            return _aten.threshold_backward.default(dy, saved, 0)
        return _aten.hardtanh_backward.default(dy, saved, 0.0, 6.0)

    @override
    def tangent(self, v: Tensor, saved: Any) -> Tensor:
        return self.input_gradient(v, saved)

    @override
    def keeps(self) -> Sequence[int]:
        return (self.out if self.is_relu else self.x,)


class Reshape(_Unary):
    """A reshape."""

    makes_new = False

    def __init__(self, x: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(x)
        self.function = function

    @override
    def forward(self, run: Forward) -> None:
        x = run.values[self.x]
        run.values[self.out] = y = self.function(x)
        if run.saved is not None:
            run.saved[self.index] = x.shape, y.shape

    @override
    def input_gradient(self, dy: Tensor, saved: Any) -> Tensor:
        return dy.reshape(saved[0])

    @override
    def tangent(self, v: Tensor, saved: Any) -> Tensor:
        return v.reshape(saved[1])


class Pool(_Unary):
    """Average pooling.

    Args:
        x: the slot of the input.
        forward: maps the input to the result.
        backward: maps ``dy`` and the input to ``dx``.
        tangent: maps the cotangent of ``dx`` to that of ``dy``; by default ``forward``. Given where rounding
            differs from that of ``forward``.
    """

    def __init__(
        self,
        x: int,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor], Tensor],
        tangent: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(x)
        self._forward, self._backward, self._tangent = forward, backward, tangent or forward

    @override
    def forward(self, run: Forward) -> None:
        x = run.values[self.x]
        run.values[self.out] = self._forward(x)
        if run.saved is not None:
            run.saved[self.index] = x

    @override
    def input_gradient(self, dy: Tensor, saved: Any) -> Tensor:
        return self._backward(dy, saved)

    @override
    def tangent(self, v: Tensor, saved: Any) -> Tensor:
        return self._tangent(v)

    @override
    def keeps(self) -> Sequence[int]:
        return (self.x,)


class MaxPool(_Unary):
    """2D max pooling; ``options`` are kernel size, stride, padding, dilation and ceil mode."""

    def __init__(self, x: int, options: Sequence[Any]) -> None:
        super().__init__(x)
        self.options = options

    @override
    def forward(self, run: Forward) -> None:
        x = run.values[self.x]
        run.values[self.out], indices = _aten.max_pool2d_with_indices.default(x, *self.options)
        if run.saved is not None:
            run.saved[self.index] = x, indices

    @override
    def input_gradient(self, dy: Tensor, saved: Any) -> Tensor:
        x, indices = saved
        return _aten.max_pool2d_with_indices_backward.default(dy, x, *self.options, indices)

    @override
    def tangent(self, v: Tensor, saved: Any) -> Tensor:
        indices = saved[1]
        return v.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)

    @override
    def keeps(self) -> Sequence[int]:
        return (self.x,)


class Add(Operation):
    """The sum of two tensors of the same type, one of which may be broadcast."""

    def __init__(self, one: int, other: int) -> None:
        self.one, self.other = one, other

    @override
    def reads(self) -> Sequence[int]:
        return self.one, self.other

    @override
    def forward(self, run: Forward) -> None:
        one, other = run.values[self.one], run.values[self.other]
        if one.dtype != other.dtype:
            raise NotFittingError("the operands of a sum differ in type")
        run.values[self.out] = y = one + other
        if run.saved is not None and one.shape != other.shape:
            run.saved[self.index] = one.shape, other.shape, y.shape

    @override
    def backward(self, run: Backward, dy: Tensor) -> None:
        shapes = run.saved[self.index]
        for i, operand in enumerate((self.one, self.other)):
            grad = dy if shapes is None else dy.sum_to_size(shapes[i])
            run.add(operand, grad, owned=False)

    @override
    def double_backward(self, run: DoubleBackward, dy: Any) -> None:
        terms = [t for t in (run.tangents[self.one], run.tangents[self.other]) if t is not None]
        if terms:
            tangent = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            shapes = run.saved[self.index]
            run.tangents[self.out] = tangent if shapes is None else tangent.expand(shapes[2])


class Cat(Operation):
    """Concatenation along ``axis``."""

    def __init__(self, slots: Sequence[int], axis: int) -> None:
        self.slots, self.axis = slots, axis

    @override
    def reads(self) -> Sequence[int]:
        return self.slots

    @override
    def forward(self, run: Forward) -> None:
        slots = [run.values[part] for part in self.slots]
        if len({part.dtype for part in slots}) > 1:
            raise NotFittingError("the tensors of a concatenation differ in type")
        run.values[self.out] = torch.cat(slots, self.axis)
        if run.saved is not None:
            run.saved[self.index] = [part.shape for part in slots]

    @override
    def backward(self, run: Backward, dy: Tensor) -> None:
        sizes = [shape[self.axis] for shape in run.saved[self.index]]
        for slot, grad in zip(self.slots, dy.split(sizes, self.axis), strict=True):
            run.add(slot, grad, owned=False)

    @override
    def double_backward(self, run: DoubleBackward, dy: Any) -> None:
        tangents = [run.tangents[slot] for slot in self.slots]
        tangent = next((t for t in tangents if t is not None), None)
        if tangent is not None:
            shapes = run.saved[self.index]
            filled = [tangent.new_zeros(s) if t is None else t for t, s in zip(tangents, shapes, strict=True)]
            run.tangents[self.out] = torch.cat(filled, self.axis)
