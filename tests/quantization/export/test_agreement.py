"""The comparison detects faults in a file."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradl1_fast.quantization.export import Agreement, compare, export_onnx
from gradl1_fast.quantization.export.agreement import compare_model
from gradl1_fast.quantization.export.formats import FORMATS
from tests.networks import NO_NORM
from tests.quantization.export.models import calibrated, exported, inputs, network

onnx = pytest.importorskip("onnx", reason="export needs onnx")
pytest.importorskip("onnxruntime", reason="export needs onnxruntime")
pytest.importorskip("onnxscript", reason="export needs onnxscript")

GOOD = Agreement(inputs=10, codes=1, where="a", differing=0.1, outputs=1e-3, top_1=0.99, end_to_end=0.1)


def with_constant(name: str, change: Any, file: Any = None) -> Any:
    file = file or exported(NO_NORM, 8, 8)
    proto = onnx.load_from_string(file.data)
    (constant,) = [i for i in proto.graph.initializer if i.name == name]
    value = onnx.numpy_helper.to_array(constant).copy()
    constant.CopyFrom(onnx.numpy_helper.from_array(change(value), name))
    return dataclasses.replace(file, data=proto.SerializeToString())


def one_code(value: Any) -> Any:
    value.flat[0] += -40 if value.flat[0] > 0 else 40
    return value


def test_a_good_file_has_no_faults_and_the_accuracy_of_the_simulation() -> None:
    x, file = inputs(37, 3, 8, 8), exported(NO_NORM, 8, 8)
    with torch.no_grad():
        labels = file.prepared.model(x).argmax(1)
    labels[:5] = (labels[:5] + 1) % 5
    found = compare(file, x, labels=labels, batch_size=20)
    assert found.codes <= 1
    assert not found.faults()
    assert found.accuracy == found.expected == pytest.approx(100 * 32 / 37)
    assert compare(file, x).accuracy is None
    assert not GOOD.faults()
    with pytest.raises(TypeError, match=r"export_onnx.*FORMATS"):
        compare(FORMATS["torch-export"].write(*network(NO_NORM), w=8, a=8), x)


CHANGES = {
    "one weight": ("0.weight.codes", one_code, "codes at "),
    "a scale": ("2.weight.scale", lambda v: v * 1.1, "codes at "),
    "a bias": ("0.bias.scale", lambda v: v * 3, "codes at "),
    "a zero point": ("2.input.zero_point", lambda v: v + 3, "codes at "),
    "the last bias": ("7.bias.codes", lambda v: v[::-1].copy(), "outputs differ by "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_faults_in_a_file_are_found(name: str) -> None:
    constant, change, message = CHANGES[name]
    found = compare(with_constant(constant, change), inputs(37, 3, 8, 8), fused=False)
    assert any(fault.startswith(message) for fault in found.faults())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": 2}, "codes at a differ by 2, allowed is 1"),
        ({"outputs": 1.1e-3}, "outputs differ by 0.0011 of the largest, allowed is 0.001"),
        ({"outputs": float("nan")}, "outputs differ by nan"),
        ({"top_1": 0.98}, "top-1 agreement is 98.00 %, required is 99 %"),
        ({"accuracy": 88.9, "expected": 90.0}, "accuracy is 88.90 %, in the simulation 90.00 %"),
    ],
)
def test_each_bound(change: dict[str, float], message: str) -> None:
    (fault,) = dataclasses.replace(GOOD, **change).faults()
    assert fault.startswith(message)


def test_an_edge_case_counts_once_and_not_downstream() -> None:
    # A bias that is a little off moves some values of one activation over an edge, and nothing behind it.
    found = compare(with_constant("0.bias.scale", lambda v: v * 1.003), inputs(37, 3, 8, 8), fused=False)
    assert (found.where, found.codes) == ("2.input", 1)
    assert found.outputs < 1e-6 < found.end_to_end


class Twice(nn.Module):
    """A layer that is called with two tensors, and two layers that are given one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last, self.other = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.linear(x).relu())
        return self.last(y) * self.other(y)


def test_each_call_of_a_layer_is_compared_and_a_shared_activation_is_one() -> None:
    x = inputs(400, 4)
    file = export_onnx(calibrated(Twice(), x), x, w=7, a=8)  # 8 bits overflow without VNNI
    assert list(file.quantized) == ["linear.input", "linear.input (2)", "last.input"]
    assert not compare(file, x).faults()
    found = compare(with_constant("linear.bias.scale", lambda v: v * 1.001, file), x, fused=False)
    assert found.codes == 1
    assert found.outputs < 1e-6 < found.end_to_end


@pytest.mark.parametrize(
    ("outputs", "share"),
    [([1.0, 1.0, 0.0], 1), ([1 - 2**-24, 1.0, 0.0], 1), ([1.0, 1 - 2**-24, 0.0], 1), ([0.0, 0.0, 1.0], 0)],
)
def test_rounding_does_not_decide_between_classes_that_tie(outputs: list[float], share: float) -> None:
    one, other = (lambda x: torch.tensor([outputs])), (lambda x: torch.tensor([[1.0, 1.0, 0.0]]))
    for file, simulation in ((one, other), (other, one)):
        prepared: Any = SimpleNamespace(model=simulation)
        assert compare_model(file, prepared, torch.ones(1, 2)).top_1 == share


def test_there_must_be_inputs() -> None:
    with pytest.raises(ValueError, match="no inputs"):
        compare(exported(NO_NORM, 8, 8), inputs(0, 3, 8, 8))
