"""R2: the three measures of a range and their gradients."""

from __future__ import annotations

import pytest
import torch

from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.range_regularisation import largest, margin, soft_range
from tests.gradients import assert_gradient
from tests.training.methods import small

W = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_largest_magnitude_has_a_gradient_at_one_weight():
    w = W.clone().requires_grad_()
    (grad,) = torch.autograd.grad(largest(w), w)
    place = int(W.abs().argmax())
    expected = torch.zeros(36, dtype=torch.float64)
    expected[place] = W.flatten()[place].sign()
    assert torch.equal(grad.flatten(), expected)


@pytest.mark.parametrize("function", [margin, soft_range])
def test_the_gradients_are_those_of_differences(function):
    w, other = W.clone().requires_grad_(), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (w, other), atol=1e-6)


def test_the_margin_is_the_limit_and_what_lies_beyond():
    limit = torch.tensor(-0.5, dtype=torch.float64)
    expected = 0.5 + sum(max(abs(float(v)) - 0.5, 0) for v in W.flatten())
    assert float(margin(W, limit)) == pytest.approx(expected)


def test_the_limit_is_learned_until_one_weight_lies_beyond():
    """The gradient is 1 less the number of weights beyond the limit."""
    limit = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(margin(W, limit), limit)
    assert_gradient(grad, torch.tensor(1.0 - float((W.abs() > 0.5).sum())), 1e-12)


def test_a_hot_soft_range_is_the_range():
    temperature = torch.tensor(500.0, dtype=torch.float64)
    assert float(soft_range(W, temperature)) == pytest.approx(float(W.max() - W.min()), rel=1e-6)


@pytest.mark.parametrize("kind", ["margin", "soft"])
def test_what_is_learned_joins_the_model_and_leaves_it(kind, trained):
    assert "0.r2" in trained(f"r2-{kind}").state
    model = small.network()
    method = make("r2", model, coefficient=0.1, kind=kind)
    start = float(model[0].r2)
    assert start > 0
    method.close()
    assert not hasattr(model[0], "r2")
    trained_value = float(trained(f"r2-{kind}").state["0.r2"])
    assert trained_value != pytest.approx(start)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind must be one of 'max', 'margin', 'soft', got 'l2'"):
        make("r2", small.network(), coefficient=0.1, kind="l2")
