"""Step times gradient norm: what the penalty would measure, and nothing is changed by measuring."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.loop.norms import step_norms
from gradl1_fast.training.models import digits_net
from tests.networks import NETWORKS


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.id)
def test_they_are_the_terms_of_the_step_scaled_penalty(network):
    model = gl.convert(network.make())
    found = step_norms(model, lambda: network.loss(model))
    penalty = gl.GradL1(model, 1.0, 1.0, scale="step")
    penalty(network.loss(model))
    assert found.keys() == penalty.terms.keys()
    for name, value in penalty.terms.items():
        torch.testing.assert_close(found[name], value.to(found[name].dtype), rtol=1e-5, atol=0)


def test_measuring_changes_nothing():
    torch.manual_seed(0)
    model = gl.convert(nn.Sequential(*digits_net(4), nn.Dropout(0.5)))
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    F.cross_entropy(model(x), y).backward()
    before, grads = state_of(model), [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    step_norms(model, lambda: F.cross_entropy(model(x), y))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


def test_a_frozen_weight_is_left_out():
    torch.manual_seed(0)
    model = gl.convert(digits_net(4))
    next(model.parameters()).requires_grad_(False)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    assert "0.weight" not in step_norms(model, lambda: F.cross_entropy(model(x), y))
