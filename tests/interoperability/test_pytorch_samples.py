"""PyTorch's sample inputs (OpInfo) in our functions: the three passes compared with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradl1_fast import functional as ours
from tests.gradients import assert_gradients, relative_error
from tests.ops.sweeps import leaf, random_like

Function = Callable[..., Tensor]
OURS: dict[str, Function] = {
    "conv1d": ours.conv,
    "conv2d": ours.conv,
    "conv3d": ours.conv,
    "linear": ours.linear,
    "batch_norm": ours.batch_norm_act,
}
# What our functions refuse among the samples, each with its sentence.
VECTOR = r"x must have shape \(N, C, \*size\), got \(0,\)"  # one dimension: its samples and channels are one
REFUSED: dict[str, list[str]] = {"batch_norm": [VECTOR, VECTOR]}
FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHERS = [torch.complex64, torch.complex128, torch.int64]

each_name = pytest.mark.parametrize("name", OURS)


class Sample(NamedTuple):
    """One call; its tensors in the order of the arguments, running statistics among them."""

    args: tuple[Any, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in self.args]
        return f"{shapes} {self.options}"


@cache
def op_info(name: str) -> Any:
    pytest.importorskip("expecttest", reason="PyTorch's samples need expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    return next(info for info in op_db if info.name == f"nn.functional.{name}")


def samples(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    grad = dtype.is_floating_point or dtype.is_complex
    for s in op_info(name).sample_inputs("cpu", dtype, requires_grad=grad):
        yield Sample((s.input, *s.args), s.kwargs)


Gradients = Sequence[Tensor | None]


class Sweeps(NamedTuple):
    """Results of the three sweeps, and what became of the running statistics."""

    y: Gradients
    first: Gradients
    second: Gradients
    statistics: Gradients


def sweep(function: Function, sample: Sample, dtype: torch.dtype) -> Sweeps:
    args = [copied(a, dtype) for a in sample.args]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    statistics = [a for a in args if isinstance(a, Tensor) and not a.requires_grad]
    y = function(*args, **sample.options)
    dy = leaf(random_like(y, 11))
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    cotangents = [random_like(g, 20 + i) for i, g in enumerate(first)]
    second = torch.autograd.grad(first, [*leaves, dy], cotangents, allow_unused=True)
    return Sweeps([y], first, second, statistics)


def copied(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)


def taken(name: str, dtype: torch.dtype) -> list[Sample]:
    """Return the samples that our function takes, after checking that it refuses the others by name."""
    kept, refused = [], list(REFUSED.get(name, []))
    for sample in samples(name, dtype):
        if name == "batch_norm" and sample.args[0].dim() == 1:
            with pytest.raises(ValueError, match=refused.pop()):
                OURS[name](*sample.args, **sample.options)
        else:
            kept.append(sample)
    assert kept
    assert not refused
    return kept


@each_name
def test_float64_equals_pytorch(name: str) -> None:
    for sample in taken(name, torch.float64):
        actual, expected = (sweep(f, sample, torch.float64) for f in (OURS[name], getattr(F, name)))
        try:
            assert_gradients(list(chain(*actual)), list(chain(*expected)))
        except AssertionError as error:
            raise AssertionError(f"{name} {sample}: {error}") from error


@each_name
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=str)
def test_lower_precision_is_as_close_to_float64_as_pytorch(name: str, dtype: torch.dtype) -> None:
    for sample in taken(name, dtype):
        plain = getattr(F, name)
        exact = sweep(plain, sample, torch.float64)
        for a, p, e in zip(sweep(OURS[name], sample, dtype), sweep(plain, sample, dtype), exact, strict=True):
            limit = 2 * error_of(p, e) + torch.finfo(dtype).eps  # which plain PyTorch sometimes does not need
            assert error_of(a, e) <= limit, f"{name} {sample}"


def error_of(actual: Gradients, expected: Gradients) -> float:
    """Return the error of all results of a sweep, relative to their size together.

    Two values of a channel leave of a batch norm's gradient nothing but rounding: one of the results
    by itself has no scale.
    """
    pairs = [_present(a, e) for a, e in zip(actual, expected, strict=True) if (a, e) != (None, None)]
    if not pairs:
        return 0.0
    a, e = (torch.cat([t.detach().double().flatten() for t in side]) for side in zip(*pairs, strict=True))
    return relative_error(a, e)


def _present(actual: Tensor | None, expected: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both, zeros for one that is absent."""
    some = actual if expected is None else expected
    assert some is not None
    zeros = torch.zeros_like(some)
    return zeros if actual is None else actual, zeros if expected is None else expected


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "linear"])
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_complex_and_integer_samples_are_refused(name: str, dtype: torch.dtype) -> None:
    for sample in samples(name, dtype):
        with pytest.raises(TypeError, match=f"every tensor must have a floating type, got {dtype}"):
            OURS[name](*sample.args, **sample.options)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_samples_that_pytorch_refuses_are_refused(name: str) -> None:
    inputs = list(op_info(name).error_inputs("cpu"))
    assert inputs
    for error in inputs:
        s = error.sample_input
        with pytest.raises(error.error_type):
            getattr(F, name)(s.input, *s.args, **s.kwargs)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            OURS[name](s.input, *s.args, **s.kwargs)
