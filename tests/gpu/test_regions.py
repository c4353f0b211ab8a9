"""Regions and prepared calls on a GPU: equal to the modules, without a wait, and captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.backends import UnavailableError, resolve
from tests.conversion.region_checks import (
    CASES,
    assert_equal_to_the_modules,
    assert_the_same_whatever_the_values,
    regions_of,
    step,
    trained,
)
from tests.triton.checks.network import Training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CUDA = torch.device("cuda")
SCALES = pytest.mark.parametrize("scale", ["none", "step"])


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        with gl.backend(request.param):
            resolve("tap", torch.zeros((), device=CUDA))
    except UnavailableError as reason:
        pytest.skip(str(reason))
    return request.param


@pytest.fixture(autouse=True)
def _repeatable_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("scale", "layout", "bits"), CASES, ids=str)
def test_a_region_equals_its_modules(
    scale: str, layout: torch.memory_format, bits: int | None, backend: str
) -> None:
    assert_equal_to_the_modules(backend, CUDA, scale, layout, bits)


@SCALES
def test_a_step_asks_for_the_same_whatever_the_values_are(scale: str, backend: str) -> None:
    assert_the_same_whatever_the_values(backend, CUDA, scale)


@SCALES
def test_a_step_through_regions_waits_nowhere(scale: str, backend: str) -> None:
    training = trained(backend, CUDA, scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with gl.backend(backend):
            step(training)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@SCALES
def test_a_step_through_regions_is_captured_and_replayed_to_the_last_bit(scale: str, backend: str) -> None:
    training = trained(backend, CUDA, scale)
    expected = {}
    other = torch.randn_like(training.x)
    for name, x in (("first", training.x.clone()), ("second", other)):
        training.x.copy_(x)
        with gl.backend(backend):
            step(training)
        expected[name] = x, [p.grad.clone() for p in training.model.parameters()]
    graph = captured(training, backend)
    for x, gradients in expected.values():
        training.x.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        found = [p.grad for p in training.model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def captured(training: Training, backend: str) -> torch.cuda.CUDAGraph:
    """Return a step as a CUDA graph, which leaves the gradients where they are now."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), gl.backend(backend):
        for _ in range(2):
            step(training)
    torch.cuda.current_stream().wait_stream(stream)
    training.model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph), gl.backend(backend):
        training.step()
    assert not any(region.reason for region in regions_of(training.model))
    return graph


@SCALES
def test_memory_is_flat_over_200_steps_through_regions(scale: str, backend: str) -> None:
    training, used = trained(backend, CUDA, scale), []
    with gl.backend(backend):
        for _ in range(200):
            step(training)
            used.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
    assert len(set(used[5:])) == 1
