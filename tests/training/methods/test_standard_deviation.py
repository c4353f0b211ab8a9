"""Intervals in units of the deviation: what is pruned, alpha's gradient, the logarithmic grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.standard_deviation import (
    DeviationGrid,
    DeviationSite,
    alpha_for,
    pruned_share,
)
from tests.gradients import assert_gradient
from tests.training.methods import small

W = torch.randn(8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def grid(alpha=2.5, logarithmic=False, weight=W):
    return DeviationGrid(weight, alpha, logarithmic, learned=True)


@pytest.mark.parametrize(("bits", "alpha", "share"), [(2, 2, 0.683), (3, 3, 0.383), (4, 3, 0.170)])
def test_the_share_of_zeros_of_a_normal_weight_is_the_closed_form(bits, alpha, share):
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    found = float((grid(alpha, weight=w).quantize(w, bits) == 0).float().mean())
    assert pruned_share(alpha, bits) == pytest.approx(share, abs=5e-4)
    assert found == pytest.approx(share, abs=0.004)
    assert alpha_for(pruned_share(alpha, bits), bits) == pytest.approx(alpha)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_the_grid_scales_with_the_weight(logarithmic):
    made = grid(logarithmic=logarithmic)
    torch.testing.assert_close(made.quantize(3.5 * W, 4), 3.5 * made.quantize(W, 4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_gradients_are_those_of_the_formula(bits):
    made, g, n = grid(1.2), torch.randn_like(W), 2 ** (bits - 1) - 1
    w = W.clone().requires_grad_()
    of_w, of_alpha = torch.autograd.grad((made.quantize(w, bits) * g).sum(), (w, made.alpha))
    sigma = W.std()
    s = 1.2 * sigma / n
    inside = (W / s).abs() <= n
    assert_gradient(of_w, torch.where(inside, g, torch.zeros_like(g)), 1e-10)
    slope = torch.where(inside, sigma / n * (torch.round(W / s) - W / s), sigma * W.sign())
    assert_gradient(of_alpha, (g * slope).sum() / math.sqrt(W.numel() * n), 1e-10)


def test_the_logarithmic_grid_has_powers_of_two_and_zero():
    made, end = grid(2.0, logarithmic=True), 2.0 * W.std()
    found = made.quantize(W, 3).detach() / end
    levels = sorted({round(abs(v), 9) for v in found.flatten().tolist()})
    assert levels == [0, 0.25, 0.5, 1]
    ratio = (W / end).abs()
    assert torch.equal(found == 0, ratio < 0.125)
    assert torch.equal(found.abs() == 1, ratio >= 2**-0.5)
    assert (found.sign() * W.sign() >= 0).all()


def test_an_activation_ends_at_a_multiple_of_its_moving_deviation():
    site, x = DeviationSite(2.0, torch.zeros((), dtype=torch.float64), learned=True), W.relu()
    first = site(x, 4)
    assert float(site.sigma) == pytest.approx(float(x.std()))
    site(2 * x, 4)
    assert float(site.sigma) == pytest.approx(1.1 * float(x.std()))
    end = 2 * x.std()
    torch.testing.assert_close(first, (end / 15 * torch.round(x / end * 15)).clamp(max=float(end)))
    site.eval()(5 * x, 4)
    assert float(site.sigma) == pytest.approx(1.1 * float(x.std()))
    assert site.signed == 0
    site.train()(W, 4)
    assert len(site(W, 3).unique()) <= 7


def test_pruning_keeps_to_the_share_and_does_not_learn_alpha():
    model = small.network()
    nn.init.normal_(model[8].weight)
    method = make("deviation", model, w=4, a=4, prune=0.6)
    with method.quantized(4, 4):
        zeros = float((model[8].weight == 0).float().mean())
    assert zeros == pytest.approx(0.6, abs=0.05)
    assert not method.grids["8"].alpha.requires_grad


def test_alpha_is_frozen_after_the_joint_steps_also_when_resumed():
    model = small.network()
    method = make("deviation", model, w=4, a=4, joint_steps=2)
    method.after_step()
    assert method.grids["0"].alpha.requires_grad
    method.after_step()
    holders = [*method.grids.values(), *method.sites.values()]
    assert len(holders) == 5
    assert not any(holder.alpha.requires_grad for holder in holders)
    state = method.state_dict()
    method.close()
    resumed = make("deviation", model, w=4, a=4, joint_steps=2)
    resumed.load_state_dict(state)
    assert not resumed.grids["0"].alpha.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"w": 1}, "w must be from 2 to 16, got 1"), ({"w": 4, "prune": 1.0}, "prune must be between 0 and 1")],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make("deviation", small.network(), a=4, **settings)
