"""Direct quantization: gradients of levels, and levels that few channels do not dominate."""

from __future__ import annotations

import pytest
import torch

from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.direct import LevelCodes, LevelSite, nearest, weighted_levels
from tests.gradients import assert_gradient
from tests.training.methods import small

GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(6, 5, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(8, 400, generator=GENERATOR, dtype=torch.float64)
START = torch.linspace(-2, 2, 4, dtype=torch.float64)


def test_it_begins_with_every_weight_at_its_nearest_level():
    codes = LevelCodes(3)
    scores, stored = codes.right_inverse(W)
    levels = stored * codes.unit(W)
    assert torch.equal(codes(scores, stored), levels[nearest(W, levels)])
    assert float((codes(scores, stored) - W).abs().max()) <= float(W.max() - W.min()) / 14 * (1 + 1e-9)


def test_the_gradient_of_a_level_is_the_sum_over_its_weights():
    codes, g = LevelCodes(2), torch.randn_like(W)
    scores, stored = (t.requires_grad_() for t in codes.right_inverse(W))
    of_scores, of_levels = torch.autograd.grad((codes(scores, stored) * g).sum(), (scores, stored))
    chosen, levels = scores.argmax(-1), stored.detach() * codes.unit(W)
    sums = torch.stack([g[chosen == k].sum() for k in range(4)])
    assert_gradient(of_levels, sums * codes.unit(W), 1e-10)
    factor = 6 / (levels[-1] - levels[0])  # 2 over the spacing
    p = torch.softmax(factor * scores.detach(), -1)
    soft = (p * levels).sum(-1, keepdim=True)
    assert_gradient(of_scores, factor * g.unsqueeze(-1) * p * (levels - soft), 1e-10)


def test_a_step_moves_levels_and_codes_about_as_far_as_it_moves_float_weights():
    weight = torch.rand(400, 50, generator=GENERATOR, dtype=torch.float64)  # the same number at each level
    codes, rate, steps = LevelCodes(3), 0.002, 20
    scores, stored = (t.requires_grad_() for t in codes.right_inverse(weight))
    before = codes(scores, stored).detach()
    for _ in range(steps):
        of_scores, of_levels = torch.autograd.grad(codes(scores, stored).sum(), (scores, stored))
        with torch.no_grad():
            scores -= rate * of_scores
            stored -= rate * of_levels
    by_codes = (scores.argmax(-1) != nearest(weight, torch.linspace(0, 1, 8).double())).double().mean()
    assert 0.5 < float(by_codes) * (1 / 7) / (rate * steps) < 2
    by_levels = (stored * codes.unit(weight)).detach() - torch.linspace(0, 1, 8).double()
    assert 0.5 < float(-by_levels[1:-1].mean()) / (rate * steps) < 2
    assert bool((codes(scores, stored) <= before).all())


def test_the_levels_are_weighted_means_of_their_values():
    weights = torch.rand(8, generator=GENERATOR, dtype=torch.float64)
    levels = weighted_levels(X, START, weights, rounds=60)
    codes = nearest(X, levels)
    for k in range(4):
        d = weights[:, None] * (codes == k)
        assert float((d * (X - levels[k])).sum()) == pytest.approx(0, abs=1e-7)  # the normal equation


def test_equal_weights_are_plain_least_squares():
    ones, fives = (weighted_levels(X, START, torch.full((8,), v).double()) for v in (1.0, 5.0))
    torch.testing.assert_close(ones, fives)
    codes = nearest(X, ones)
    error = (X - ones[codes]).square().mean()
    for k in range(4):
        for shift in (-0.3, 0.3):
            moved = ones.clone()
            moved[k] += shift
            assert (X - moved[codes]).square().mean() >= error


def test_a_level_without_values_stays():
    assert float(weighted_levels(torch.zeros(1, 3), torch.tensor([0.0, 9.0]), torch.ones(1))[1]) == 9


def test_a_channel_of_large_variance_moves_the_weighted_levels_less():
    scaled = X.clone()
    scaled[0] *= 100

    def move(weights_of):
        before, after = (weighted_levels(x, START, weights_of(x), rounds=20) for x in (X, scaled))
        return float((after - before).norm())

    inverse = lambda x: 1 / x.var(1, correction=0)  # noqa: E731
    assert move(inverse) < 0.05 * move(lambda x: torch.ones(len(x)).double())


def test_a_site_weighs_channels_by_their_inverse_variance():
    x = X.clone()
    x[0] *= 100
    x[1] = 0  # constant: it has no variance and does not count
    site = LevelSite(2, torch.zeros((), dtype=torch.float64))
    site(x.T.contiguous(), 2)
    inverse = torch.cat([1 / x[:1].var(1, correction=0), torch.zeros(1), 1 / x[2:].var(1, correction=0)])
    start = x.min() + (x.max() - x.min()) * torch.linspace(0, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(site.levels, weighted_levels(x, start, inverse.double()))


def test_a_site_follows_the_batches_and_passes_the_gradient_between_its_ends():
    site = LevelSite(2, torch.zeros((), dtype=torch.float64))
    x = X.T.contiguous().requires_grad_()  # 400 samples of 8 channels
    y = site(x, 2)
    assert len(y.unique()) == 4
    (grad,) = torch.autograd.grad(y.sum(), x)
    low, high = site.levels[0], site.levels[-1]
    assert torch.equal(grad, ((x >= low) & (x <= high)).double())
    before = site.levels.clone()
    site(2 * X.T, 2)
    assert not torch.equal(site.levels, before)
    after = site.eval().levels.clone()
    site(9 * X.T, 2)
    assert torch.equal(site.levels, after)


def test_after_training_the_weights_are_levels():
    made = small.advance(small.trainer("direct-3"), 4)
    with made.objective.quantized(3, 3), torch.no_grad():
        expected = made.model[8].weight.clone()
    weight = made.finish()[8].weight
    assert torch.equal(weight, expected)
    assert len(weight.unique()) <= 8


@pytest.mark.parametrize(("settings", "name"), [({"w": 9, "a": 4}, "w"), ({"w": 4, "a": 9}, "a")])
def test_a_wrong_width_is_named(settings, name):
    with pytest.raises(ValueError, match=f"Direct: {name} must be from 1 to 8, got 9"):
        make("direct", small.network(), **settings)
