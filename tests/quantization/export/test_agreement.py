"""The comparison itself: it sees what is wrong in a file."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gradl1_fast.quantization.export import Agreement, Exported, compare, export_onnx
from tests.networks import NO_NORM, VGG
from tests.quantization.export.test_onnx import inputs, network

onnx = pytest.importorskip("onnx", reason="export needs onnx")
pytest.importorskip("onnxruntime", reason="export needs onnxruntime")

GOOD = Agreement(inputs=10, codes=1, where="a", differing=0.1, outputs=1e-3, top_1=0.99)


@pytest.fixture(scope="module")
def exported() -> Exported:
    model, x = network(NO_NORM)
    return export_onnx(model, x, w=8, a=8)


def with_constant(exported: Exported, name: str, change: Any) -> Exported:
    proto = onnx.load_from_string(exported.data)
    (constant,) = [i for i in proto.graph.initializer if i.name == name]
    value = onnx.numpy_helper.to_array(constant).copy()
    constant.CopyFrom(onnx.numpy_helper.from_array(change(value), name))
    return dataclasses.replace(exported, data=proto.SerializeToString())


def one_code(value: Any) -> Any:
    value.flat[0] += -40 if value.flat[0] > 0 else 40
    return value


def test_a_good_file_has_no_faults(exported: Exported) -> None:
    found = compare(exported, inputs(37, 3, 8, 8))
    assert found.codes <= 1
    assert not found.faults()
    assert not GOOD.faults()


CHANGES = {
    "one weight": ("0.weight.codes", one_code, "codes at "),
    "a step": ("2.weight.scale", lambda v: v * 1.1, "codes at "),
    "a bias": ("0.bias", lambda v: v + 0.2, "codes at "),
    "a zero point": ("activation_quantizers.input_1.zero_point", lambda v: v + 3, "codes at "),
    "the last bias": ("7.bias", lambda v: v[::-1].copy() + 1, "outputs are"),
    "NaN": ("7.bias", lambda v: v * float("nan"), "outputs are inf"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_faults_in_a_file_are_found(name: str, exported: Exported) -> None:
    constant, change, message = CHANGES[name]
    found = compare(with_constant(exported, constant, change), inputs(37, 3, 8, 8))
    assert any(fault.startswith(message) for fault in found.faults())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": 2}, "codes at a are 2 apart, allowed is 1"),
        ({"outputs": 1.1e-3}, "outputs are 0.0011 of the largest apart, allowed is 0.001"),
        ({"outputs": float("nan")}, "outputs are nan"),
        ({"top_1": 0.98}, "top-1 agreement is 98.00 %, needed is 99 %"),
    ],
)
def test_each_bound(change: dict[str, float], message: str) -> None:
    (fault,) = dataclasses.replace(GOOD, **change).faults()
    assert fault.startswith(message)


def test_an_edge_case_counts_once_and_not_downstream(exported: Exported) -> None:
    # A zero point that is off by one moves every value of the first tensor, and nothing behind it.
    moved = with_constant(exported, "activation_quantizers.input_1.zero_point", lambda v: v + 1)
    found = compare(moved, inputs(37, 3, 8, 8))
    assert found.where == "activation_quantizers.input_1"
    assert found.codes <= 1


def test_integer_kernels_differ_by_their_biases_alone() -> None:
    """Why there are two columns: fused by onnxruntime, biases are rounded to coarse steps."""
    model, x = network(VGG)
    exported = export_onnx(model, x, w=3, a=5)
    fused, as_written = compare(exported, x, fused=True), compare(exported, x)
    assert as_written.differing < 1e-4
    assert fused.codes <= 1
    for layer in exported.prepared.model.modules():
        if isinstance(getattr(layer, "bias", None), torch.nn.Parameter):
            torch.nn.init.zeros_(layer.bias)
    without = compare(export_onnx(exported.prepared.model, x, w=3, a=5), x, fused=True)
    assert without.differing <= as_written.differing + 1e-4


def test_there_must_be_inputs(exported: Exported) -> None:
    with pytest.raises(ValueError, match="no inputs"):
        compare(exported, inputs(0, 3, 8, 8))
