"""The report names every layer, every quantizer and what stays in float."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from tests.networks import MOBILENET, NETWORKS, VGG, Network, layers
from tests.nn.models import UNTRACEABLE


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
def test_every_layer_and_quantizer_has_a_row(network: Network) -> None:
    plain = network.make()
    result = gl.report(gl.convert(plain))
    assert [row[0] for row in result.layers] == layers(plain)
    assert len(result.quantizers) == 1 + len(network.producers)
    assert [row[-1] for row in result.quantizers].count("no: network input") == 1
    shown = str(result)
    assert all(name in shown for name, *_ in (*result.layers, *result.quantizers))
    assert repr(result) == shown


def test_rows_say_bits_and_ranges() -> None:
    model = gl.convert(VGG.make(), per_channel=True)
    gl.calibrate(model, [torch.ones(2, 3, 8, 8).double()])
    gl.set_bits(model, w=4, a=None)
    result = gl.report(model)
    assert result.layers[0] == ("0", "QConv2d", "4x3x3x3", "4", "per channel")
    assert ("activation_quantizers.input_1", "float", "1 to 1", "no: network input") in result.quantizers


def test_operations_left_in_float_are_listed() -> None:
    result = gl.report(gl.convert(VGG.make()))
    assert [kind for _, kind in result.unquantized] == ["MaxPool2d", "MaxPool2d", "Flatten", "ReLU"]
    result = gl.report(gl.convert(MOBILENET.make()))
    assert [kind for _, kind in result.unquantized] == ["mul", "add", "add", "AdaptiveAvgPool2d", "flatten"]


@pytest.mark.filterwarnings("ignore:gradl1_fast.convert")
def test_a_model_without_a_graph() -> None:
    result = gl.report(gl.convert(UNTRACEABLE["data_dependent"]()))
    assert [row[0] for row in result.layers] == ["conv1", "conv2", "fc"]
    assert result.unquantized == [("relu", "ReLU"), ("relu_", "ReLU")]


def test_a_single_layer() -> None:
    result = gl.report(gl.convert(nn.Linear(3, 2)))
    assert result.layers == [("", "QLinear", "2x3", "float", "per tensor")]
    assert "Operations left unquantized: none" in str(result)
