"""The comparison of steps compares like with like."""

import pytest
import torch

from gradl1_fast.training.demo import speed
from gradl1_fast.training.models import digits_net, resnet18

CASES = {
    "digits": (lambda: digits_net(4), (4, 1, 8, 8)),
    "resnet18": (lambda: resnet18(4), (4, 3, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_both_compute_the_same_penalty(name):
    make, shape = CASES[name]
    torch.manual_seed(0)
    result = speed.measure(name, make, (torch.randn(shape), torch.arange(4)), rounds=1)
    assert result.disagreement < 1e-4
    assert {kind: len(times) for kind, times in result.times.items()} == dict.fromkeys(
        (speed.PLAIN, speed.EAGER, speed.OURS, speed.OURS_STEP), 1
    )


def test_medians_and_ratios():
    result = speed.Speed("x", {speed.PLAIN: [2.0, 1.0, 9.0], speed.OURS: [6.0]}, 0.0)
    assert result.median(speed.PLAIN) == 2.0
    assert result.ratio(speed.OURS) == 3.0
