"""Any-Precision: the squashed codes, and the chain of teachers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.any_precision import SquashedCodes, soft_cross_entropy
from tests.gradients import assert_gradient

W = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_codes_are_those_of_the_formula(bits):
    n = 2**bits - 1
    t = torch.tanh(W)
    expected = W.abs().mean() * (2 * torch.round(n * (t / (2 * t.abs().max()) + 0.5)) / n - 1)
    torch.testing.assert_close(SquashedCodes().quantize(W, bits), expected, rtol=1e-12, atol=1e-14)
    assert len(expected.unique()) <= 2**bits


def test_float_is_the_limit_of_many_bits():
    torch.testing.assert_close(SquashedCodes()(W), SquashedCodes().quantize(W, 16), rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_the_unrounded_weight():
    w, g = W.clone().requires_grad_(), torch.randn_like(W)
    (found,) = torch.autograd.grad((SquashedCodes().quantize(w, 3) * g).sum(), w)
    # E and the largest tanh are constants
    expected = g * W.abs().mean() * (1 - torch.tanh(W) ** 2) / torch.tanh(W).abs().max()
    assert_gradient(found, expected, 1e-12)


def test_the_soft_loss_is_the_hard_one_for_a_sure_teacher():
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
    sure = 1000 * F.one_hot(y, 3).float()
    torch.testing.assert_close(soft_cross_entropy(logits, sure), F.cross_entropy(logits, y))


def test_each_width_is_taught_by_the_next_wider_one():
    torch.manual_seed(0)
    model = gl.convert(nn.Sequential(nn.Linear(6, 5).double()))
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 5
    method = make("any-precision", model, widths="8 4 2", coefficient=0.5)
    terms = method.backward(lambda: F.cross_entropy(model(x), y))
    losses, teacher = [], None
    for w, a in method.widths:
        model.eval()
        with method.quantized(w, a):
            logits = model(x).detach()
        losses.append(F.cross_entropy(logits, y) if teacher is None else soft_cross_entropy(logits, teacher))
        teacher = logits
    assert float(terms.loss) == pytest.approx(float(losses[0]), rel=1e-9)
    assert float(terms.penalty) == pytest.approx(0.5 * float(losses[1] + losses[2]), rel=1e-9)
