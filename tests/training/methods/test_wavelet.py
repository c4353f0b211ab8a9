"""One model for all: the wavelet, and the levels that it gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.wavelet import HaarGrid, haar, inverse_haar, on_levels
from tests.gradients import assert_gradient

W = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize("axis", [0, 1])
def test_back_and_forth_is_the_identity(size, axis):
    w = W[:size] if axis == 0 else W[:, :size]
    bands = haar(w, axis)
    assert bands[0].shape[axis] == -(-w.shape[axis] // 2)
    torch.testing.assert_close(inverse_haar(*bands, axis, w.shape[axis]), w, rtol=1e-12, atol=1e-14)


def test_the_transform_is_orthonormal():
    """So the error of the weight is that of the bands."""
    a, d = haar(W, 1)
    assert float(a.square().sum() + d.square().sum()) == pytest.approx(float(W.square().sum()))
    found = HaarGrid(1).quantize(W, 3)
    errors = [(on_levels(band, 3) - band).square().sum() for band in (a, d)]
    assert float((found - W).square().sum()) == pytest.approx(float(sum(errors)))


@pytest.mark.parametrize(("bits", "levels", "sums"), [(1, 2, 3), (2, 4, 7), (3, 8, 15)])
def test_a_sum_of_two_levels_has_more_levels(bits, levels, sums):
    ends = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    band = on_levels(ends, bits).unique()
    assert len(band) == levels
    both = (band[:, None] + band[None]).flatten()
    assert len({round(float(v), 9) for v in both}) == sums


def test_levels_are_even_and_reach_both_ends():
    found = on_levels(W, 2).unique()
    torch.testing.assert_close(found.diff(), found.diff()[0].expand(3))
    assert float(found[-1]) == pytest.approx(float(W.abs().max())) == pytest.approx(-float(found[0]))
    assert float(on_levels(W, 1).abs().max()) == pytest.approx(float(W.abs().mean()))


def test_the_gradient_passes():
    w, g = W.clone().requires_grad_(), torch.randn_like(W)
    assert_gradient(*torch.autograd.grad((HaarGrid(1).quantize(w, 2) * g).sum(), w), g, 1e-12)


def test_widths_are_switched_without_training(trained):
    outputs = trained("wavelet").own
    assert list(outputs) == [(b, b) for b in (8, 6, 4, 3, 2, 1)]
    assert len({round(float(y.sum()), 5) for y in outputs.values()}) == 6


def test_the_axis_is_that_of_the_input_channels():
    model = gl.convert(nn.Sequential(nn.ConvTranspose2d(2, 3, 1), nn.Conv2d(3, 2, 1)))
    method = make("wavelet", model, widths="4")
    assert [grid.axis for grid in method.grids.values()] == [0, 1]
