"""Regions with each backend that runs on a CPU; tests/gpu runs the same checks on a GPU."""

from __future__ import annotations

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.backends import UnavailableError, resolve
from tests.conversion.region_checks import (
    CASES,
    assert_equal_to_the_modules,
    assert_the_same_whatever_the_values,
)

CPU = torch.device("cpu")


@pytest.fixture(params=["reference", "host"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        with gl.backend(request.param):
            resolve("tap", torch.zeros(()))
    except UnavailableError as reason:
        pytest.skip(str(reason))
    return request.param


@pytest.mark.parametrize(("scale", "layout", "bits"), CASES, ids=str)
def test_a_region_equals_its_modules(
    scale: str, layout: torch.memory_format, bits: int | None, backend: str
) -> None:
    assert_equal_to_the_modules(backend, CPU, scale, layout, bits)


@pytest.mark.parametrize("scale", ["none", "step"])
def test_a_step_asks_for_the_same_whatever_the_values_are(scale: str, backend: str) -> None:
    assert_the_same_whatever_the_values(backend, CPU, scale)
