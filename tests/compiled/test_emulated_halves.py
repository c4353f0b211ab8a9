"""CPU loops and emulated CUDA kernels: what random tensors in ordinary memory do not show."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradl1_fast.backends import compiled, contract, reference
from gradl1_fast.backends.compiled import _tensors
from tests.compiled.calls import NO_GRID, OPERATIONS, l1_norm
from tests.compiled.emulated_matrix import load
from tests.compiled.prepared import assert_same, true_ends
from tests.compiled.test_host import TOLERANCES, assert_agree
from tests.compiled.test_passes import CHANNELS, Counter, X
from tests.ops.layouts import channels_last
from tests.triton.checks.memory import poisoned_memory  # noqa: F401  fixture

Half = tuple[Path, str]


@pytest.mark.usefixtures("poisoned_memory", "emulated_half")
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [((2, 3, 5, 13), Tensor.contiguous, torch.float64), ((3, 260, 5, 2), channels_last, torch.float32)],
    ids=["planes", "rows"],
)
def test_nothing_is_written_outside_of_results_and_scratch(
    shape: Any, layout: Any, dtype: torch.dtype
) -> None:
    """Guards lie around all new memory; what is read before it is written is NaN."""
    tolerance = max(TOLERANCES[dtype], 2e-6)  # among the norms are some of float32
    for operation in OPERATIONS:
        for name, arguments in operation(shape, dtype, layout):
            actual, expected = getattr(compiled, name)(*arguments), getattr(reference, name)(*arguments)
            assert_agree(actual, expected, tolerance if operation is l1_norm else TOLERANCES[dtype], name)


@pytest.mark.parametrize("offset", [1, 2])
def test_memory_that_is_not_aligned_is_taken_element_by_element(offset: int, emulated_half: Half) -> None:
    def beside(x: Tensor) -> Tensor:
        room = torch.empty(x.numel() + offset, dtype=x.dtype)
        return room[offset:].as_strided(x.shape, x.stride()).copy_(x)

    counter = Counter(*emulated_half)
    counter.place = beside
    one, grid = torch.ones(1), (CHANNELS, CHANNELS, 0, 7, 1)
    for sweep, arguments in (
        ("tap_backward", (X,)),
        ("tap_double_backward", (X, one[0], X)),
        ("fake_quantize_backward", (X, X, *grid, True)),
        ("l1_norm_forward", ([X, X],)),
        ("l1_norm_double_backward", ([X, X], [X, X])),
        ("batch_norm_act_backward", (X, X, X, *[CHANNELS] * 4, *NO_GRID, True, "relu", False, True)),
    ):
        counter(sweep, *arguments)
        assert set(counter.all("widest")) <= {0, 4}, sweep


@pytest.mark.usefixtures("emulated_half")
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_finite_stays_in_its_channel(value: float, training: bool, layout: Any) -> None:
    """At the first pixel, by which the statistics are shifted, and at another; also 0 * inf in evaluation."""
    x, dy, v = (layout(torch.randn(4, 3, 3, 5)) for _ in range(3))
    x[0, 0, 0, 0], x[2, 1, 1, 1] = value, value
    one, zero = torch.ones(3), torch.zeros(3)
    forward = (x, one, zero, zero, one, None, *NO_GRID, training, 1e-5, "relu")
    y, _, mean, rstd = reference.batch_norm_act_forward(*forward)
    saved = (dy, x, y, one, zero, mean, rstd, *NO_GRID, training, "relu", False)
    for name, arguments in (
        ("batch_norm_act_forward", forward),
        ("batch_norm_act_backward", (*saved, True)),
        ("batch_norm_act_double_backward", (v, one, None, None, torch.tensor(0.5), *saved)),
    ):
        actual, expected = getattr(compiled, name)(*arguments), getattr(reference, name)(*arguments)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_kernels_run_on_the_device_of_their_tensors(emulated_half: Half) -> None:
    path, half = emulated_half
    if half == "host":
        pytest.skip("the CPU is one device")
    run, current = load(str(path)).cuda.tap_backward, ctypes.CDLL(str(path)).gradl1_current_device
    tensors = torch.ones(8), torch.zeros(1), torch.zeros(99, dtype=torch.float64)
    settings, fields = {"dtype": 0, "layout": (1, 1, 8)}, ("dy", "l1", "scratch")
    memory = {name: _tensors.span(t) for name, t in zip(fields, tensors, strict=True)}
    run((1, 0), settings, **memory)
    assert tensors[1].item() == 8
    assert current() == 0
    with pytest.raises(RuntimeError, match=r"^tap_backward: cudaSetDevice: "):
        run((2, 0), settings, **memory)


@pytest.mark.usefixtures("emulated_half")
def test_the_sums_of_more_blocks_than_a_warp_has_lanes() -> None:
    """35 blocks side by side: some lanes add two slots, and the upper half of the warp adds slots too."""
    x = channels_last(torch.randn(11, 32, 10, 10, dtype=torch.float64))
    arguments = (x, *[None] * 5, *NO_GRID, True, 1e-5, "none")
    actual, expected = (b.batch_norm_act_forward(*arguments) for b in (compiled, reference))
    assert_agree(actual, expected, TOLERANCES[x.dtype], "batch_norm_act_forward")
    options = {"training": True, "eps": 1e-5, "activation": "relu", "with_residual": False, "codes": None}
    op = contract.prepare_batch_norm_act(compiled, x, **options, with_ends=True)  # type: ignore[arg-type]
    y, *_, ends = op.forward(x, *[None] * 7)
    assert_same(ends, true_ends(y), "ends")


@pytest.mark.usefixtures("emulated_half")
def test_a_variance_that_underflows_is_not_negative() -> None:
    """In float32 the squares vanish, while the square of their mean, a double, does not."""
    x = torch.tensor([0.0, *[1e-25] * 7]).view(8, 1, 1, 1)
    *_, rstd = compiled.batch_norm_act_forward(x, *[None] * 5, *NO_GRID, True, 0.0, "none")
    assert rstd > 1e24
