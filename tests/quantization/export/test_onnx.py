"""A network in ONNX: what it is made of, and that onnxruntime computes what the simulation says."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.quantization.export import NotExportableError, compare, export_onnx
from gradl1_fast.quantization.export import integers as types
from gradl1_fast.training import models
from tests.networks import MOBILENET, NETWORKS, NO_NORM, RESNET, VGG, Network

onnx = pytest.importorskip("onnx", reason="export needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="export needs onnxruntime")


def calibrated(plain: nn.Module, x: Tensor, *, per_channel: bool = False) -> nn.Module:
    model = gl.convert(plain.eval(), per_channel=per_channel)
    gl.calibrate(model, [x])
    return model


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def network(which: Network, *, per_channel: bool = False) -> tuple[nn.Module, Tensor]:
    x = inputs(37, *which.shape[1:])
    return calibrated(which.make(torch.float32), x, per_channel=per_channel), x


def agrees(plain: nn.Module, x: Tensor, w: int | None = 8, a: int | None = 8) -> Any:
    """Check that a network agrees with its simulation; return the ONNX model."""
    exported = export_onnx(calibrated(plain, x), x, w=w, a=a)
    found = compare(exported, x)
    assert not found.faults()
    assert found.inputs == len(x)
    return onnx.load_from_string(exported.data)


def initializers(proto: Any, ending: str) -> dict[str, Any]:
    return {i.name: i for i in proto.graph.initializer if i.name.endswith(ending)}


@pytest.mark.parametrize(
    "widths", [(8, 8), (4, 8), (4, 4), (2, 2), (3, 5), (1, 1), (16, 16), (8, None), (None, 8)]
)
@pytest.mark.parametrize("which", NETWORKS, ids=lambda n: n.id)
def test_onnxruntime_computes_what_the_simulation_says(which: Network, widths: tuple[Any, Any]) -> None:
    model, x = network(which, per_channel=which is not VGG)
    exported = export_onnx(model, x, w=widths[0], a=widths[1])
    found = compare(exported, x)
    assert not found.faults()
    # An edge between two codes is met by chance; at 16 bits there are many.
    assert found.differing < (1e-4 if widths != (16, 16) else 1e-2)
    assert found.outputs < 1e-5
    assert found.top_1 == 1
    assert bool(found.where) is (widths[1] is not None)
    assert not exported.prepared.folding.refused


@pytest.mark.parametrize("name", ["digits_net", "vgg_small", "resnet50", "mobilenet_v2"])
def test_the_networks_of_the_library(name: str) -> None:
    # batch statistics of their own, so that values neither vanish nor explode
    plain = models.build(name, classes=10, channels=3, width=4)
    plain.train()(inputs(8, 3, 32, 32))
    agrees(plain, inputs(4, 3, 32, 32), 4, 8)


def test_the_simulation_of_an_unfolded_network_is_near() -> None:
    model, x = network(RESNET, per_channel=True)
    exported = export_onnx(model, x, w=8, a=8)
    with gl.bits(model, w=8, a=8):
        unfolded = model(x)
    apart = (exported.prepared.model(x) - unfolded).detach().abs().max()
    assert apart < 0.05 * unfolded.detach().abs().max()


def test_relu6_does_not_keep_activations_from_4_bits() -> None:
    if not types._runs(types.IntegerType("UINT4", 4, 21)):
        pytest.skip("the installed onnxruntime does not run uint4")
    model, x = network(MOBILENET)
    exported = export_onnx(model, x, w=4, a=4)
    assert not exported.remarks
    zeros = initializers(onnx.load_from_string(exported.data), ".zero_point").values()
    assert {zero.data_type for zero in zeros} == {onnx.TensorProto.UINT4}


def test_every_activation_quantizer_is_in_the_file() -> None:
    model, x = network(MOBILENET)
    exported = export_onnx(model, x, w=4, a=8)
    kinds = Counter(node.op_type for node in onnx.load_from_string(exported.data).graph.node)
    quantizers = [n for n, m in model.named_modules() if isinstance(m, gl.nn.ActivationQuantizer)]
    assert sorted(exported.quantized) == sorted(quantizers)
    assert kinds["QuantizeLinear"] == len(quantizers)
    layers = sum(isinstance(m, gl.QConv2d | gl.QLinear) for m in model.modules())
    assert kinds["DequantizeLinear"] == len(quantizers) + layers
    assert not kinds["BatchNormalization"]


@pytest.mark.parametrize(
    ("bits", "name", "opset"),
    [(8, "INT8", 18), (4, "INT4", 21), (2, "INT2", 25), (16, "INT16", 21), (5, "INT8", 18)],
)
def test_types_of_weights_and_the_opset_they_need(bits: int, name: str, opset: int) -> None:
    if not types._runs(types.IntegerType(name, bits if bits != 5 else 8, opset)):
        pytest.skip(f"the installed onnxruntime does not run {name}")
    model, x = network(NO_NORM)
    exported = export_onnx(model, x, w=bits, a=None)
    proto = onnx.load_from_string(exported.data)
    assert (exported.opset, proto.opset_import[0].version) == (opset, opset)
    codes = initializers(proto, "weight.codes")
    assert len(codes) == 4
    assert {i.data_type for i in codes.values()} == {getattr(onnx.TensorProto, name)}
    limit = max(2 ** (bits - 1) - 1, 1)
    for one in codes.values():
        values = onnx.numpy_helper.to_array(one).astype("int32")
        assert abs(values).max() == limit


def test_codes_of_4_bits_are_packed_two_to_a_byte() -> None:
    model, x = network(NO_NORM)
    sizes = [len(export_onnx(model, x, w=w, a=None).data) for w in (8, 4)]
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight"))
    assert abs(sizes[0] - sizes[1] - weights / 2) < 64
    assert types.to_bytes(torch.tensor([1, -1, 7]), 4) == bytes([0xF1, 0x07])
    assert types.to_bytes(torch.tensor([1, -1, 0, 1, 1]), 2) == bytes([0b01001101, 0b01])
    assert types.to_bytes(torch.tensor([255, 0]), 8) == bytes([255, 0])
    assert types.to_bytes(torch.tensor([-2]), 16) == (-2).to_bytes(2, "little", signed=True)


@pytest.mark.parametrize(("bits", "clips"), [(8, False), (5, True), (1, True)])
def test_activations_of_other_widths_are_clipped(bits: int, clips: bool) -> None:
    model, x = network(NO_NORM)
    proto = onnx.load_from_string(export_onnx(model, x, w=8, a=bits).data)
    assert bool(initializers(proto, ".q_max")) is clips
    for end in initializers(proto, ".q_max").values():
        assert onnx.numpy_helper.to_array(end) == 2**bits - 1


def test_where_narrow_types_do_not_run_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "_runs", lambda type_: False)
    model, x = network(NO_NORM)
    exported = export_onnx(model, x, w=2, a=4)
    assert exported.opset == 18
    assert any("INT2 needs opset 25" in remark for remark in exported.remarks)
    assert any("UINT4 needs opset 21" in remark for remark in exported.remarks)
    assert not compare(exported, x).faults()


def test_a_file_that_the_runtime_cannot_load_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(NO_NORM)
    real, calls = types.session, []

    def failing(data: bytes) -> Any:
        calls.append(data)
        if len(calls) == 1:
            raise RuntimeError("uint4 is not here")
        return real(data)

    monkeypatch.setattr("gradl1_fast.quantization.export.onnx_file.session", failing)
    exported = export_onnx(model, x, w=4, a=4)
    assert exported.remarks == [
        "codes of activations take 8 bits: with narrower types, onnxruntime says: uint4 is not here"
    ]
    monkeypatch.setattr("gradl1_fast.quantization.export.onnx_file.session", lambda data: 1 / 0)
    with pytest.raises(NotExportableError, match="onnxruntime cannot load the model: division by zero"):
        export_onnx(model, x, w=4, a=4)


def test_the_batch_is_free_and_the_name_of_the_input_is_known() -> None:
    model, x = network(VGG)
    exported = export_onnx(model, x[:3], w=8, a=8)
    session = types.session(exported.data, fused=False)
    for count in (1, 2, 37):
        (y,) = session.run(None, {"input": x[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(y), exported.prepared.model(x[:count]), rtol=0, atol=1e-4)


def test_the_model_stays_as_it_was() -> None:
    model, x = network(VGG)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gl.set_bits(model, w=6, a=7)
    y = model(x)
    export_onnx(model, x, w=3, a=3)
    assert torch.equal(model(x), y)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class ReluFirst(nn.Module):
    """Conv -> ReLU -> BN: the batch norm must not be folded backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        for value in (self.norm.running_mean, self.norm.bias):
            nn.init.uniform_(value, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(F.relu(self.conv(x))).mean((2, 3)))


