"""Half precision: at most twice the error of plain PyTorch in the same type."""

from __future__ import annotations

import pytest
import torch

from tests.gradients import relative_error
from tests.ops.cases import CASES, Case
from tests.ops.sweeps import sweep

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_error_is_at_most_twice_that_of_pytorch(case: Case, dtype: torch.dtype) -> None:
    exact, plain, actual = (
        sweep(case, truth=True),
        sweep(case, truth=True, dtype=dtype),
        sweep(case, dtype=dtype),
    )
    for a, p, e in zip(actual.flat(), plain.flat(), exact.flat(), strict=True):
        assert relative_error(a, e) <= 2 * relative_error(p, e)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_types_of_gradients_are_those_of_inputs(case: Case, dtype: torch.dtype) -> None:
    result, inputs = sweep(case, dtype=dtype), case.inputs(dtype)
    for t in [*result.first[: len(inputs)], *result.second[: len(inputs)]]:
        assert t is None or t.dtype == dtype
    assert result.y.dtype == (torch.float32 if case.op == "l1_norm" else dtype)
    assert not case.probe or result.first[-1].dtype == torch.float32
