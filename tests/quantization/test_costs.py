"""Bytes and multiplications, counted by hand; and which quantizer feeds which layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast import functional as F
from tests.networks import MOBILENET, NETWORKS, VGG, Network

CONVS = {"0": (4, 3 * 9, 64), "3": (6, 4 * 9, 64), "7": (8, 6 * 9, 16)}  # outputs, weights of one, places
LINEARS = {"12": (10, 32, 1), "14": (5, 10, 1)}


def test_weights_and_multiplications_of_a_small_network() -> None:
    counted = gl.costs(gl.convert(VGG.make()), VGG.batch()[0])
    both = CONVS | LINEARS
    assert counted.weights == {name: n * m for name, (n, m, _) in both.items()}
    assert counted.products == {name: n * m * places for name, (n, m, places) in both.items()}
    w = {"0": 8, "3": 4, "7": 2, "12": None, "14": 1}
    size = (4 * 27 * 8 + 6 * 36 * 4 + 8 * 54 * 2 + 320 * 32 + 50) / 8
    assert counted.size(w) == size
    a = {"activation_quantizers.input_1": 8, "1.quantizer": 5}
    assert counted.inputs["0"] in a
    operations = (
        4 * 27 * 64 * 8 * 8 + 6 * 36 * 64 * 4 * 5 + 8 * 54 * 16 * 2 * 32 + 320 * 32 * 32 + 50 * 1 * 32
    )
    assert counted.bit_operations(w, a) == operations


def test_grouped_convolutions_multiply_within_their_groups() -> None:
    counted = gl.costs(gl.convert(MOBILENET.make()), MOBILENET.batch()[0])
    assert counted.products["blocks.0.depthwise.0"] == 8 * 9 * 16
    assert counted.weights["blocks.0.depthwise.0"] == 8 * 9


def test_without_an_example_nothing_is_multiplied() -> None:
    assert gl.costs(gl.convert(VGG.make())).products == {}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
def test_the_input_of_each_layer_lies_on_the_grid_of_its_quantizer(network: Network) -> None:
    model = gl.convert(network.make().eval())
    gl.calibrate(model, [network.batch()])
    inputs = gl.costs(model).inputs
    seen = {}
    for name in inputs:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].detach()})
        )
    with gl.bits(model, w=None, a=4):
        model(network.batch()[0])
    for name, quantizer in inputs.items():
        grid = model.get_submodule(str(quantizer)).grid(torch.float64, 4)
        torch.testing.assert_close(F.fake_quantize(seen[name], *grid), seen[name], rtol=0, atol=1e-12)
        others = {q for q in inputs.values() if q != quantizer}
        assert any(
            not torch.equal(
                F.fake_quantize(seen[name], *model.get_submodule(str(q)).grid(torch.float64, 4)), seen[name]
            )
            for q in others
        )


def test_a_layer_alone_and_tied_weights() -> None:
    assert gl.costs(gl.convert(nn.Linear(3, 2))).inputs == {"": "input_quantizer"}
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert gl.costs(gl.convert(tied)).weights == {"0": 9, "1": 0}


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers of this library"):
        gl.costs(VGG.make())
