"""Recurrence: the blended step, time averages on a grid, and the best iterate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.recurrence import Recurrence, projected
from gradl1_fast.training.methods.weights import leaf_of
from tests.gradients import assert_gradient
from tests.training.methods import small

W = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("bits", "count"), [(1, 2), (2, 3), (3, 7), (4, 15)])
def test_the_projection_has_the_scale_of_least_squares(bits, count):
    q = projected(W, bits)
    assert len(q.unique()) <= count
    assert float(((W - q) * q).sum()) == pytest.approx(0, abs=1e-12)


def test_the_special_grids_are_those_of_the_formulas():
    mean = W.abs().mean()
    assert torch.equal(projected(W, 1).sign(), W.sign())
    assert float(projected(W, 1).abs().max()) == pytest.approx(float(mean))
    kept = W.abs() > 0.7 * mean
    assert torch.equal(projected(W, 2) != 0, kept)
    assert float(projected(W, 2).abs().max()) == pytest.approx(float(W[kept].abs().mean()))


def layer():
    model = gl.convert(nn.Sequential(nn.Linear(5, 7, bias=False).double()))
    model[0].weight.data.copy_(W)
    return model, torch.randn(9, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_step_is_the_blend_less_the_gradient_at_the_codes(rho):
    model, x = layer()
    method = make("recurrence", model, w=2, a=None, rho=rho)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method.backward(lambda: model(x).square().mean())
    optimizer.step()
    method.after_step()
    q = projected(W, 2).requires_grad_()
    (gradient,) = torch.autograd.grad((x @ q.T).square().mean(), q)
    expected = (1 - rho) * W + rho * q.detach() - 0.1 * gradient
    assert_gradient(leaf_of(model[0]), expected, 1e-12)


def test_codes_of_a_bounded_latent_weight_average_to_the_optimum():
    """In one dimension: the share of the time at each neighbour is that of linear interpolation."""
    w, visits = 0.37, []
    for _ in range(10_000):
        q = float(round(w))
        w -= 0.01 * (q - 0.3)
        visits.append(q)
    assert sum(visits[1000:]) / 9000 == pytest.approx(0.3, abs=0.01)
    assert set(visits[1000:]) == {0.0, 1.0}


def test_the_best_window_is_kept_not_the_last_one():
    model, x = layer()
    method = make("recurrence", model, w=4, a=None, window=2)
    latent = leaf_of(model[0])
    weights = []
    for factor in (3.0, 3.0, 1.0, 1.0, 2.0, 2.0):
        latent.data.copy_(factor * W)
        method.backward(lambda: model(x).square().mean())
        method.after_step()
        weights.append(latent.detach().clone())
    assert float(method.best_loss) < 1e3
    method.close()
    assert torch.equal(model[0].weight, weights[3])


def test_the_best_iterate_comes_back_after_a_kill():
    made = small.trainer("recurrence-4")
    made.config.penalty.settings["window"] = 2
    small.advance(made, 3)
    small.advance(made, 3)
    method = made.objective
    assert isinstance(method, Recurrence)
    assert method.best
    other = make("recurrence", small.network(), w=4, a=4, window=2)
    other.load_state_dict(method.state_dict())
    assert other.best.keys() == method.best.keys() == other.model.state_dict().keys()
    assert float(other.best_loss) == float(method.best_loss)
    assert len(other._losses) == len(method._losses) == 1
    other.close()
    kept = {key.replace(".parametrizations.weight.original", ".weight"): v for key, v in method.best.items()}
    assert all(torch.equal(value, kept[key]) for key, value in other.model.state_dict().items())


@pytest.mark.parametrize(("rho", "window"), [(1.5, 1), (0.5, 0)])
def test_a_wrong_setting_is_named(rho, window):
    with pytest.raises(ValueError, match=r"Recurrence: (rho|window) must be"):
        make("recurrence", small.network(), w=2, a=4, rho=rho, window=window)
