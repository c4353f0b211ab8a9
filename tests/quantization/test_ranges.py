"""Ranges compared with NumPy, brute force and Monte Carlo; streams compared with all values at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradl1_fast import functional as F
from gradl1_fast import ranges
from gradl1_fast.quantization.ranges.histogram import Histogram
from gradl1_fast.quantization.ranges.mse import quantization_error


def heavy(n: int, seed: int = 0) -> Tensor:
    """Return values with heavy tails, off centre, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    return torch.where(torch.arange(n) % 5 == 0, 0.0, 0.2 + x * x * x)


def stream(method: ranges.Range, x: Tensor, parts: int = 7) -> ranges.Range:
    for part in x.tensor_split(parts, 1):
        method.update(part)
    return method


def ends(method: ranges.Range, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    low, high = method.ends(**kwargs)
    return low.numpy(), high.numpy()


STREAMED: dict[str, Callable[[], ranges.Range]] = {
    "min_max": ranges.MinMax,
    "percentile": lambda: ranges.Percentile(99),
    "mse": ranges.MeanSquaredError,
    "standard_deviation": lambda: ranges.StandardDeviation(2.0),
}


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_in_any_order_has_the_range_of_all_its_values(name: str) -> None:
    x = torch.stack([heavy(3000), 1e-3 * heavy(3000, 1)])
    whole = ends(stream(STREAMED[name](), x, 1))
    growing = x[:, x[0].abs().argsort()]
    for method in (stream(STREAMED[name](), growing), stream(STREAMED[name](), growing.flip(1), 100)):
        for end, expected in zip(ends(method), whole, strict=True):
            np.testing.assert_allclose(end, expected, rtol=1e-12)


@pytest.mark.parametrize("name", STREAMED)
def test_memory_does_not_grow_with_the_number_of_batches(name: str) -> None:
    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel()
        return sum(map(size, vars(value).values())) if hasattr(value, "__dict__") else 1

    method = STREAMED[name]()
    method.update(heavy(100)[None])
    first = size(method)
    for seed in range(20):
        method.update(10**seed * heavy(100, seed)[None])
    assert size(method) == first


def test_min_max() -> None:
    x = heavy(1000)[None]
    low, high = ends(stream(ranges.MinMax(), x))
    assert (low.item(), high.item()) == (x.min().item(), x.max().item())


def test_moving_average_by_hand() -> None:
    for kind in (ranges.MovingAverage, ranges.InHindsight):
        method = kind(0.75)
        for low, high in ((-4.0, 1.0), (0.0, 9.0), (-8.0, 1.0)):
            method.update(torch.tensor([[low, 0.0, high]]))
        method.update(torch.ones(1, 0))
        low, high = ends(method)
        assert low.item() == pytest.approx(0.75 * (0.75 * -4 + 0.25 * 0) + 0.25 * -8)
        assert high.item() == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 9) + 0.25 * 1)


def test_standard_deviation_equals_numpy_and_is_limited_to_the_values() -> None:
    x = torch.cat([heavy(999) + 5, -heavy(500, 3)])[None]
    low, high = ends(stream(ranges.StandardDeviation(0.5), x))
    mean, sigma = np.mean(x.numpy()), np.std(x.numpy())
    np.testing.assert_allclose(
        [low.item(), high.item()], [mean - 0.5 * sigma, mean + 0.5 * sigma], rtol=1e-12
    )
    low, high = ends(stream(ranges.StandardDeviation(100.0), x))
    assert (low.item(), high.item()) == (x.min().item(), x.max().item())


@pytest.mark.parametrize("percent", [99.99, 99.0, 60.0, 100.0])
@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0])
def test_percentiles_are_the_order_statistics_within_the_stated_bound(percent: float, shift: float) -> None:
    x = torch.cat([heavy(20_000) + shift, torch.tensor([1000.0 if shift < 0 else -1000.0])])[None]
    low, high = ends(stream(ranges.Percentile(percent), x))
    left_out = (100 - percent) / 200
    values = x.numpy().ravel()
    upper = np.quantile(values, 1 - left_out, method="inverted_cdf")
    lower = -np.quantile(-values, 1 - left_out, method="inverted_cdf")
    bound = np.abs(values).max() / 1024
    assert 0 <= high.item() - upper <= bound
    assert 0 <= lower - low.item() <= bound
    assert (values > high.item()).mean() <= left_out
    assert (values < low.item()).mean() <= left_out


