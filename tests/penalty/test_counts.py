"""The number of convolutions in a penalised step of a whole network."""

from __future__ import annotations

from collections import Counter

import pytest

import gradl1_fast as gl
from gradl1_fast.nn import QConv2d
from tests.convolutions import Convolutions
from tests.networks import MOBILENET, NETWORKS, RESNET, Network


def convolutions(network: Network, lambda_w: float, lambda_a: float, bits: int | None = None) -> Counter[str]:
    """Return the sums over all layers of a step."""
    model = gl.convert(network.make())
    gl.calibrate(model, [network.batch()])
    gl.set_bits(model, w=bits, a=bits)
    penalty = gl.GradL1(model, lambda_w, lambda_a)
    network.loss(model)  # the first armed pass compares plans with modules
    with Convolutions() as mode:
        loss = network.loss(model)
        (loss + penalty(loss)).backward()
    return mode.counts


def layers(network: Network) -> int:
    return sum(isinstance(m, QConv2d) for m in gl.convert(network.make()).modules())


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
@pytest.mark.parametrize("bits", [None, 4])
def test_nine_for_each_layer_and_four_for_the_first(network: Network, bits: int | None) -> None:
    n = layers(network)
    for lambda_a in (0.0, 0.1):
        counts = convolutions(network, 0.1, lambda_a, bits)
        assert counts == {"fprop": 3 * n - 1, "dgrad": 3 * (n - 1), "wgrad": 3 * n - 1}
        assert counts.total() == 9 * (n - 1) + 4


@pytest.mark.parametrize("network", [RESNET, MOBILENET], ids=lambda n: n.id)
def test_six_for_each_layer_without_a_penalty_on_weights(network: Network) -> None:
    n = layers(network)
    counts = convolutions(network, 0.0, 0.1)
    assert counts.total() <= 6 * (n - 1) + 2  # the first layer: its output and its weight's gradient
    assert counts == {"fprop": 2 * n - 1, "dgrad": 2 * (n - 1), "wgrad": 2 * n - 1}


def test_three_for_each_layer_without_a_penalty() -> None:
    n = layers(RESNET)
    assert convolutions(RESNET, 0.0, 0.0) == {"fprop": n, "dgrad": n - 1, "wgrad": n}
