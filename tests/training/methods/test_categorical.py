"""CPQ: the mode, the probabilities, and where their gradient is small."""

from __future__ import annotations

import pytest
import torch

from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.categorical import CategoricalGrid, grid_indices, probabilities
from tests.gradients import assert_gradient
from tests.training.methods import small

W = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def made(bits=3, ratio=None, mode_only=False):
    grid = CategoricalGrid(W, bits, mode_only)
    if ratio is not None:
        grid.log_spread.data = grid.log_step.data + torch.tensor(ratio).log()
    return grid


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_value_is_the_nearest_grid_point(bits):
    grid = made(bits)
    step = float(grid.log_step.detach().exp())
    half = 2 ** (bits - 1)
    expected = step * torch.round(W / step).clamp(-half, half - 1)
    torch.testing.assert_close(grid.quantize(W, bits).detach(), expected, rtol=1e-12, atol=0)


def test_probabilities_sum_to_one_also_far_beyond_the_grid():
    x = torch.tensor([-1e6, -3.0, 0.2, 1e6], dtype=torch.float64)
    r = probabilities(x, grid_indices(3).double(), torch.tensor(1.0), torch.tensor(0.1))
    torch.testing.assert_close(r.sum(-1), torch.ones(4, dtype=torch.float64))
    assert r.argmax(-1).tolist() == [0, 1, 4, 7]


def test_the_probability_of_a_grid_point_is_stationary_at_it():
    grid = grid_indices(4).double()
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for spread in (0.1, 0.33):
        mass = torch.sigmoid((grid + 0.5 - x) / spread) - torch.sigmoid((grid - 0.5 - x) / spread)
        (slope,) = torch.autograd.grad(mass[8], x)
        assert abs(float(slope)) < 1e-12
        r = probabilities(x, grid, torch.tensor(1.0).double(), torch.tensor(spread).double())
        (slope,) = torch.autograd.grad(r[8], x)
        assert abs(float(slope)) < 1e-3


def gradient_at(x, grid, bits=4):
    w = torch.full((1,), x, dtype=torch.float64, requires_grad=True)
    return float(torch.autograd.grad(grid.quantize(w, bits).sum(), w)[0])


def test_the_gradient_is_small_at_grid_points_and_large_between_them():
    grid = made(4, ratio=0.1)
    step = float(grid.log_step.detach().exp())
    for index in (-3, 0, 2):
        assert gradient_at(index * step, grid) < 0.2 * gradient_at((index + 0.5) * step, grid)


def test_the_mode_alone_gives_the_bin_of_zero_no_gradient():
    step = float(made(4).log_step.detach().exp())
    assert gradient_at(0.3 * step, made(4, mode_only=True)) == 0
    assert gradient_at(0.3 * step, made(4)) > 0
    assert gradient_at(1.3 * step, made(4, mode_only=True)) != 0


def test_the_gradients_are_those_of_the_definition():
    """Of the weight, the distance and the noise: r stands for the one-hot code, and g is differentiated."""
    grid, g = made(3), torch.randn_like(W)
    w = W.clone().requires_grad_()
    found = torch.autograd.grad((grid.quantize(w, 3) * g).sum(), (w, grid.log_step, grid.log_spread))
    points, (w2, log_step, log_spread) = (
        grid_indices(3).double(),
        (t.detach().clone().requires_grad_() for t in (W, grid.log_step, grid.log_spread)),
    )
    r = probabilities(w2, log_step.exp() * points, log_step.exp(), log_spread.exp())
    codes = r.argmax(-1)
    step = log_step.exp()
    through_r = (r * (step.detach() * points)).sum(-1)
    through_g = step * points[codes]
    expected = torch.autograd.grad(((through_r + through_g) * g).sum(), (w2, log_step, log_spread))
    for one, other in zip(found, expected, strict=True):
        assert_gradient(one, other, 1e-10)


@pytest.mark.parametrize(
    ("w", "message"), [(9, "w must be from 1 to 8, got 9"), (0, "w must be from 1 to 16")]
)
def test_a_wrong_width_is_named(w, message):
    with pytest.raises(ValueError, match=message):
        make("cpq", small.network(), w=w, a=4)
