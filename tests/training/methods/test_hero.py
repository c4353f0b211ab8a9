"""HERO on a quadratic loss, where everything is known in closed form, and on a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.asam import adaptive_move
from tests.gradients import assert_gradient
from tests.training.methods import small

H_SIZE, COEFFICIENT = 0.4, 3.0


def quadratic():
    """A model with one weight w of shape (1, 5), and the loss w H w / 2 with its matrix."""
    torch.manual_seed(0)
    model = gl.convert(nn.Sequential(nn.Linear(5, 1, bias=False).double()))
    root = torch.randn(5, 5, dtype=torch.float64)
    # |model(root)|^2 / 2 is w (root' root) w / 2
    return model, root.T @ root, lambda: model(root).square().sum() / 2


def test_on_a_quadratic_loss_the_gradient_is_known():
    model, matrix, loss = quadratic()
    w = model[0].weight.detach().clone()
    terms, grads = small.step("hero", model, loss, h=H_SIZE, coefficient=COEFFICIENT)
    (z,) = adaptive_move([w], [w @ matrix], H_SIZE)
    change = z @ matrix
    expected = (w + z) @ matrix + 2 * COEFFICIENT / w.numel() * change @ matrix
    assert_gradient(grads["0.weight"], expected, 1e-10)
    assert float(terms.parts["0.weight"]) == pytest.approx(float(change.square().mean()))
    moved = float(((w + z) @ matrix @ (w + z).T) / 2)
    assert float(terms.loss + terms.penalty) == pytest.approx(
        moved + COEFFICIENT * float(change.square().mean())
    )


def test_a_scaled_loss_scales_the_gradient():
    found = []
    for factor in (1, 8):
        model, _, loss = quadratic()
        method = make("hero", model, h=H_SIZE, coefficient=COEFFICIENT)
        terms = method.backward(loss, lambda value, factor=factor: factor * value)
        found.append((model[0].weight.grad / factor, terms.penalty))
    assert_gradient(found[1][0], found[0][0], 1e-10)
    torch.testing.assert_close(found[1][1], found[0][1])


def test_the_weights_are_restored_after_an_error():
    model, _, loss = quadratic()
    before, calls = model[0].weight.detach().clone(), iter((False, True))

    def fail():
        if next(calls):
            raise KeyboardInterrupt
        return loss()

    method = make("hero", model, h=H_SIZE, coefficient=COEFFICIENT)
    with pytest.raises(KeyboardInterrupt):
        method.backward(fail)
    assert torch.equal(model[0].weight, before)


def test_batch_norms_keep_the_statistics_of_the_first_pass():
    mine, plain = small.network(), small.network()
    x, y = small.IMAGES
    for name, model, settings in (("hero", mine, {"h": 0.5, "coefficient": 1.0}), ("plain", plain, {})):
        small.step(name, model, lambda model=model: nn.functional.cross_entropy(model(x), y), **settings)
    for (key, one), (_, other) in zip(mine.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(one, other), key
