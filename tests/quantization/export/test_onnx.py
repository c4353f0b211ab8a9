"""ONNX files: their contents, and the results of a default onnxruntime session."""

from __future__ import annotations

import functools
import logging
import platform
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.export import NotExportableError, agreement, compare, export_onnx
from gradl1_fast.quantization.export import integers as types
from gradl1_fast.quantization.export.speed import integer_layers, optimized
from tests.networks import MOBILENET, NO_NORM, Network
from tests.quantization.export.models import (
    RESIDUAL,
    Attention,
    AttentionOfOtherSizes,
    Branching,
    FixedBatch,
    OfDict,
    Pools,
    Special,
    TwoInTwoOut,
    calibrated,
    exported,
    inputs,
    network,
    with_dead_channels,
)

onnx = pytest.importorskip("onnx", reason="export needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="export needs onnxruntime")
pytest.importorskip("onnxscript", reason="export needs onnxscript")

CPUINFO = Path("/proc/cpuinfo")


def test_an_export_shows_no_warnings_of_other_packages() -> None:
    x = inputs(4, 3)
    model = calibrated(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(model, x, w=8, a=8)


def test_an_export_does_not_log_that_torchvision_is_missing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level, original = logger.level, torch.onnx.export

    def export(*args: Any, **kwargs: Any) -> Any:
        logger.warning("torchvision is not installed")  # as the first export of a process does
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    x = inputs(4, 3)
    export_onnx(calibrated(nn.Sequential(nn.Linear(3, 2)), x), x, w=8, a=8)
    assert logger.name not in {record.name for record in caplog.records}
    assert logger.level == level


def initializers(data: bytes, ending: str) -> dict[str, Any]:
    proto = onnx.load_from_string(data)
    return {i.name: i for i in proto.graph.initializer if i.name.endswith(ending)}


def kinds(data: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(data).graph.node)


WIDTHS = [(8, 8), (4, 8), (4, 4), (2, 2), (3, 5), (1, 1), (16, 16), (8, None), (None, 8), (None, None)]


CASES = [(RESIDUAL, widths) for widths in WIDTHS]
CASES += [(which, widths) for which in (MOBILENET, NO_NORM) for widths in ((8, 8), (4, 4), (None, 8))]


@pytest.mark.parametrize(("which", "widths"), CASES, ids=lambda v: getattr(v, "id", None))
def test_a_default_session_agrees_with_the_simulation(which: Network, widths: tuple[Any, Any]) -> None:
    file = exported(which, *widths)
    found = compare(file, network(which)[1])
    assert not found.faults()
    # An edge between two codes is met by chance; in integers biases are rounded; at 16 bits edges are many.
    assert found.differing < (1e-2 if widths in ((8, 8), (16, 16)) else 1e-4)
    assert found.outputs < 1e-5
    assert found.top_1 == 1
    assert bool(found.where) is (widths[1] is not None)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
@pytest.mark.parametrize("widths", [(8, 8), (4, 4), (16, 16), (4, None)])
def test_a_session_with_fewer_optimisations_agrees_too(
    level: str, widths: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(model: bytes, *, fused: bool = True, exact: bool = True) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(agreement, "session", session)
    for which in (RESIDUAL, MOBILENET):
        found = compare(exported(which, *widths), network(which)[1])
        assert not found.faults()
        assert found.outputs < 1e-5


def test_the_file_agrees_with_the_folded_model_at_these_widths() -> None:
    model, x = network(RESIDUAL)
    file = exported(RESIDUAL, 4, 6, joints=False)
    (y,) = types.session(file.data).run(None, {"input": x.numpy()})
    folded = gl.fold_batch_norm(model).model
    with torch.no_grad(), gl.bits(folded, w=4, a=6):
        for quantizer in named_quantizers(folded).values():
            quantizer.bits = 8 if quantizer.is_input else 6
        expected = folded(x)
    assert float((torch.from_numpy(y) - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("which", "w"), [*((RESIDUAL, w) for w in (8, 4, 3, 16)), (MOBILENET, 4), (NO_NORM, 4)]
)
def test_the_codes_in_the_file_are_those_of_the_library(which: Network, w: int) -> None:
    file = exported(which, w, None)
    scales = initializers(file.data, "weight.scale")
    found = initializers(file.data, "weight.codes")
    layers = named_layers(file.prepared.model)
    assert len(found) == len(layers)
    for name, layer in layers.items():
        codes = torch.from_numpy(onnx.numpy_helper.to_array(found[f"{name}.weight.codes"]).astype("float32"))
        scale = torch.from_numpy(onnx.numpy_helper.to_array(scales[f"{name}.weight.scale"]).copy())
        scale = scale.reshape(-1, *[1] * (codes.dim() - 1)) if scale.dim() else scale
        assert torch.equal(codes * scale, layer.weight_quantizer(layer.weight.detach()))


@pytest.mark.parametrize(
    ("bits", "name", "opset"),
    [(8, "INT8", 21), (4, "INT4", 21), (2, "INT2", 25), (16, "INT16", 21), (5, "INT8", 21)],
)
def test_types_of_weights_and_the_opset_they_need(bits: int, name: str, opset: int) -> None:
    if not types._runs(types.IntegerType(name, bits if bits != 5 else 8, opset)):
        pytest.skip(f"the installed onnxruntime does not run {name}")
    file = exported(NO_NORM, bits, None)
    assert (file.opset, onnx.load_from_string(file.data).opset_import[0].version) == (opset, opset)
    codes = initializers(file.data, "weight.codes")
    assert {i.data_type for i in codes.values()} == {getattr(onnx.TensorProto, name)}
    limit = max(2 ** (bits - 1) - 1, 1)
    assert {int(abs(onnx.numpy_helper.to_array(one).astype("int32")).max()) for one in codes.values()} == {
        limit
    }


def test_codes_of_4_bits_are_packed_two_to_a_byte() -> None:
    sizes = [len(exported(NO_NORM, w, None).data) for w in (8, 4)]
    weights = sum(p.numel() for n, p in network(NO_NORM)[0].named_parameters() if n.endswith("weight"))
    assert abs(sizes[0] - sizes[1] - weights / 2) < 64
    assert types.to_bytes(torch.tensor([1, -1, 7]), 4) == bytes([0xF1, 0x07])
    assert types.to_bytes(torch.tensor([1, -1, 0, 1, 1]), 2) == bytes([0b01001101, 0b01])
    assert types.to_bytes(torch.tensor([255, 0]), 8) == bytes([255, 0])
    assert types.to_bytes(torch.tensor([-2]), 16) == (-2).to_bytes(2, "little", signed=True)


@pytest.mark.parametrize(("bits", "clips"), [(8, False), (5, True), (1, True)])
def test_activations_of_other_widths_are_clipped(bits: int, clips: bool) -> None:
    ends = initializers(exported(NO_NORM, 8, bits).data, ".q_max")
    assert bool(ends) is clips
    assert {int(onnx.numpy_helper.to_array(end)) for end in ends.values()} <= {2**bits - 1}


def test_the_input_of_the_network_keeps_8_bits() -> None:
    sites = exported(NO_NORM, 4, 4).prepared.a
    assert sites["0.input"] == 8
    assert set(sites.values()) == {4, 8}
    assert set(exported(NO_NORM, 4, 4, input_bits=1).prepared.a.values()) == {4}
    assert exported(NO_NORM, 4, 4, input_bits=None).prepared.a["0.input"] is None


def test_unsupported_narrow_types_give_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "_runs", lambda type_: False)
    file = exported(RESIDUAL, 2, 4, joints=False)
    assert file.opset == 21
    assert any("INT2 needs opset 25" in remark for remark in file.remarks)
    assert any("UINT4 needs opset 21" in remark for remark in file.remarks)
    assert not compare(file, network(NO_NORM)[1]).faults()


def test_a_file_that_the_runtime_cannot_load_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = types.session, []

    def failing(data: bytes, **options: Any) -> Any:
        calls.append(data)
        if len(calls) == 1:
            raise RuntimeError("uint4 is not here")
        return real(data)

    monkeypatch.setattr("gradl1_fast.quantization.export.onnx_file.session", failing)
    assert exported(NO_NORM, 4, 4).remarks == [
        "codes of activations are stored in 8 bits: "
        "with narrower types, onnxruntime reports: uint4 is not here"
    ]
    monkeypatch.setattr("gradl1_fast.quantization.export.onnx_file.session", lambda data, **_: 1 / 0)
    with pytest.raises(NotExportableError, match="onnxruntime cannot load the model: division by zero"):
        exported(NO_NORM, 4, 4)


@pytest.mark.parametrize("widths", [(8, 8), (4, 4), (3, 6), (1, 1)])
def test_onnxruntime_computes_every_layer_in_integers_at_8_bits_and_below(widths: tuple[int, int]) -> None:
    file = exported(RESIDUAL, *widths)
    layers = len(named_layers(file.prepared.model))
    assert integer_layers(file.data) == (layers, layers)
    grids = zip(file.program.marks, file.grids, strict=True)
    joints = [(mark, grid) for mark, grid in grids if mark.kind == "joint"]
    # Two sums of two operands, of which one is a site, and a pool.
    assert [mark.same_as is None for mark, _ in joints] == [True, False, True, True, True]
    assert {grid.bits for mark, grid in joints if grid is not None and mark.same_as is None} == {8}


@pytest.mark.parametrize("widths", [(16, 16), (8, None), (16, 8)])
def test_sums_and_biases_stay_in_float_where_a_layer_cannot_be_in_integers(widths: tuple[int, Any]) -> None:
    file = exported(RESIDUAL, *widths)
    grids = zip(file.program.marks, file.grids, strict=True)
    assert not any(grid for mark, grid in grids if mark.kind in ("joint", "bias"))


@pytest.mark.parametrize("widths", [(4, None), (16, 16), (16, 8)])
def test_weights_of_layers_in_float_are_dequantized_once_when_the_file_is_loaded(
    widths: tuple[int, Any],
) -> None:
    graph = optimized(exported(NO_NORM, *widths).data)
    constants = {constant.name for constant in graph.initializer}
    products = [node for node in graph.node if "Conv" in node.op_type or "Gemm" in node.op_type]
    assert len(products) == 4
    assert all(node.input[1] in constants for node in products)


def test_codes_of_a_narrow_weight_are_packed_and_widened_when_the_file_is_loaded() -> None:
    file = exported(NO_NORM, 4, 8)
    codes = initializers(file.data, "0.weight.codes")["0.weight.codes"]
    assert codes.data_type == onnx.TensorProto.INT4
    assert kinds(file.data)["Mul"] == len(named_layers(file.prepared.model))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(), reason="asks Linux what the processor has"
)
@pytest.mark.parametrize(("w", "can_overflow"), [(8, True), (4, False)])
def test_a_default_session_that_overflows_is_told(w: int, can_overflow: bool) -> None:
    """Large sums of products: inputs near their end, and weights near theirs."""
    layer = nn.Linear(64, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.9, 1, 256).reshape(4, 64))
    x = 1 - 0.1 * torch.rand(50, 64)
    model = gl.convert(nn.Sequential(layer).eval())
    gl.calibrate(model, [x])
    found = compare(export_onnx(model, x, w=w, a=8), x)
    assert not found.faults()
    assert found.overflows == (can_overflow and "vnni" not in CPUINFO.read_text())
    assert ("set session.x64quantprecision to 1" in str(found)) == found.overflows
    assert not compare(export_onnx(model, x, w=w, a=8), x, fused=False).overflows


@pytest.mark.parametrize("runtime", ["onnxruntime", "none"])
@pytest.mark.parametrize(
    ("kind", "raised"),
    [({}, {"0": 4}), ({"transposed": True}, {"1": 4}), ({"transposed": True, "groups": 2}, {})],
)
def test_a_dead_channel_keeps_its_bias_in_a_plain_session(
    kind: dict[str, Any], raised: dict[str, int], runtime: str
) -> None:
    x = inputs(60, 3, 8, 8)
    model = calibrated(with_dead_channels(1.0, **kind), x, per_channel=True)
    with torch.no_grad():
        before = model(x)
    file = export_onnx(model, x, w=8, a=8, runtime=runtime)
    assert file.prepared.raised == raised  # two groups share scales, and the dead channels are of one
    assert any("4 weight scale(s) raised" in remark for remark in file.remarks) == bool(raised)
    assert not compare(file, x).faults()
    (y,) = types.session(file.data).run(None, {"input": x.numpy()})
    assert float((torch.from_numpy(y).argmax(1) == before.argmax(1)).float().mean()) > 0.95


def test_widths_that_are_set_or_named_are_exported() -> None:
    model, x = network(NO_NORM)
    w, a = {"0": 8, "2": 4, "5": 3, "7": None}, {"0.input": 8, "2.input": 6, "5.input": 4, "7.input": None}
    mixed = exported(NO_NORM, w, a)
    gl.set_bits(model, w=w, a=a)
    try:
        applied = exported(NO_NORM, None, None)
    finally:
        gl.set_bits(model, w=None, a=None)
    assert (applied.prepared.w, applied.prepared.a) == (w, a) == (mixed.prepared.w, mixed.prepared.a)
    assert applied.data == mixed.data
    assert applied.prepared.widths() == "wmixed amixed"
    assert not compare(applied, x).faults()


OTHERS: dict[str, tuple[type[nn.Module], Any, list[str], int]] = {
    "attention": (
        Attention,
        {"ids": torch.arange(42).reshape(6, 7) % 20, "weights": inputs(6, 7)},
        ["ids", "weights"],
        2,
    ),
    "attention of 3 and 5 dimensions": (AttentionOfOtherSizes, inputs(6, 6, 4), ["input"], 1),
    "two in, two out": (
        TwoInTwoOut,
        (inputs(6, 3, 8, 8), {"images": inputs(6, 2, 8, 8), "scale": inputs(6, 4, 1, 1)}),
        ["x", "y_images", "y_scale"],
        2,
    ),
    "a dictionary": (OfDict, ({"a": inputs(6, 4), "b": inputs(6, 4)},), ["batch_a", "batch_b"], 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_outputs_and_operations_of_all_kinds(name: str) -> None:
    cls, x, names, outputs = OTHERS[name]
    torch.manual_seed(0)
    model = calibrated(cls(), x, per_channel=True)
    file = export_onnx(model, x, w=8, a=8)
    assert (file.inputs, len(file.outputs)) == (names, outputs)
    assert not compare(file, x).faults()
    left = [n for n in named_layers(model) if n == "by_function"]
    assert file.remarks == [f"in float, because they are not called as layers: {n}" for n in left]
    assert kinds(file.data)["DequantizeLinear"] >= len(named_layers(model)) - len(left)


def test_pools_of_all_kinds() -> None:
    torch.manual_seed(0)
    x, average = inputs(6, 3, 6, 6), functools.partial(nn.AvgPool2d, 3, 2)
    pools = average(), average(padding=1), average(ceil_mode=True), average(ceil_mode=True, padding=1)
    others = average(ceil_mode=True, count_include_pad=False), nn.MaxPool2d(3, 2, ceil_mode=True)
    file = export_onnx(calibrated(Pools(*pools, *others), x), x, w=8, a=8)
    assert not compare(file, x).faults()
    assert integer_layers(file.data)[0] == 4  # the others have no quantizer behind them
    model = calibrated(Pools(average(divisor_override=5)), x)
    with pytest.raises(NotExportableError, match=r"divisor_override of avg_pool2d \(in pools.0\)"):
        export_onnx(model, x, w=8, a=8)


def test_the_batch_is_dynamic_and_so_are_height_and_width_on_request() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    x = inputs(1, 3, 8, 8)
    file = export_onnx(calibrated(plain, x), x, w=8, a=8, dynamic_size=True)
    for shape in ((1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 12, 9)):
        found = compare(file, inputs(*shape))
        assert not found.faults()
        assert found.inputs == shape[0]


def test_a_batch_that_a_model_fixes_is_fixed_with_a_remark() -> None:
    x = inputs(3, 4)
    file = export_onnx(calibrated(FixedBatch(), x), x, w=8, a=8)
    assert file.remarks[0].startswith("the batch is fixed at 3: ")
    assert not compare(file, x).faults()


def test_pytorchs_refusals_are_reported_with_module_and_reason() -> None:
    x = inputs(4, 4)
    with pytest.raises(NotExportableError, match=r"cannot export part \(_Branch\): .*data-dependent"):
        export_onnx(calibrated(Branching(), x), x, w=8, a=8)
    with pytest.raises(NotExportableError, match=r"bessel_j0\S* \(in part\); .*airy_ai\S* \(in the model\)"):
        export_onnx(calibrated(Special(), x), x, w=8, a=8)
    with pytest.raises(NotExportableError, match="does not accept these inputs"):
        export_onnx(network(NO_NORM)[0], (x, x, x), w=8, a=8)


def test_the_model_is_not_changed() -> None:
    model, x = network(RESIDUAL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with gl.bits(model, w=6, a=7), torch.no_grad():
        y = model(x)
        exported(RESIDUAL, 3, 3)
        assert torch.equal(model(x), y)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class OfSize(nn.Module):
    """A branch on a size, which torch.fx cannot trace, and a batch norm that can be folded all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.size(-1) > 3 else x


def test_a_batch_norm_that_cannot_be_folded_is_a_separate_node() -> None:
    torch.manual_seed(0)
    x = inputs(20, 3, 8, 8)
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.bias, -1, 1)
    plain = nn.Sequential(OfSize(), nn.ReLU(), norm, nn.Conv2d(4, 2, 3), nn.Flatten())
    file = export_onnx(calibrated(plain, x), x, w=8, a=8)
    assert kinds(file.data)["BatchNormalization"] == 1
    assert [remark for remark in file.remarks if "not folded" in remark]
    assert list(file.prepared.folding.folded) == ["0.norm"]
    assert not compare(file, x).faults()


def test_models_that_cannot_be_exported() -> None:
    plain, x = NO_NORM.make(torch.float32), inputs(2, 3, 8, 8)
    with pytest.raises(NotExportableError, match="in training mode"):
        export_onnx(gl.convert(plain.train()), x, w=8, a=8)
    with pytest.raises(NotExportableError, match="not converted"):
        export_onnx(nn.Linear(2, 2).eval(), x, w=8, a=8)
    with pytest.raises(NotExportableError, match=r"0\.weight is torch.float64"):
        export_onnx(gl.convert(NO_NORM.make(torch.float64).eval()), x, w=8, a=8)
    with pytest.raises(RuntimeError, match="no activation range"):
        export_onnx(gl.convert(plain.eval()), x, w=8, a=8)
    with pytest.raises(ValueError, match="runtime must be one of"):
        export_onnx(gl.convert(plain.eval()), x, w=8, a=8, runtime="tensorrt")
    with pytest.raises(TypeError, match="inputs must be a tensor"):
        export_onnx(gl.convert(plain.eval()), 3, w=8, a=8)


@pytest.mark.parametrize("bits", [0, 9, 15, 17])
def test_widths_that_are_not_exported(bits: int) -> None:
    for widths in ((8, bits), (bits, 8)):
        with pytest.raises(ValueError, match="1 to"):
            exported(NO_NORM, *widths)


def test_every_site_is_in_the_file() -> None:
    file = exported(RESIDUAL, 4, 8, joints=False)
    assert sorted(file.quantized) == sorted(named_quantizers(file.prepared.model))
    assert kinds(file.data)["QuantizeLinear"] == len(file.quantized)
    assert not kinds(file.data)["BatchNormalization"]
