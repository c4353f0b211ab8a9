"""A whole penalised step of a residual network by Triton against the reference, on the fixture ``device``."""

from __future__ import annotations

import pytest
import torch

import gradl1_fast as gl
from tests.conversion.region_checks import regions_of
from tests.triton.checks.network import Training

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_penalised_step_equals_the_reference(
    dtype: torch.dtype, layout: torch.memory_format, bits: int | None, device: torch.device
) -> None:
    if bits is not None and dtype == torch.float32:
        pytest.skip("rounding may put a value on another code; float64 shows the formula")
    with gl.backend("reference"):
        truth = Training(device, dtype, layout, bits).results()
    with gl.backend("triton"):
        training = Training(device, dtype, layout, bits)
        ours = training.results()
    assert [region.reason for region in regions_of(training.model)] == [""]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert len(ours) == len(truth) > 20
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        assert (a - b).double().norm() <= tolerance * b.double().norm()


def test_two_runs_are_equal_to_the_last_bit(device: torch.device) -> None:
    with gl.backend("triton"):
        runs = [Training(device, torch.float32, torch.channels_last).results() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
