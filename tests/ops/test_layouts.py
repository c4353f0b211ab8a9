"""Strides of inputs and gradients do not change results, and channels_last is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gradients import assert_gradients
from tests.ops.cases import BATCH_NORM_ACT, CASES, CONV, CONV_TRANSPOSE, Case
from tests.ops.layouts import LAYOUTS, constant, expanded
from tests.ops.sweeps import sweep

pytestmark = pytest.mark.usefixtures("each_cpu_backend")
IMAGES = [c for c in CONV + CONV_TRANSPOSE + BATCH_NORM_ACT if len(c.shapes[0]) == 4]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_those_of_contiguous_tensors(case: Case, layout: str) -> None:
    change = LAYOUTS[layout]
    assert_gradients(*_both(case, gradients=change))
    if change is not constant:
        assert_gradients(*_both(case, inputs=change, gradients=change))


def _both(case: Case, **layouts: object) -> tuple[list[Tensor | None], list[Tensor | None]]:
    contiguous = {side: lambda t, f=f: f(t).contiguous() for side, f in layouts.items()}
    return sweep(case, **layouts).flat(), sweep(case, **contiguous).flat()


@pytest.mark.parametrize("case", IMAGES, ids=lambda c: c.id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_channels_last_is_kept_in_all_passes(case: Case, dtype: torch.dtype) -> None:
    def images(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    for t in sweep(case, dtype=dtype, inputs=images, gradients=images).flat():
        assert t is None or t.dim() < 4 or t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", BATCH_NORM_ACT, ids=lambda c: c.id)
@pytest.mark.parametrize("gradients", [torch.clone, expanded, constant], ids=lambda f: f.__name__)
def test_batch_norm_keeps_channels_last_for_any_gradient_layout(case: Case, gradients: object) -> None:
    channels_last = LAYOUTS["channels_last"]
    result = sweep(case, inputs=channels_last, gradients=gradients)
    strides = channels_last(case.inputs()[0]).stride()
    for t in (result.y, result.first[0], result.second[0]):
        assert t is None or t.stride() == strides
