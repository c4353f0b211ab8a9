"""How many convolutions a penalised step of a whole network takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradl1_fast as gl
from gradl1_fast.backends import reference
from gradl1_fast.nn import QConv2d
from tests.networks import MOBILENET, NETWORKS, RESNET, Network


class Convolutions(TorchDispatchMode):
    """Counts fprop, dgrad and wgrad, also inside the registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "gradl1_fast" and name.startswith("conv_"):
            with self:
                return getattr(reference, name)(*args)
        if func is torch.ops.aten.convolution.default:
            self.counts["fprop"] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            dgrad, wgrad, _ = args[-1]
            self.counts.update({"dgrad": int(dgrad), "wgrad": int(wgrad)})
        else:
            assert "convolution" not in name
        return func(*args, **(kwargs or {}))


def convolutions(network: Network, lambda_w: float, lambda_a: float, bits: int | None = None) -> Counter[str]:
    """Return the sums over all layers of a step."""
    model = gl.convert(network.make())
    gl.calibrate(model, [network.batch()])
    gl.set_bits(model, w=bits, a=bits)
    penalty = gl.GradL1(model, lambda_w, lambda_a)
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
