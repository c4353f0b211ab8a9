"""Ranges without data, compared with Monte Carlo and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.quantization.ranges.batch_norm import Gaussian
from tests.networks import MOBILENET, RESNET, VGG, conv_norm

INPUT = (-3.0, 3.0)


def calibrated(model: nn.Module, sigmas: float = 6.0) -> nn.Module:
    model = gl.convert(model.eval())
    known = {name: INPUT for name, q in named_quantizers(model).items() if q.is_input}
    if "14.input" in named_quantizers(model):
        known["14.input"] = (0.0, 5.0)  # between two linear layers of VGG
    gl.calibrate(model, ranges=gl.ranges.BatchNormStatistics(sigmas, known))
    return model


def ends(model: nn.Module, name: str) -> tuple[float, float]:
    quantizer = named_quantizers(model)[name]
    return float(quantizer.low), float(quantizer.high)


def test_after_a_batch_norm_it_is_beta_plus_six_gamma_and_relu_clips() -> None:
    plain = VGG.make()
    with torch.no_grad():
        plain[1].weight[0] = -3.0
    model = calibrated(plain)
    expected = float((plain[1].bias + 6 * plain[1].weight.abs()).max())
    assert ends(model, "3.input") == (0.0, pytest.approx(expected, rel=1e-6))
    pooled = float((plain[4].bias + 6 * plain[4].weight.abs()).max())
    assert ends(model, "7.input") == (0.0, pytest.approx(pooled, rel=1e-6))


@pytest.mark.parametrize(
    ("low", "high"), [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-math.inf, -1.0), (2.0, 2.5)]
)
def test_moments_after_clipping_equal_those_of_samples(low: float, high: float) -> None:
    mean = torch.tensor([0.0, 2.0, -3.0, 5.5, 1.0], dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.0], dtype=torch.float64)
    n = 400_000
    draws = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)  # no tail beyond 1 / 2n
    x = (mean + sigma * draws[:, None]).clamp(low, high)
    actual_mean, actual_variance = Gaussian(mean, sigma.square(), low, high).moments()
    torch.testing.assert_close(actual_mean, x.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(actual_variance, x.var(0, correction=0), rtol=1e-4, atol=2e-5)


class Sum(nn.Module):
    """A ReLU's output plus a batch norm's, behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(*conv_norm(3, 5)), nn.Sequential(*conv_norm(3, 5))
        self.last = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(F.relu(self.a(x)) + self.b(x)))


def test_a_sum_of_branches_has_the_deviation_of_independent_samples() -> None:
    torch.manual_seed(4)
    plain = Sum().double()
    for norm in (plain.a[1], plain.b[1]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    sigmas = 2.0
    low, high = ends(calibrated(plain, sigmas), "last.input")
    generator = torch.Generator().manual_seed(5)
    draws = [
        norm.bias + norm.weight * torch.randn(400_000, 5, generator=generator, dtype=torch.float64)
        for norm in (plain.a[1], plain.b[1])
    ]
    total = (draws[0].clamp(min=0) + draws[1]).detach()
    expected = float((total.mean(0) + sigmas * total.std(0)).max())
    assert low == 0.0
    assert high == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("network", [RESNET, MOBILENET], ids=lambda n: n.id)
def test_whole_networks_need_no_more_than_the_range_of_their_input(network: object) -> None:
    plain = network.make()
    if network is MOBILENET:
        plain.scale = nn.Identity()  # the multiplication is not followed
    model = calibrated(plain)
    with torch.no_grad(), gl.bits(model, w=None, a=8):
        assert model(network.batch()[0]).isfinite().all()
    if network is MOBILENET:
        for name in ("blocks.0.depthwise.0.input", "blocks.0.project.0.input", "fc.input"):
            assert 0 <= ends(model, name)[0] < ends(model, name)[1] <= 6


def test_the_statistics_cover_data_that_follow_them() -> None:
    plain = VGG.make().train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    x = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    plain(x)
    free = calibrated(plain)
    seen = gl.convert(plain.eval())
    gl.calibrate(seen, [x])
    for name in ("3.input", "7.input"):
        assert 0.5 < ends(free, name)[1] / ends(seen, name)[1] < 3


def test_sites_without_a_batch_norm_are_named() -> None:
    model = gl.convert(VGG.make().eval())
    with pytest.raises(
        ValueError, match=r"calibrate: no batch norm describes the values at .*input.*known=\{"
    ):
        gl.calibrate(model, ranges="batch_norm")
    assert model.get_submodule("3.input_quantizer").low is None
    with pytest.raises(ValueError, match="known: unknown site wrong; the sites are"):
        gl.calibrate(model, ranges=gl.ranges.BatchNormStatistics(known={"wrong": INPUT}))


class Times(nn.Module):
    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.of, self.last = nn.Sequential(*conv_norm(3, 4)), of, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.of(self.a(x)))


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda y: 3 * y,
    "sum with a number": lambda y: y + 1,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_operations_that_are_not_followed_are_not_guessed(case: str) -> None:
    with pytest.raises(ValueError, match="no batch norm describes the values at"):
        calibrated(Times(UNKNOWN[case]))


def test_channels_that_are_joined_keep_their_ranges() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(*conv_norm(3, 4)), nn.Sequential(*conv_norm(3, 2))
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.a(x), self.b(x)], 1))

    plain = Joined()
    nn.init.constant_(plain.b[1].bias, 10.0)
    model = calibrated(plain)
    assert ends(model, "last.input") == (-6.0, 16.0)


def test_a_single_layer_has_no_known_range() -> None:
    layer = gl.convert(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no batch norm describes the values at input"):
        gl.calibrate(layer, ranges="batch_norm")


class Parts(nn.Module):
    """Cannot be traced as a whole: of its parts the inputs are unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(*conv_norm(3, 4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.b = nn.Sequential(*conv_norm(4, 4), nn.ReLU6(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x if x.sum() < 1e9 else x + 1))


def test_parts_are_followed_and_their_inputs_have_to_be_given() -> None:
    model = gl.convert(Parts().eval())
    with pytest.raises(ValueError, match=r"the values at a\.0\.input, b\.0\.input; give"):
        gl.calibrate(model, ranges="batch_norm")
    known = {"a.0.input": INPUT, "b.0.input": (-1.0, 1.0)}
    gl.calibrate(model, ranges=gl.ranges.BatchNormStatistics(known=known))
    assert ends(model, "a.3.input") == (0.0, 6.0)
    assert ends(model, "b.0.input") == (-1.0, 1.0)
    with gl.bits(model, w=4, a=4):
        assert model(torch.randn(2, 3, 4, 4)).isfinite().all()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.last = (
            nn.Sequential(*conv_norm(3, 4)),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.add:
            y.add_(5)
            return self.last(y)
        return self.last(self.relu(y))


def test_in_place_changes_are_not_ignored() -> None:
    InPlace.add = False
    assert ends(calibrated(InPlace()), "last.input")[0] == 0.0
    InPlace.add = True
    with pytest.raises(ValueError, match=r"the values at last\.input"):
        calibrated(InPlace())
