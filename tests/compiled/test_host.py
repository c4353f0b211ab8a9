"""The CPU loops against the reference, and against ordinary autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from gradl1_fast.backends import backend, reference, resolve
from tests.compiled.calls import NO_GRID, OPERATIONS, SHAPES, batch_norm_act, fake_quantize, l1_norm
from tests.compiled.folded import KINDS, assert_folds
from tests.gradients import assert_gradients
from tests.ops.cases import CASES, Case
from tests.ops.layouts import LAYOUTS
from tests.ops.sweeps import sweep

# What a result may differ by, relative to its largest element or to 1 (all inputs are of that size):
# the last digits of the sums, and one rounding to the type of the result.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_agree(actual: Any, expected: Any, tolerance: float, name: str) -> None:
    for i, (a, e) in enumerate(zip(tensors_of(actual), tensors_of(expected), strict=True)):
        what = f"{name}, result {i}"
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride()), what
        if a.numel():
            error = (a.double() - e.double()).abs().max()
            assert error <= tolerance * max(float(e.double().abs().max()), 1.0), f"{what}: off by {error:.3g}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_equals_the_reference(operation: Any, dtype: torch.dtype, layout: str, host: ModuleType) -> None:
    if layout == "constant" and operation is batch_norm_act:
        pytest.skip("constant gradients cancel to nothing but rounding noise")
    change = LAYOUTS.get(layout, Tensor.contiguous)
    # Norms of other types are among the results of l1_norm.
    tolerance = max(TOLERANCES[dtype], 1e-6 if operation is l1_norm else 0.0)
    for shape in SHAPES:
        for name, arguments in operation(shape, dtype, change):
            actual, expected = getattr(host, name)(*arguments), getattr(reference, name)(*arguments)
            assert_agree(actual, expected, tolerance, f"{name} of {shape}")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", [Tensor.contiguous, LAYOUTS["channels_last"]])
def test_quantization_folds_into_batch_norm_in_the_reference_too(dtype: torch.dtype, layout: Any) -> None:
    """In training; in evaluation it takes another way to the normalised values, rounded elsewhere."""
    assert_folds(reference, (4, 19, 7, 5), dtype, layout, kinds=[k for k in KINDS if k[0]])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", [Tensor.contiguous, LAYOUTS["channels_last"], LAYOUTS["transposed"]])
def test_quantization_folds_into_batch_norm_bit_for_bit(
    dtype: torch.dtype, layout: Any, host: ModuleType
) -> None:
    for shape in [(4, 19, 7, 5), (2, 300, 5, 5), (33, 17, 9, 16)]:
        assert_folds(host, shape, dtype, layout)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_codes_are_bit_equal(dtype: torch.dtype, axis: int | None, host: ModuleType) -> None:
    """Also at the ends of the range, halfway between codes, and where a cast would overflow."""
    ends = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3e38, -1e-45, 65504.0])
    halves = (torch.arange(-40, 40) + 0.5) * 0.125
    x = torch.cat([ends, halves, torch.randn(8 * 400 - 88) * 3]).reshape(8, 400).to(dtype)
    count = 1 if axis is None else x.shape[axis]
    for scale in (0.125, 0.1, 1e-38, 1e30):
        s = torch.full((count,), scale) if scale == 0.125 else torch.rand(count) * scale + scale
        for low, high in ((0, 1), (-127, 127), (0, 65535)):
            z = torch.randint(low, high + 1, (count,)).float()
            a = host.fake_quantize_forward(x, s, z, low, high, axis)
            e = reference.fake_quantize_forward(x, s, z, low, high, axis)
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern_converts_as_torch_does(dtype: torch.dtype, host: ModuleType) -> None:
    """Widened and narrowed: x + c * sign(x), for a c of 0 and for sums that have to be rounded."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # Among them the middle between neighbours, and what makes a large number, but no infinity, finite again.
    for c in (0.0, 1.3e-6, 0.3333, torch.finfo(dtype).eps / 2, -40.0):
        arguments = (x, torch.tensor(c), x)
        assert_same(host.tap_double_backward(*arguments), reference.tap_double_backward(*arguments))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_sweeps_equal_ordinary_autograd(case: Case, host: ModuleType) -> None:
    torch.use_deterministic_algorithms(False)  # the truth uses operations that have no such form
    with backend("reference"):
        truth = sweep(case, truth=True)
    assert_gradients(sweep(case).flat(), truth.flat())


