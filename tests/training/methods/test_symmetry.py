"""SymReg: the term against its formula, and what symmetry is good for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods.symmetry import asymmetry
from tests.gradients import assert_gradient
from tests.training.methods import small

NORMAL = torch.randn(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VALUES = NORMAL + 0.3 * NORMAL**2 - 0.4  # skewed: sums of pairs have both signs


def formula(w, group):
    """The two sums of the docstring, written out with indices from 1."""
    v = dict(enumerate(sorted(w.flatten(), key=float), 1))
    n = len(v)
    if group == 1:
        return 2 / n * sum((v[i] + v[n + 1 - i]).abs() for i in range(1, n // 2 + 1))
    pairs = range(1, n // 4 + 1)
    return 4 / n * sum((v[2 * i - 1] + v[2 * i] + v[n - 2 * i + 1] + v[n - 2 * i + 2]).abs() for i in pairs)


@pytest.mark.parametrize("group", [1, 2])
def test_the_term_and_its_gradient_are_those_of_the_formula(group):
    mine, theirs = (VALUES.clone().requires_grad_() for _ in range(2))
    one, other = asymmetry(mine, group), formula(theirs, group)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    assert_gradient(*torch.autograd.grad(one, mine), *torch.autograd.grad(other, theirs), rtol=1e-12)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_weights_have_no_term_and_no_drift(group, bits):
    weight = torch.cat([VALUES, -VALUES])
    assert asymmetry(weight, group) == 0
    layer = gl.convert(nn.Sequential(nn.Linear(26, 1, bias=False).double()))[0]
    layer.weight.data.copy_(weight[None])
    layer.weight_quantizer.bits = bits
    assert float((layer.weight_quantizer(layer.weight) - layer.weight).sum()) == pytest.approx(0, abs=1e-14)


def test_shifted_weights_have_a_term_of_twice_the_shift():
    assert float(asymmetry(torch.cat([VALUES, -VALUES]) + 0.25)) == pytest.approx(0.5)


def test_depthwise_convolutions_are_left_out():
    model = small.network()
    terms, _ = small.step("symreg", model, lambda: model(small.IMAGES[0]).mean(), coefficient=0.5)
    assert terms.parts.keys() == {"0.weight", "8.weight"}
    assert float(terms.penalty) == pytest.approx(0.5 * sum(map(float, terms.parts.values())))
    deep = gl.convert(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))
    with pytest.raises(ValueError, match="all layers are depthwise"):
        small.step("symreg", deep, lambda: None, coefficient=0.5)


def test_a_wrong_group_is_named():
    with pytest.raises(ValueError, match="group must be 1 or 2, got 3"):
        small.step("symreg", small.network(), lambda: None, coefficient=0.5, group=3)
