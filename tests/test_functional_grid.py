"""Ranges and grids: zero is on every grid, and the range is covered to half a step, at 1 to 16 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradl1_fast.functional import fake_quantize, quantization_grid, value_range
from tests import oracle
from tests.ops.sweeps import leaf

WIDTHS = range(1, 17)
finite = st.floats(-(2.0**100), 2.0**100, width=32)
exactly = settings(derandomize=True, deadline=None, database=None, max_examples=200)


def grid(low: float, high: float, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, int, int]:
    ends = (torch.tensor(v, dtype=torch.float64) for v in (low, high))
    return quantization_grid(*ends, bits, symmetric=symmetric)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_of_a_width(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    assert grid(-1, 2, bits, True)[2:] == ((-1, 0) if bits == 1 else (-limit, limit))
    assert grid(-1, 2, bits, False)[2:] == (0, 2**bits - 1)


@exactly
@given(finite, finite, st.sampled_from(WIDTHS), st.booleans())
def test_zero_is_represented_exactly(a: float, b: float, bits: int, symmetric: bool) -> None:
    scale, zero, q_min, q_max = grid(min(a, b), max(a, b), bits, symmetric)
    assert scale > 0
    assert zero == zero.round()
    assert q_min <= zero <= q_max
    assert fake_quantize(torch.zeros(1).double(), scale, zero, q_min, q_max).item() == 0


@exactly
@given(finite, finite, st.sampled_from(WIDTHS[1:]), st.booleans())
def test_the_range_is_covered_to_half_a_step(a: float, b: float, bits: int, symmetric: bool) -> None:
    low, high = min(a, b, 0), max(a, b, 0)
    scale, *codes = grid(low, high, bits, symmetric)
    x = torch.linspace(0, 1, 99, dtype=torch.float64) * (high - low) + low
    assert (fake_quantize(x, scale, *codes) - x).abs().max() <= scale * 0.5001


RANGES = {
    "no width": (0.0, 0.0),
    "denormal": (0.0, 1e-310),
    "above zero": (2.0, 5.0),
    "below zero": (-5.0, -2.0),
    "wider than the largest number": (-1e308, 1e308),
}


@pytest.mark.parametrize("ends", RANGES.values(), ids=RANGES.keys())
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_degenerate_ranges_give_finite_results(ends: tuple[float, float], symmetric: bool, bits: int) -> None:
    scale, *codes = grid(*ends, bits, symmetric)
    assert scale >= torch.finfo(torch.float64).tiny
    x = torch.tensor([*ends, 0.0], dtype=torch.float64)
    y = fake_quantize(x, scale, *codes)
    assert y.isfinite().all()
    assert y[-1] == 0
    assert (y - x).abs().max() <= scale


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_have_their_own_grids(symmetric: bool) -> None:
    low, high = torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([1.0, 2.0, 0.5])
    scale, zero, *_ = quantization_grid(low, high, 4, symmetric=symmetric)
    each = [quantization_grid(a, b, 4, symmetric=symmetric)[:2] for a, b in zip(low, high, strict=True)]
    assert torch.equal(scale, torch.stack([s for s, _ in each]))
    assert torch.equal(zero, torch.stack([z for _, z in each]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_step_has_the_gradient_of_the_oracle(bits: int) -> None:
    t = leaf(torch.randn(3, 4, dtype=torch.float64))
    for symmetric, truth in ((True, oracle.symmetric_step), (False, oracle.affine_step)):
        step, expected = quantization_grid(*value_range(t), bits, symmetric=symmetric)[0], truth(t, bits)
        assert step.item() == pytest.approx(expected.item(), rel=1e-14)
        actual = torch.autograd.grad(step, t)[0]
        torch.testing.assert_close(actual, torch.autograd.grad(expected, t)[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_value_range_is_that_of_each_channel(axis: int | None) -> None:
    x = torch.randn(3, 4, 5)
    others = [d for d in range(3) if axis is None or d != axis % 3]
    low, high = value_range(x, axis)
    assert torch.equal(low, torch.amin(x, others))
    assert torch.equal(high, torch.amax(x, others))


def test_nan_propagates_to_a_range_and_its_grid() -> None:
    low, high = value_range(torch.tensor([1.0, float("nan")]))
    assert low.isnan()
    assert quantization_grid(low, high, 4, symmetric=False)[0].isnan()


@pytest.mark.parametrize("bits", [0, -1, 17])
def test_widths_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be from 1 to 16, got {bits}"):
        grid(0, 1, bits, False)


@pytest.mark.parametrize("bits", [True, 4.0, "4", None])
def test_widths_of_another_type_are_refused(bits: object) -> None:
    with pytest.raises(TypeError, match="bits must be an int from 1 to 16"):
        grid(0, 1, bits, False)  # type: ignore[arg-type]
