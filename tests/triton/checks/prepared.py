"""Operations that Triton's backend prepares for a shape, on the fixture ``device``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradl1_fast.backends import contract, triton
from gradl1_fast.backends.triton import _launch
from tests.compiled.prepared import (
    ROUNDING,
    Arguments,
    assert_batch_norm_act,
    assert_ends,
    assert_same,
    assert_sites,
    true_ends,
)
from tests.ops.layouts import LAYOUTS, channels_last

FEW = [(True, "relu", True), (True, "none", True), (False, "relu6", False)]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_ends_come_with_y_and_their_gradient_with_dx(dtype: torch.dtype, device: torch.device) -> None:
    a = Arguments((3, 5, 4, 3), dtype, channels_last, device)
    assert_ends(a, triton, ROUNDING[dtype])
    assert_sites(a, triton)


@pytest.mark.parametrize("shape", [(3, 5, 4, 3), (2, 3, 9, 17)], ids=str)
def test_ends_of_planes(shape: Any, device: torch.device) -> None:
    assert_ends(Arguments(shape, torch.float32, Tensor.contiguous, device), triton, 0.0, FEW)


@pytest.mark.parametrize("layout", [channels_last, LAYOUTS["sliced"]], ids=["rows", "sliced"])
@pytest.mark.parametrize("quantized", [False, True])
def test_prepared_calls_have_the_bits_of_the_sweeps(
    quantized: bool, layout: Any, device: torch.device
) -> None:
    a = Arguments((3, 5, 4, 3), torch.float32, layout, device)
    assert_batch_norm_act(a, triton, quantized=quantized, kinds=FEW)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_ends_of_what_is_not_finite_are_those_of_pytorch(value: float, device: torch.device) -> None:
    x = torch.randn(3, 5, 17, 29, device=device)  # several blocks
    x[1, 2, 3, 4], x[2, 0, 0, 0] = value, value
    tap = contract.prepare_tap(triton, x)
    ends, d_ends = tap.ends(x), torch.tensor([0.5, 2.0], device=device)
    assert_same(ends, true_ends(x), "ends")
    leaf = x.clone().requires_grad_()
    truth = torch.autograd.grad((torch.stack([leaf.amin(), leaf.amax()]) * d_ends).sum(), leaf)[0]
    assert_same(tap.add_ends_gradient(None, x, ends, d_ends), truth, "gradient")


def test_ties_in_more_blocks_than_are_combined_at_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "BLOCK", 16)
    x = torch.randn(60, 17, device=device).clamp(-0.5, 0.5)
    assert_same(contract.prepare_tap(triton, x).ends(x), true_ends(x), "ends")