def test_percentiles_of_values_that_are_mostly_zero() -> None:
    x = torch.zeros(1, 1000)
    x[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    low, high = ends(stream(ranges.Percentile(99.0), x))
    assert (low.item(), high.item()) == (0.0, 0.0)
    assert ends(stream(ranges.Percentile(99.9), x))[1].item() == pytest.approx(3.0, abs=3 / 1024)


def test_a_histogram_counts_exactly() -> None:
    x = torch.stack([heavy(4000), 1e30 * heavy(4000, 2)])
    histogram = Histogram(2, 64, x.device)
    for part in x[:, x[0].abs().argsort()].split(321, 1):
        histogram.update(part)
    histogram.update(torch.tensor([[float("nan")], [float("inf")]]))
    for row in range(2):
        expected, _ = np.histogram(x[row][x[row] != 0].numpy(), bins=histogram.edges()[row].numpy())
        np.testing.assert_array_equal(histogram.counts[row].numpy(), expected)
        assert histogram.zeros[row] == (x[row] == 0).sum()
        assert x[row].abs().max() / 64 < histogram.width()[row] <= 2 * x[row].abs().max() / 64


@pytest.mark.parametrize("values", [[0.0, 0.0], [5e-324, -1e-310], [1e308, 1.0]])
def test_a_histogram_of_extreme_values(values: list[float]) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    histogram = Histogram(1, 64, x.device)
    histogram.update(x)
    assert histogram.counts.sum() + histogram.zeros.sum() == x.numel()
    assert histogram.width().isfinite().all()
    assert (histogram.width() > 0).all()


def squared_error(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> float:
    grid = F.quantization_grid(low.double(), high.double(), bits, symmetric=symmetric)
    return float((F.fake_quantize(x.double(), *grid) - x.double()).square().sum())


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_error_in_a_histogram_is_that_of_the_values(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64)
    histogram = Histogram(1, 1024, x.device)
    histogram.update(x[None])
    low, high = torch.tensor([-1.5], dtype=torch.float64), torch.tensor([2.5], dtype=torch.float64)
    actual = quantization_error(histogram, low, high, bits, symmetric=symmetric)
    assert float(actual) == pytest.approx(squared_error(x, low[0], high[0], bits, symmetric), rel=1e-2)


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("of", "symmetric"),
    [(relu, False), (lambda x: x, False), (lambda x: -relu(x), False), (lambda x: x, True)],
)
def test_no_range_of_a_fine_grid_is_better_than_the_one_found(
    bits: int, of: Callable[[Tensor], Tensor], symmetric: bool
) -> None:
    x = of(heavy(5000))[None]
    low, high = stream(ranges.MeanSquaredError(), x).ends(symmetric=symmetric)
    assert low.shape == high.shape == (16, 1)
    found = squared_error(x, low[bits - 1, 0], high[bits - 1, 0], bits, symmetric)
    fractions = torch.logspace(-6, 0, 60, base=2, dtype=torch.float64)
    lows = fractions * x.min() if not symmetric else [None]
    best = min(
        squared_error(
            x,
            -f * x.abs().max() if lo is None else lo,
            f * (x.abs().max() if symmetric else x.max()),
            bits,
            symmetric,
        )
        for f in fractions
        for lo in lows
    )
    assert found <= 1.03 * best
    assert bits == 8 or found < 0.9 * squared_error(x, x.min(), x.max(), bits, symmetric)


def test_each_channel_gets_its_own_best_range() -> None:
    x = torch.stack([heavy(2000), 0.01 * heavy(2000, 1).sign(), torch.zeros(2000, dtype=torch.float64)])
    low, high = stream(ranges.MeanSquaredError(), x).ends(symmetric=True)
    for row in range(3):
        alone = stream(ranges.MeanSquaredError(), x[row : row + 1]).ends(symmetric=True)
        for bits in (2, 4, 8):
            errors = [
                squared_error(x[row], lo, hi, bits, True)
                for lo, hi in (
                    (low[bits - 1, row], high[bits - 1, row]),
                    (alone[0][bits - 1, 0], alone[1][bits - 1, 0]),
                )
            ]
            assert errors[0] <= 1.03 * errors[1] + 1e-12


@pytest.mark.parametrize("name", ["moving_average", "in_hindsight", *STREAMED])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_is_never_forgotten(name: str, bad: float) -> None:
    method = ranges.choose("test", name)
    x = heavy(50)[None].clone()
    method.update(x)
    x[0, 7] = bad
    method.update(x)
    method.update(heavy(50)[None])
    low, high = method.ends()
    assert not (low.isfinite() & high.isfinite()).any()


ODD = {
    "zero": torch.zeros(1, 4),
    "denormal": torch.tensor([[0.0, 1e-42]]),
    "above zero": torch.tensor([[1.0, 3.0]]),
    "below zero": torch.tensor([[-3.0, -1.0]]),
    "one value": torch.tensor([[2.5]]),
    "half": torch.tensor([[-1.0, 60000.0]]).half(),
    "large": torch.tensor([[-3e38, 3e38]]),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("name", ["moving_average", *STREAMED])
def test_unusual_values_give_valid_ranges(name: str, case: str) -> None:
    method = ranges.choose("test", name)
    method.update(ODD[case])
    low, high = method.ends()
    assert (low <= high).all()
    assert (low.isfinite() & high.isfinite()).all()
    assert low.dtype == torch.float32
    grid = F.quantization_grid(low.flatten()[0], high.flatten()[0], 4, symmetric=False)
    assert F.fake_quantize(ODD[case].float(), *grid).isfinite().all()


def test_no_observed_value_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no value was observed"):
        ranges.MinMax().ends()


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ranges.Percentile(0), ValueError, "percent must be above 0"),
    (lambda: ranges.Percentile(101), ValueError, "at most 100"),
    (lambda: ranges.Percentile(float("nan")), ValueError, "finite"),
    (lambda: ranges.MovingAverage(1.0), ValueError, "momentum must be below 1"),
    (lambda: ranges.MovingAverage("0.9"), TypeError, "momentum must be a number"),
    (lambda: ranges.StandardDeviation(0), ValueError, "alpha must be more than 0"),
    (lambda: ranges.BatchNormStatistics(-1), ValueError, "sigmas"),
    (lambda: ranges.choose("f", "best"), ValueError, "f: ranges must be one of 'min_max', .*got 'best'"),
    (lambda: ranges.choose("f", ranges.MinMax), TypeError, "a name or an object"),
    (
        lambda: ranges.choose("f", stream(ranges.MinMax(), torch.ones(1, 9))),
        ValueError,
        "already observed values",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG)
def test_wrong_choices_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
