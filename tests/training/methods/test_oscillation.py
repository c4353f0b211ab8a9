"""The oscillation regulariser: its gradient in closed form, and where it drives a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from tests.gradients import assert_gradient
from tests.training.methods import small


def layer():
    torch.manual_seed(0)
    return gl.convert(nn.Sequential(nn.Linear(7, 3, bias=False).double()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gradient_points_away_from_the_grid(bits):
    model = layer()
    w = model[0].weight.detach().clone()
    zero = lambda: 0 * model(torch.ones(1, 7, dtype=torch.float64)).sum()  # noqa: E731
    terms, grads = small.step("oscillation", model, zero, coefficient=0.7, bits=bits)
    scale = w.abs().max() / (2 ** (bits - 1) - 1)
    q = scale * torch.round(w / scale)
    assert_gradient(grads["0.weight"], 0.7 * 2 * (q - w) / w.numel(), 1e-10)
    assert float(terms.penalty) == pytest.approx(0.7 * float((q**2 - w**2).mean()), rel=1e-10)


def test_gradient_descent_moves_weights_between_grid_points():
    model = layer()
    method = make("oscillation", model, coefficient=1.0, bits=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)

    def distance():
        w = model[0].weight.detach()
        scale = w.abs().max() / 3
        return float((w / scale - torch.round(w / scale)).abs().mean())

    before = distance()
    for _ in range(20):
        optimizer.zero_grad()
        method.backward(lambda: 0 * model(torch.ones(1, 7, dtype=torch.float64)).sum())
        optimizer.step()
    assert distance() > before + 0.05
    assert model[0].weight_quantizer.bits is None


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="Oscillation: bits must be from 1 to 16, got 17"):
        make("oscillation", layer(), coefficient=1.0, bits=17)
