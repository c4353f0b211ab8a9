"""SatNL: weights through tanh, from the weights that were there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.saturation import Saturated
from gradl1_fast.training.methods.weights import leaf_of
from tests.gradients import assert_gradient
from tests.training.methods import small


def linear(factor=1.0):
    torch.manual_seed(0)
    model = gl.convert(nn.Sequential(nn.Linear(6, 4).double()))
    model[0].weight.data *= factor
    return model


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_it_begins_at_the_weight_and_ends_with_it(factor):
    model = linear(factor)
    before, parameter = model[0].weight.detach().clone(), model[0].weight
    method = make("satnl", model)
    torch.testing.assert_close(model[0].weight, before, rtol=1e-12, atol=1e-15)
    assert leaf_of(model[0]) is parameter
    method.close()
    assert model[0].weight is parameter
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=1e-12, atol=1e-15)


def test_the_gradient_has_the_slope_of_tanh():
    model, x = linear(), torch.randn(5, 6, dtype=torch.float64)
    weight = model[0].weight.detach().clone()
    _, grads = small.step("satnl", model, lambda: model(x).square().sum())
    slope = 1 - weight**2
    assert_gradient(
        grads["0.parametrizations.weight.original"],
        2 * (x @ weight.T + model[0].bias.detach()).T @ x * slope,
        1e-12,
    )


def test_the_weight_is_odd_and_bounded():
    v = torch.linspace(-50, 50, 101, dtype=torch.float64).reshape(1, -1)
    function = Saturated(torch.zeros(1, 1))
    assert torch.equal(function(-v), -function(v))
    assert function(v).abs().max() <= 1


def test_a_normal_latent_weight_gives_the_kurtosis_of_a_uniform_one():
    v = 0.8 * torch.randn(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.tanh(v)
    kurtosis = ((w - w.mean()) / w.std()).pow(4).mean()
    assert float(kurtosis) == pytest.approx(1.77, abs=0.02)


def test_it_combines_with_symmetric_weights_and_asam(trained):
    method = trained("symreg+satnl+asam").trainer.objective
    assert method.passes == 2
    assert not method.distributed


def test_a_second_parametrization_is_refused_and_the_first_one_stays():
    model = small.network()
    nn.utils.parametrize.register_parametrization(model[8], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"Saturated: the weight of .* is computed already"):
        make("satnl", model)
    assert not nn.utils.parametrize.is_parametrized(model[0])