def test_what_cannot_be_folded_is_a_node_of_its_own() -> None:
    x = inputs(20, 3, 8, 8)
    model = calibrated(ReluFirst(), x)
    exported = export_onnx(model, x, w=8, a=8)
    kinds = Counter(node.op_type for node in onnx.load_from_string(exported.data).graph.node)
    assert kinds["BatchNormalization"] == 1
    assert exported.remarks == ["norm follows relu, not a convolution: not folded"]
    assert not compare(exported, x).faults()


class Residual(nn.Module):
    """A residual sum with a batch norm that is not folded, since its convolution is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last(F.relu(self.norm(y) + y)).flatten(1)


class Of(nn.Module):
    """A convolution and an operation behind it."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.conv(x))
        return torch.flatten(self.last(y), 1)


class Flattened(nn.Module):
    """A convolution, a way to flatten what it gives, and a linear layer."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 2)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.conv(x)))


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "relu6 that is not quantized": lambda y: F.relu6(y).mean((2, 3), keepdim=True),
    "method relu": lambda y: y.relu(),
    "add": lambda y: y + y.relu(),
    "add a number": lambda y: y + 0.5,
    "a number first": lambda y: 0.5 + y,
    "mul": lambda y: torch.mul(y, 2.5),
    "concat": lambda y: torch.cat([y, y.relu()], dim=-1),
    "max_pool2d": lambda y: F.max_pool2d(y, 3, 2, padding=1),
    "max_pool2d dilated": lambda y: F.max_pool2d(y, 2, stride=1, dilation=2),
    "avg_pool2d": lambda y: F.avg_pool2d(y, (2, 3), 2, 1),
    "avg_pool2d without pad": lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False),
    "adaptive_avg_pool2d": lambda y: F.adaptive_avg_pool2d(y, (4, 2)),
    "mean": lambda y: y.mean((2, 3), keepdim=True),
    "mean of one": lambda y: torch.mean(y, -1, True),
}
MODULES: dict[str, nn.Module] = {
    "residual": Residual(),
    "view": Flattened(lambda y: y.view(y.size(0), -1)),
    "reshape": Flattened(lambda y: y.reshape(-1, y.shape[1] * y.shape[2] * y.shape[3])),
    "one dimension": nn.Sequential(nn.Conv1d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
    "three dimensions": nn.Sequential(nn.Conv3d(3, 4, 2), nn.AvgPool3d(2), nn.Conv3d(4, 2, 1), nn.Flatten()),
    "same": nn.Sequential(nn.Conv2d(3, 4, (3, 4), padding="same", dilation=(2, 1)), nn.Flatten()),
    "valid": nn.Sequential(nn.Conv2d(3, 4, 3, padding="valid"), nn.Flatten()),
    "groups": nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.ReLU6(), nn.Flatten()),
    "identity and dropout": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(), nn.Flatten()),
    "linear of three dimensions": nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)),
    "max pooling": nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(2), nn.Flatten()),
    "a later batch norm": nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten()),
    "plain batch norm": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1)),
}  # fmt: skip
SHAPES = {
    "one dimension": (9, 3, 8),
    "three dimensions": (5, 3, 6, 6, 6),
    "linear of three dimensions": (9, 4, 8),
    "a later batch norm": (9, 3, 8),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("a", [8, 4])
def test_operations(name: str, a: int) -> None:
    agrees(Of(OPERATIONS[name]), inputs(9, 3, 8, 8), 8, a)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    torch.manual_seed(0)
    agrees(MODULES[name], inputs(*SHAPES.get(name, (9, 3, 8, 8))))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x), x


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "unknown module": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), r"1 \(GELU\) is no operation"),
    "unknown function": (Of(torch.tanh), r"tanh \(tanh\) is no operation"),
    "unknown method": (Of(lambda y: y.sigmoid()), r"sigmoid \(sigmoid\) is no operation"),
    "part of a tensor": (
        Of(lambda y: operator.getitem(y, slice(0, 2))),
        r"getitem \(getitem\) is no operation",
    ),
    "padding mode": (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
        r"0 \(QConv2d\) has padding_mode='reflect'",
    ),
    "ceil_mode": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, ceil_mode=True)),
        r"1 \(MaxPool2d\) has ceil",
    ),
    "uneven pooling": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(4)),
        r"1 \(AdaptiveAvgPool2d\) pools \(6, 6\) to \(4, 4\)",
    ),
    "flattening of two": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2)),
        r"1 \(Flatten\) flattens dimensions 2",
    ),
    "reshaping": (
        Of(lambda y: y.view(y.size(0), 4, 4, 16)),
        r"view \(view\) turns \(2, 4, 8, 8\) to \(2, 4, 4, 16\)",
    ),
    "split": (Of(lambda y: torch.cat(y.split(2, 1), 1)), r"split \(split\) is no operation"),
    "sum with alpha": (Of(lambda y: torch.add(y, y, alpha=2)), r"add \(add\) has arguments besides"),
    "mean of all": (Of(lambda y: y + y.mean()), r"mean \(mean\) is over dim=None"),
    "two outputs": (TwoInputs(), "one tensor as its input and one tensor as its output"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name: str) -> None:
    plain, message = REFUSED[name]
    x = inputs(2, 3, 8, 8)
    model = gl.convert(plain.eval())
    gl.calibrate(model, [x])
    with pytest.raises(NotExportableError, match=message):
        export_onnx(model, x, w=8, a=8)


def test_models_that_cannot_be_exported() -> None:
    model, x = network(NO_NORM)
    with pytest.raises(NotExportableError, match="in training mode"):
        export_onnx(model.train(), x, w=8, a=8)
    with pytest.raises(NotExportableError, match="not converted"):
        export_onnx(nn.Linear(2, 2).eval(), x, w=8, a=8)
    with pytest.raises(NotExportableError, match=r"0\.weight is torch.float64"):
        export_onnx(model.eval().double(), x, w=8, a=8)
    with pytest.raises(NotExportableError, match="has no graph"):
        export_onnx(gl.QLinear(3, 2, quantize_input=False).eval(), inputs(2, 3), w=8, a=None)
    with pytest.raises(RuntimeError, match="no activation range"):
        export_onnx(gl.convert(NO_NORM.make(torch.float32).eval()), x, w=8, a=8)


@pytest.mark.parametrize("bits", [0, 9, 15, 17])
def test_widths_that_are_not_exported(bits: int) -> None:
    model, x = network(NO_NORM)
    with pytest.raises(ValueError, match="1 to"):
        export_onnx(model, x, w=8, a=bits)
    with pytest.raises(ValueError, match="1 to"):
        export_onnx(model, x, w=bits, a=8)
