"""Files contain the codes of round_weights."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.quantization.export import FORMATS, simulate
from gradl1_fast.quantization.export.integers import prevent_overflow
from tests.networks import VGG

X = VGG.batch(torch.float32)[0]
LAYERS = ("0", "3", "7", "12", "14")


@functools.cache
def rounded(per_channel: bool = True) -> Any:
    model = gl.convert(VGG.make(torch.float32).eval(), per_channel=per_channel)
    gl.calibrate(model, [X])
    gl.calibrate_weights(model, ranges="mse")
    gl.round_weights(model, [X], w=4)
    return model


def simulated(model: Any) -> Tensor:
    with gl.bits(model, w=4, a=8), torch.no_grad():
        return model(X)


def chosen(model: Any, w: int = 4) -> list[Tensor]:
    """Return the codes of each weight in order, without the signs that folding may change."""
    return [model.get_submodule(name).weight_quantizer.rounded[w].abs() for name in LAYERS]


def test_a_torch_file_has_the_codes() -> None:
    model = rounded()
    file = FORMATS["torch-export"].write(model, X, w=4, a=8)
    assert not FORMATS["torch-export"].compare(file, X).faults()
    program = torch.export.load(io.BytesIO(file.data))
    found = [value.abs() for key, value in program.state_dict.items() if key.endswith("codes")]
    assert all(torch.equal(*pair) for pair in zip(found, chosen(model), strict=True))
    torch.testing.assert_close(program.module()(X), simulated(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("a", [8, None])
def test_an_onnx_file_has_the_codes(a: int | None) -> None:
    onnx = pytest.importorskip("onnx", reason="export needs onnx")
    pytest.importorskip("onnxruntime", reason="export needs onnxruntime")
    pytest.importorskip("onnxscript", reason="export needs onnxscript")
    model = rounded()
    file = FORMATS["onnx"].write(model, X, w=4, a=a)
    assert not FORMATS["onnx"].compare(file, X).faults()
    constants = {i.name: i for i in onnx.load_from_string(file.data).graph.initializer}
    for name, codes in zip(LAYERS, chosen(model), strict=True):
        found = onnx.numpy_helper.to_array(constants[f"{name}.weight.codes"]).astype("int32")
        values = torch.from_numpy(abs(found))
        assert torch.equal(values if values.shape == codes.shape else values.t(), codes.int())


def test_codes_dropped_by_folding_give_a_remark() -> None:
    prepared: Any = simulate(rounded(per_channel=False), X, w=4, a=8)
    assert "0: folding changed its grid; its weight is rounded to nearest" in prepared.remarks()
    assert not prepared.model.get_submodule("0").weight_quantizer.rounded
    assert prepared.model.get_submodule("12").weight_quantizer.rounded


def test_a_channel_whose_scale_is_raised_gets_nearest_codes() -> None:
    torch.manual_seed(0)
    model: Any = gl.convert(nn.Sequential(nn.Linear(8, 4)).eval(), per_channel=True)
    with torch.no_grad():
        model[0].weight[1] *= 1e-30
    x = torch.randn(32, 8) @ torch.randn(8, 8)
    gl.calibrate(model, [x])
    gl.round_weights(model, [x], w=4)
    before = model[0].weight_quantizer.rounded[4].clone()
    gl.set_bits(model, w=4, a=8)
    assert prevent_overflow(model) == {"0": 1}
    after = model[0].weight_quantizer.rounded[4]
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert before[1].any()
    assert not after[1].any()
    model(x)