@pytest.mark.parametrize("op", ["conv", "linear"])
def test_convolution_and_linear_are_the_reference(op: str, host: ModuleType) -> None:
    assert resolve(op, torch.zeros(())) is reference


def test_masks_treat_nan_as_the_reference_does(host: ModuleType) -> None:
    x = torch.randn(8, 4, 3, 3)
    x[0, 0, 0, 0], x[1, 1, 0, 0], x[2, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
    dy, v = torch.randn_like(x), torch.randn_like(x)
    one, zero = torch.ones(4), torch.zeros(4)
    for act in ("none", "relu", "relu6"):
        for training in (True, False):
            forward = (x, one, zero, zero, one, None, *NO_GRID, training, 1e-5, act)
            y, absent, mean, rstd = reference.batch_norm_act_forward(*forward)
            _same_pattern(host.batch_norm_act_forward(*forward), (y, absent, mean, rstd))
            saved = (dy, x, y, one, zero, mean, rstd, *NO_GRID, training, act, False)
            _same_pattern(
                host.batch_norm_act_backward(*saved, True), reference.batch_norm_act_backward(*saved, True)
            )
            second = (v, None, None, None, torch.tensor(0.5), *saved)
            _same_pattern(
                host.batch_norm_act_double_backward(*second),
                reference.batch_norm_act_double_backward(*second),
            )


def _same_pattern(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_mean_far_from_zero_costs_no_digits(host: ModuleType) -> None:
    x = torch.randn(64, 3, 8, 8) + 3000
    head = (x, *[None] * 5)
    _, _, mean, rstd = host.batch_norm_act_forward(*head, *NO_GRID, True, 0.0, "none")
    truth = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), truth.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), truth.var(1, unbiased=False).rsqrt(), rtol=1e-6, atol=0)


def test_results_do_not_depend_on_threads_time_or_instruction_set(host: ModuleType, module: Any) -> None:
    calls = [
        call
        for operation in OPERATIONS
        for layout in (Tensor.contiguous, LAYOUTS["channels_last"])
        for call in operation((9, 40, 33, 17), torch.float32, layout)
    ]

    def everything() -> list[Tensor]:
        return [t for name, args in calls for t in tensors_of(getattr(host, name)(*args))]

    before = torch.get_num_threads()
    expected = everything()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for name in module.instruction_sets():
                module.use_instruction_set(name)
                assert all(torch.equal(a, e) for a, e in zip(everything(), expected, strict=True)), name
    finally:
        torch.set_num_threads(before)


def test_empty_tensors(host: ModuleType) -> None:
    for shape in ((0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)):
        for name, arguments in fake_quantize(shape, torch.float32, Tensor.contiguous):
            assert_agree(getattr(host, name)(*arguments), getattr(reference, name)(*arguments), 0.0, name)


def test_more_channels_than_a_grid_has_blocks(host: ModuleType) -> None:
    x, one = torch.randn(8, 70_000, 1, 1), torch.ones(70_000)
    arguments = (x, one, one, None, None, None, *NO_GRID, True, 1e-5, "relu")
    assert_agree(
        host.batch_norm_act_forward(*arguments), reference.batch_norm_act_forward(*arguments), 1e-5, "forward"
    )


def test_a_view_whose_memory_holds_the_opposite_is_resolved(host: ModuleType) -> None:
    x = torch.randn(3, 4, 5)
    negative, grid = torch._neg_view(x), (torch.tensor(0.3), torch.tensor(2.0), 0, 7, None)
    assert_same(host.fake_quantize_forward(negative, *grid), reference.fake_quantize_forward(-x, *grid))
    assert_same(
        host.tap_double_backward(negative, torch.tensor(0.5), negative),
        reference.tap_double_backward(-x, torch.tensor(0.5), -x),
    )


def test_more_than_2_to_the_31_elements(host: ModuleType) -> None:
    """The zeros are never written, so they take no memory."""
    dy = torch.from_numpy(numpy.zeros(2**31 + 1, numpy.int16)).view(torch.bfloat16)
    dy[-1] = -3.0
    assert host.tap_backward(dy) == 3
    assert host.l1_norm_forward([dy, dy[:-1]]).tolist() == [3, 0]
