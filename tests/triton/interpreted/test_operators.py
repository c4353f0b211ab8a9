"""The registered operators over all cases of tests/ops, computed by Triton, against independent truth."""

from __future__ import annotations

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.backends import resolve
from tests.gradients import assert_gradients
from tests.ops.cases import BATCH_NORM_ACT, FAKE_QUANTIZE, L1_NORM, TAP, Case, random
from tests.ops.sweeps import sweep


@pytest.mark.parametrize("case", TAP + FAKE_QUANTIZE + L1_NORM + BATCH_NORM_ACT, ids=lambda c: c.id)
def test_all_sweeps_agree_with_the_truth(case: Case) -> None:
    truth = sweep(case, truth=True)
    with gl.backend("triton"):
        ours = sweep(case)
    assert_gradients(ours.flat(), truth.flat())


def test_gradgradcheck() -> None:
    case = next(c for c in BATCH_NORM_ACT if c.id == "batch_norm_act training relu")
    inputs = [t.requires_grad_() for t in case.inputs()]
    with gl.backend("triton"):
        assert torch.autograd.gradgradcheck(lambda *t: case.call(t, None), inputs, fast_mode=True)


def test_triton_is_who_computes() -> None:
    with gl.backend("triton"):
        for op in ("tap", "fake_quantize", "l1_norm", "batch_norm_act"):
            assert resolve(op, random((), 0)).__name__ == "gradl1_fast.backends.triton"
        for op in ("conv", "linear"):
            assert resolve(op, random((), 0)).__name__ == "gradl1_fast.backends.reference"
    assert resolve("tap", random((), 0)).__name__ != "gradl1_fast.backends.triton"
