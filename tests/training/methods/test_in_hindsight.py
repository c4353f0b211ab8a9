"""In-hindsight ranges: the recursion, independence of the present batch, unbiased gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.in_hindsight import HindsightRange, quantize_stochastically
from tests.gradients import assert_gradient
from tests.training.methods import small


def highs(values, momentum):
    """Return the upper end that each batch is quantized with."""
    made = HindsightRange(None, momentum)
    return [float(made.next(torch.tensor([-1.0, value]))[1]) for value in values]


def test_constant_statistics_are_a_fixed_point_at_once():
    assert highs([3.0] * 4, 0.9) == [3.0] * 4


def test_a_jump_is_approached_by_powers_of_the_momentum():
    found = highs([1.0] + [5.0] * 6, 0.5)
    assert found == pytest.approx([1.0, 1.0] + [5 + 0.5**t * (1 - 5) for t in range(1, 6)])


def test_without_momentum_the_range_is_that_of_the_batch_before():
    assert highs([1.0, 7.0, 2.0, 4.0], 0.0) == [1.0, 1.0, 7.0, 2.0]


def test_a_batch_is_quantized_with_the_range_from_before():
    model = gl.convert(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)))
    method = make("hindsight", model, w=None, a=8, g=None)
    method.backward(lambda: model(torch.tensor([[1.0, 2.0]])).sum())
    assert float(model[0].input_quantizer.high) == 2
    method.backward(lambda: model(torch.tensor([[50.0, 2.0]])).sum())
    assert float(model[0].input_quantizer.high) == 2  # that of the first batch
    assert float(method.ranges["0.input"].high) == pytest.approx(0.9 * 2 + 0.1 * 50)


def test_rounding_is_unbiased_inside_the_range_and_clamps_beyond():
    x = torch.tensor([0.13, -0.42, 0.999, 5.0]).repeat(40_000, 1)
    torch.manual_seed(0)
    found = quantize_stochastically(x, torch.tensor(-1.0), torch.tensor(1.0), 4).mean(0)
    assert found[:3].tolist() == pytest.approx([0.13, -0.42, 0.999], abs=0.005)
    grid = quantize_stochastically(x[:100], torch.tensor(-1.0), torch.tensor(1.0), 4)
    assert len(grid.unique()) <= 16
    assert float(grid.max()) <= 1.1


def test_the_gradient_of_every_layer_is_quantized():
    """With a range of one value on each side, few codes are left, and both products see them."""
    model = gl.convert(nn.Sequential(nn.Linear(3, 2, bias=False).double()))
    method = make("hindsight", model, w=None, a=None, g=3)
    x = torch.eye(3, dtype=torch.float64)
    of_y = torch.tensor([[1.0, -0.4], [0.3, 0.2], [-0.6, 0.9]], dtype=torch.float64)
    torch.manual_seed(0)
    method.backward(lambda: (model(x) * of_y).sum())
    torch.manual_seed(0)
    expected = quantize_stochastically(of_y, of_y.min(), of_y.max(), 3)
    assert not torch.equal(expected, of_y)
    assert_gradient(model[0].weight.grad, expected.T, 1e-12)
    assert not model[0]._forward_hooks
    assert float(method.gradients["0"].high) == pytest.approx(1)


def test_the_mean_gradient_is_that_without_quantization():
    torch.manual_seed(1)
    model = gl.convert(nn.Sequential(nn.Linear(3, 2, bias=False).double()))
    x, of_y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    method = make("hindsight", model, w=None, a=None, g=6)
    for _ in range(400):
        method.backward(lambda: (model(x) * of_y).sum())
    mean = model[0].weight.grad / 400
    torch.testing.assert_close(mean, of_y.T @ x, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"g": 17}, "g .*from 1 to 16"), ({"g": 8, "momentum": 1.0}, "momentum must be")],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make("hindsight", small.network(), w=8, a=8, **settings)
