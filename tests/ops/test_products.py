"""Passes of convolutions and linear layers called directly, in ways that autograd does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gradients import assert_gradients
from tests.ops.cases import random
from tests.ops.sweeps import leaf, random_like

_ops = torch.ops.gradl1_fast


class Product(NamedTuple):
    """An operation that is linear in its input and in its weight."""

    name: str
    truth: Callable[[Tensor, Tensor], Tensor]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: tuple[Any, ...]

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Any:
        return getattr(_ops, f"{self.name}_backward")(dy, x, weight, *self.geometry, mask)

    def operands(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Return a gradient of the output, an input and a weight."""
        x, weight = random(self.x, 1).to(dtype), random(self.weight, 2).to(dtype)
        return [random_like(self.truth(x, weight), 3), x, weight]


CONV = Product(
    "conv", lambda x, w: F.conv2d(x, w, padding=1), (2, 3, 5, 4), (4, 3, 3, 3), ([1] * 2,) * 3 + (1,)
)
CONV_TRANSPOSE = Product(
    "conv_transpose",
    lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1),
    (2, 3, 3, 4),
    (3, 4, 3, 3),
    ([2] * 2, [0] * 2, [1] * 2, [1] * 2, 1),
)
LINEAR = Product("linear", F.linear, (4, 3), (5, 3), ())
each = pytest.mark.parametrize("product", [CONV, CONV_TRANSPOSE, LINEAR], ids=lambda p: p.name)


@each
def test_a_double_backward_of_both_gradients_at_once(product: Product) -> None:
    # Autograd asks for the two gradients one by one; the operators take both.
    dy, x, weight = map(leaf, product.operands())
    dx, dweight = torch.autograd.grad(product.truth(x, weight), (x, weight), dy, create_graph=True)
    d_dx, d_dweight = random_like(dx, 4), random_like(dweight, 5)
    expected = torch.autograd.grad((dx, dweight), (dy, x, weight), (d_dx, d_dweight))
    double_backward = getattr(_ops, f"{product.name}_double_backward")
    saved = (dy.detach(), x.detach(), weight.detach(), *product.geometry)
    assert_gradients(double_backward(d_dx, d_dweight, *saved, [True] * 3), expected)
    for index in range(3):
        mask = [i == index for i in range(3)]
        one = double_backward(d_dx, d_dweight, *saved, mask)
        assert torch.equal(one[index], double_backward(d_dx, d_dweight, *saved, [True] * 3)[index])
        assert [tuple(t.shape) == (0,) for t in one] == [not wanted for wanted in mask]


@each
@pytest.mark.parametrize("mask", [[True, False], [False, True]], ids=["input", "weight"])
def test_the_gradient_of_a_single_operand(product: Product, mask: list[bool]) -> None:
    dy, x, weight = product.operands()
    other = weight if mask[0] else x  # the operand on which the gradient depends
    other.requires_grad_()
    result = product.backward(dy, x, weight, mask)
    assert [t.numel() > 0 for t in result] == mask
    assert [tuple(t.shape) == (0,) for t in result] == [not wanted for wanted in mask]
    wanted = result[mask.index(True)]
    cotangent = random_like(wanted, 4)
    (found,) = torch.autograd.grad(wanted, other, cotangent)
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    truth = torch.autograd.grad(product.truth(x, weight), (x, weight)[not mask[0]], dy, create_graph=True)
    (expected,) = torch.autograd.grad(truth, (x, weight)[mask[0]], cotangent)
    assert_gradients([found], [expected])


@each
def test_an_operator_called_directly_does_not_use_autocast(product: Product) -> None:
    dy, x, weight = product.operands(torch.float32)
    expected = product.backward(dy, x, weight, [True, True])
    with torch.autocast("cpu", torch.bfloat16):
        found = product.backward(dy, x, weight, [True, True])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
