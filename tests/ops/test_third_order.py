"""A derivative of third order raises an error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradl1_fast import functional as ours
from tests.ops.cases import CASES, Case
from tests.ops.sweeps import leaf, random_like, scalar_probe

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
refused = pytest.raises(RuntimeError, match="first and second order gradients only")


def _second_order(case: Case) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return a sum over all second-order gradients, the inputs, and the first incoming gradient."""
    leaves = [leaf(t) for t in case.inputs()]
    probe = scalar_probe(leaves[0]) if case.probe else None
    y = case.call(leaves, probe)
    dy = leaf(random_like(y, 11))
    asked = leaves if probe is None else [*leaves, probe]
    first = torch.autograd.grad(y, asked, dy, create_graph=True)
    second = torch.autograd.grad(
        sum(g.sin().sum() for g in first), [*leaves, dy], create_graph=True, allow_unused=True
    )
    return sum(g.sum() for g in second if g is not None), leaves, dy


@each_case
def test_grad(case: Case) -> None:
    total, leaves, dy = _second_order(case)
    # The gradients of a tap and of a quantizer, whose mask is piecewise constant, ignore their input.
    for target in [[dy]] if case.op in ("tap", "fake_quantize") else [[dy], leaves[:1], leaves]:
        with refused:
            torch.autograd.grad(total, target, retain_graph=True, allow_unused=True)


@each_case
def test_backward(case: Case) -> None:
    with refused:
        _second_order(case)[0].backward()


@each_case
def test_three_derivatives_of_one_input(case: Case) -> None:
    x, *rest = (leaf(t) for t in case.inputs())
    value = case.call([x, *rest], scalar_probe(x) if case.probe else None).exp().sum()
    first = torch.autograd.grad(value, x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    with refused:
        torch.autograd.grad(second.square().sum(), x)


def test_forward_mode_raises_rather_than_losing_tangents() -> None:
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            ours.linear(dual, w)
