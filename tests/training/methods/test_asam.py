"""ASAM: the move, and the gradient after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods.asam import adaptive_move
from tests.gradients import assert_gradient
from tests.networks import VGG, layers
from tests.training.methods import small, truth


def test_the_move_has_the_size_in_relative_units_and_the_direction_of_the_worst_case():
    generator = torch.Generator().manual_seed(0)
    weights, grads = ([torch.randn(s, generator=generator) for s in ((3, 2), (4,))] for _ in range(2))
    moves = adaptive_move(weights, grads, 0.3)
    relative = torch.cat([(m / w).flatten() for m, w in zip(moves, weights, strict=True)])
    assert float(relative.norm()) == pytest.approx(0.3)
    rise = sum(float((m * g).sum()) for m, g in zip(moves, grads, strict=True))
    scaled = torch.cat([(w * g).flatten() for w, g in zip(weights, grads, strict=True)])
    assert rise == pytest.approx(0.3 * float(scaled.norm()))  # the maximum over the ball


def test_the_gradient_is_that_at_the_moved_weights():
    model, plain = gl.convert(VGG.make()), VGG.make()
    terms, grads = small.step("asam", model, lambda: VGG.loss(model), rho=0.2)
    weights = [plain.get_submodule(name).weight for name in layers(plain)]
    loss = VGG.loss(plain)
    found = torch.autograd.grad(loss, weights)
    norm = sum((w * g).square().sum() for w, g in zip(weights, found, strict=True)).sqrt()
    with torch.no_grad():
        for weight, grad in zip(weights, found, strict=True):
            weight += 0.2 * weight**2 * grad / norm
    moved = VGG.loss(plain)
    assert float(terms.penalty) == pytest.approx(float((moved - loss).detach()), rel=1e-9)
    for name, expected in truth.differentiate(moved, plain).items():
        if name.endswith("weight") and name[:-7] in layers(plain):
            assert_gradient(grads[name], expected, 1e-9, name)


def test_no_gradient_gives_no_move():
    model = gl.convert(nn.Sequential(nn.Linear(2, 2)))
    terms, grads = small.step("asam", model, lambda: 0 * model(torch.ones(1, 2)).sum(), rho=0.2)
    assert terms.penalty == 0
    assert all(g.isfinite().all() for g in grads.values())
