"""Prepared launches, without a GPU: the kernels they go to, and what they cost the host.

Triton's own search runs as on a GPU. Only the compiler and the call of the driver are stand-ins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton.compiler
from triton.runtime import JITFunction, driver

from gradl1_fast.backends import contract
from gradl1_fast.backends import triton as kernels
from tests.compiled.host_time import ALLOCATIONS, BUDGET, allocations, calls_of, functions, operators
from tests.compiled.prepared import Arguments
from tests.ops.layouts import channels_last
from tests.triton.test_compiled_ahead import _Driver

DEVICES = itertools.count(1000)  # each with compiled kernels of its own
# Allocations of a call, partial sums among them; a call that adds up does so in a launch more.
RESULTS = {
    "batch_norm_act_forward": 6,
    "batch_norm_act_backward": 7,
    "batch_norm_act_backward of ends": 5,
    "batch_norm_act_double_backward": 5,
    "tap_backward": 2,
    "tap_ends": 2,
    "fake_quantize_backward": 3,
}

FUNCTIONS = 100  # Triton's search takes as many for each launch


class _Compiled(triton.compiler.CompiledKernel):
    """A compiled kernel that notes its launches, each by what was compiled and what is given."""

    launches: list[tuple[Any, tuple[Any, ...]]]
    name = src = function = packed_metadata = None

    def __init__(self, source: Any, launches: list[Any]) -> None:
        self.what = source.fn.__name__, source.signature, source.constants, source.attrs
        self.launches = launches

    def _init_handles(self) -> None:
        pass

    @property
    def run(self) -> Any:
        return self._note

    def _note(self, *given: Any) -> None:
        x, y, z, *_ = given
        self.launches.append((self.what, (x, y, z, *given[9:])))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The launches that would have gone to a GPU."""
    noted: list[Any] = []
    monkeypatch.setattr(triton.compiler, "compile", lambda source, **options: _Compiled(source, noted))
    device = next(DEVICES)
    monkeypatch.setattr(_Driver, "get_current_device", lambda self: device)
    driver.set_active(_Driver(90))
    yield noted
    driver._active = None


def arguments(dtype: torch.dtype = torch.float32) -> Arguments:
    return Arguments((2, 4, 8, 8), dtype, channels_last)


def looked_at(noted: list[Any]) -> list[Any]:
    """Return launches with what a kernel sees of tensors."""
    return [(what, [_seen(value) for value in given]) for what, given in noted]


def _seen(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_seen(item) for item in value]
    return (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_after_the_first_are_those_that_triton_finds(
    dtype: torch.dtype, launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, call, given in calls_of(kernels, arguments(dtype)):
        launches.clear()
        call(*given)
        found = looked_at(launches)
        launches.clear()
        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", None)  # Triton's search
            call(*given)
        assert found, name
        assert looked_at(launches) == found, name


def test_a_tensor_that_is_not_aligned_or_of_another_type_gets_a_kernel_of_its_own(
    launches: list[Any],
) -> None:
    a = arguments()
    tap = contract.prepare_tap(kernels, a.x)
    shifted = torch.randn(a.dy.numel() + 1)[1:].as_strided(a.dy.shape, a.dy.stride())
    for dy in (a.dy, shifted, a.dy, shifted):
        tap.double_backward(a.v, a.c, dy)
    whats = [what for what, _ in launches]
    assert whats[0] == whats[2] != whats[1] == whats[3]
    launches.clear()
    for d_l1 in (a.c, a.c.bfloat16(), a.c):
        tap.double_backward(a.v, d_l1, a.dy)
    whats = [what for what, _ in launches]
    assert whats[0] == whats[2] != whats[1]


def test_a_missing_gradient_gets_a_kernel_of_its_own(launches: list[Any]) -> None:
    a = arguments()
    tap = contract.prepare_tap(kernels, a.x)
    for v in (a.v, None, a.v, None):
        tap.double_backward(v, a.c, a.dy)
    whats = [what for what, _ in launches]
    assert whats[0] == whats[2] != whats[1] == whats[3]


@pytest.mark.usefixtures("launches")
def test_a_call_allocates_its_results_and_partial_sums_alone() -> None:
    for name, call, given in calls_of(kernels, arguments()):
        asked = operators(call, given)
        assert set(asked) <= ALLOCATIONS, name
        assert len(asked) == RESULTS.get(name, 1), name


def test_the_host_time_of_a_call_is_that_of_a_few_allocations(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Compiled, "__getitem__", lambda self, grid: lambda *given: None)
    for name, call, given in calls_of(kernels, arguments()):
        call(*given)
        count, time = functions(call, given), allocations(call, given)
        print(f"{name}: {count} functions, the time of {time:.1f} allocations")
        assert count <= FUNCTIONS, name
        assert time <= BUDGET, name
