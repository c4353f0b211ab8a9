from __future__ import annotations

import pytest
import torch

from tests.gradients import assert_gradients

TRUTH = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
ONE_LARGE = torch.full((100,), 0.1, dtype=torch.float64).index_fill(0, torch.tensor([0]), 1)

WRONG = {
    "a shape that would broadcast": (
        torch.full_like(TRUTH[:1], 0.5),
        torch.full_like(TRUTH, 0.5),
        1e-10,
        "shape",
    ),
    "a transposed shape": (TRUTH.t(), TRUTH, 1e-10, "shape"),
    "one element": (torch.where(TRUTH == 1, 0.5, TRUTH), TRUTH, 1e-3, "off"),
    "the sign": (-TRUTH, TRUTH, 0.5, "off"),
    "the sign of small elements": (torch.where(ONE_LARGE < 1, -0.1, ONE_LARGE), ONE_LARGE, 0.3, "direction"),
    "a small offset": (TRUTH + 0.009, TRUTH, 0.01, "signed bias"),
    "NaN": (TRUTH * float("nan"), TRUTH, 1e-3, "not finite"),
    "something for nothing": (TRUTH, None, 1e-3, "absent"),
    "nothing for something": (None, TRUTH, 1e-3, "absent"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_gradient_is_found(case: str) -> None:
    actual, expected, rtol, complaint = WRONG[case]
    with pytest.raises(AssertionError, match=complaint):
        assert_gradients([actual], [expected], rtol)


def test_a_missing_gradient_is_found() -> None:
    with pytest.raises(AssertionError):
        assert_gradients([TRUTH], [TRUTH, TRUTH])


def test_rounding_and_zeros_pass() -> None:
    zeros = torch.zeros(3)
    assert_gradients([TRUTH * (1 + 1e-12), zeros, None, zeros], [TRUTH, zeros, zeros, None])
