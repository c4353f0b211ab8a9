"""DropBits: masks of grid points and of widths."""

from __future__ import annotations

import math

import pytest
import torch

from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.categorical import CategoricalGrid
from gradl1_fast.training.methods.drop_bits import (
    HIGH,
    LOW,
    TEMPERATURE,
    DroppedGrid,
    expected_mask,
    hard_concrete,
)
from tests.training.methods import small

W = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_mask_is_that_of_the_formula():
    u, p = torch.tensor([0.01, 0.3, 0.7, 0.99]), 0.6
    s = torch.sigmoid(((u / (1 - u)).log() + math.log(p / (1 - p))) / TEMPERATURE)
    expected = (s * (HIGH - LOW) + LOW).clamp(0, 1)
    logits = torch.full((4,), math.log(p / (1 - p)))
    torch.testing.assert_close(hard_concrete(logits, u), expected)


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_the_probability_of_keeping_a_point_is_the_closed_form(logit):
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    kept = (hard_concrete(torch.full((200_000,), logit), noise) > 0).float().mean()
    assert float(kept) == pytest.approx(float(expected_mask(torch.tensor(logit))), abs=0.005)


def test_without_dropping_it_is_cpq():
    grid = DroppedGrid(W, 3, learned=False, keep=0.5).eval()
    assert torch.equal(grid.quantize(W, 3), CategoricalGrid(W, 3).quantize(W, 3))


def test_points_share_their_mask_with_their_negatives_and_zero_is_kept():
    grid = DroppedGrid(W, 3, learned=False, keep=0.3)
    torch.manual_seed(0)
    drawn = [grid.masks() for _ in range(20)]
    for masks in drawn:
        by_index = dict(zip(range(-4, 4), masks.tolist(), strict=True))
        assert by_index[0] == 1
        assert all(by_index[i] == by_index[-i] for i in (1, 2, 3))
    assert any((masks == 0).any() for masks in drawn)


def test_all_but_zero_may_be_dropped():
    grid = DroppedGrid(W, 3, learned=False, keep=0.5)
    grid.logits.data.fill_(-50.0)
    assert not grid.quantize(W, 3).any()


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_a_dropped_width_leaves_the_grid_of_twice_the_step(bits):
    grid = DroppedGrid(W, bits, learned=True, keep=0.5).eval()
    grid.logits.data.fill_(50.0)
    assert grid.width() == bits
    assert torch.equal(grid.quantize(W, bits), CategoricalGrid(W, bits).quantize(W, bits))
    grid.logits.data[-1] = -50.0
    assert grid.width() == bits - 1
    narrow = CategoricalGrid(W, bits - 1)
    narrow.log_step.data = grid.log_step.data + math.log(2)
    narrow.log_spread.data = grid.log_spread.data
    found, expected = grid.quantize(W, bits).detach(), narrow.quantize(W, bits - 1).detach()
    step = grid.log_step.detach().exp()
    ties = ((W / (2 * step)) % 1 - 0.5).abs() < 1e-6
    torch.testing.assert_close(found[~ties], expected[~ties], rtol=1e-9, atol=1e-12)


def test_a_dropped_width_drops_those_above_it():
    grid = DroppedGrid(W, 5, learned=True, keep=0.5).eval()
    grid.logits.data = torch.tensor([50.0, -50.0, 50.0]).double()  # of 3, 4 and 5 bits
    assert grid.width() == 3
    kept = {i for i, mask in zip(range(-16, 16), grid.masks().tolist(), strict=True) if mask}
    assert kept == {-16, -12, -8, -4, 0, 4, 8, 12}


def test_the_penalty_is_the_expected_number_of_widths():
    model = small.network()
    method = make("dropbits", model, w=4, a=None, penalty=0.5, keep=0.7)
    terms = method.backward(
        lambda: torch.nn.functional.cross_entropy(model(small.IMAGES[0]), small.IMAGES[1])
    )
    each = float(expected_mask(torch.tensor(0.7).logit()))
    assert float(terms.penalty) == pytest.approx(0.5 * 2 * each * len(method.grids), rel=1e-5)
    assert set(method.learned_widths().values()) == {4}
    for grid in method.grids.values():
        assert (grid.logits.grad > 0).any() or (grid.logits.grad < 0).any()
    method.close()


def test_a_wrong_probability_is_named():
    with pytest.raises(ValueError, match="keep must be between 0 and 1, got 1"):
        make("dropbits", small.network(), w=4, a=4, keep=1.0)
