"""Turns the numbered placeholders of a traced model into quantizers of given widths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.export.integers import (
    IntegerType,
    codes,
    integer_type,
    integer_widths,
    shift_of,
    to_bytes,
)
from gradl1_fast.quantization.export.marks import Grid, Mark
from gradl1_fast.quantization.export.onnx_graph import OPSET, numbered_pairs, without_clip
from gradl1_fast.quantization.export.packages import onnx, onnx_ir

__all__ = ["Filling", "occurrence"]

_WITH_BIAS = {"Conv", "ConvTranspose", "Gemm"}


class Filling:
    """Writes the quantizers of one file.

    Args:
        template: the result of :func:`~gradl1_fast.quantization.export.onnx_graph.to_onnx`; it is not
            changed.
        marks: the marks that the numbers refer to.
        grids: the grid of each mark, None for float.
        model: the simulation, with the weights.
        integers: prepare narrow codes for integer kernels of 8 bits.
        wide: the kinds of tensors, ``"a"`` or ``"w"``, whose codes of 2 and 4 bits are stored in 8 bits.

    Attributes:
        model: the model in ``onnx_ir``.
        quantized: the name of the codes of each quantized activation, by the name of its mark; further calls
            of a layer have a number.
        remarks: one sentence for each deviation from the request.
        opset: the opset version.
    """

    def __init__(
        self,
        template: Any,
        marks: Sequence[Mark],
        grids: Sequence[Grid | None],
        model: nn.Module,
        integers: bool = True,
        wide: Sequence[str] = (),
    ) -> None:
        self.model = template.clone()
        self.quantized: dict[str, str] = {}
        self.remarks: list[str] = []
        self.opset = OPSET
        self._marks, self._grids, self._integer_kernels = marks, grids, integers
        self._wide = {*wide, "a"} if integers else set(wide)
        self._layers = named_layers(model)
        self._before_float = self._sites_before_float(model)
        self._constants: dict[str, Any] = {}
        self._counts = Counter[int]()
        self._results: dict[tuple[int, str], Any] = {}
        weights: list[tuple[str, Any, Grid]] = []
        for key, quantize, dequantizes in numbered_pairs(self.model):
            weights += self._write(key, quantize, dequantizes)
        for name, value, grid in weights:  # after the biases
            self._tidy(value, grid, self._is_rounded(name))
        self._finish()

    def _write(self, key: int, quantize: Any, dequantizes: list[Any]) -> Iterator[tuple[str, Any, Grid]]:
        """Write a quantizer; yield its name, value and grid if it belongs to a weight."""
        mark, grid = self._marks[key], self._grids[key]
        for dequantize in dequantizes:
            source = quantize.inputs[0]
            if grid is None:
                result = source
            elif mark.kind == "weight":
                result = self._weight(mark.name, grid, dequantize)
            elif mark.kind == "bias":
                result = self._bias(mark.name, grid, dequantize, source)
            else:
                position = id(source), mark.name
                if position not in self._results:
                    first = key if mark.same_as is None else mark.same_as
                    self._results[position] = self._activation(first, grid, dequantize, source)
                result = self._results[position]
            dequantize.outputs[0].replace_all_uses_with(result)
            if grid is not None and mark.kind == "weight":
                yield mark.name, result, grid

    def _weight(self, name: str, grid: Grid, at: Any) -> Any:
        type_ = self._type(grid.bits, signed=True)
        layer = self._layers[name]
        whole = layer.weight_quantizer.codes_of(used_weight(layer), grid.bits)
        if self._integer_kernels and not self._is_integer(name):
            value = self._integers(f"{name}.weight.codes", type_, whole)
            return self._folded(at, value, grid, f"{name}.weight")
        shift = shift_of(grid.bits) if self._is_integer(name) else 0
        if shift and type_.bits < 8:
            narrow = self._integers(f"{name}.weight.codes", type_, whole)
            type_ = integer_type(8, signed=True)[0]
            value = self._widened(narrow, shift, at, f"{name}.weight")
        else:
            value = self._integers(f"{name}.weight.codes", type_, whole * 2**shift)
        inputs = [
            value,
            self._floats(f"{name}.weight.scale", grid.scale / 2**shift),
            self._integers(f"{name}.weight.zero_point", type_, grid.zero_point),
        ]
        node = onnx_ir().node(
            "DequantizeLinear", inputs, {"axis": grid.axis or 0} if grid.scale.dim() else {}
        )
        return self._put(at, node, f"{name}.weight.value", at.outputs[0])

    def _folded(self, at: Any, value: Any, grid: Grid, name: str) -> Any:
        """Dequantize with operations that are folded at loading; a ``DequantizeLinear`` runs every time."""
        cast = onnx_ir().node("Cast", [value], {"to": onnx_ir().DataType.FLOAT})
        scale = grid.scale
        if scale.dim():
            scale = scale.reshape([-1 if i == grid.axis else 1 for i in range(len(value.shape))])
        node = onnx_ir().node(
            "Mul", [self._put(at, cast, f"{name}.float"), self._floats(f"{name}.scale", scale)]
        )
        return self._put(at, node, f"{name}.value", at.outputs[0])

    def _bias(self, name: str, grid: Grid, at: Any, source: Any) -> Any:
        if source.const_value is None:
            return source
        values = torch.from_numpy(source.const_value.numpy().copy())
        whole = codes(
            values.double(), grid.scale.double(), grid.zero_point.double(), (grid.q_min, grid.q_max)
        )
        data = whole.to(torch.int32).numpy().tobytes()
        inputs = [
            self._constant(f"{name}.codes", onnx_ir().DataType.INT32.value, values, data),
            self._floats(f"{name}.scale", grid.scale),
        ]
        node = onnx_ir().node("DequantizeLinear", inputs, {"axis": 0} if grid.scale.dim() else {})
        return self._put(at, node, f"{name}.value", at.outputs[0])

    def _is_integer(self, name: str) -> bool:
        return self._integer_kernels and integer_widths(self._layers[name]) is not None

    def _widened(self, narrow: Any, shift: int, at: Any, name: str) -> Any:
        """Return narrow codes shifted to 8 bits; runtimes compute this once, when they load the file."""
        types = onnx_ir().DataType
        data = (2**shift).to_bytes(4, "little")
        factor = self._constant(f"factor.{shift}", types.INT32.value, torch.tensor(2**shift), data)
        whole = onnx_ir().node("Cast", [narrow], {"to": types.INT32})
        shifted = onnx_ir().node("Mul", [self._put(at, whole, f"{name}.whole"), factor])
        wide = onnx_ir().node("Cast", [self._put(at, shifted, f"{name}.shifted")], {"to": types.INT8})
        return self._put(at, wide, f"{name}.wide")

    def _activation(self, key: int, grid: Grid, at: Any, source: Any) -> Any:
        mark, type_ = self._marks[key], self._type(grid.bits, signed=False)
        name, source = mark.name, without_clip(source, grid)
        scale = self._floats(f"{name}.scale", grid.scale)
        zero_point = self._integers(f"{name}.zero_point", type_, grid.zero_point)
        self._counts[key] += 1
        suffix = "" if self._counts[key] == 1 else f".{self._counts[key]}"
        node = onnx_ir().node("QuantizeLinear", [source, scale, zero_point])
        value = self._put(at, node, f"{name}.codes{suffix}")
        if type_.bits > grid.bits:
            ends = [self._integers(f"{name}.{end}", type_, torch.tensor(float(value_))) for end, value_ in
                    (("q_min", grid.q_min), ("q_max", grid.q_max))]  # fmt: skip
            value = self._put(at, onnx_ir().node("Clip", [value, *ends]), f"{name}.clipped{suffix}")
        self.quantized[occurrence(name, self._counts[key])] = value.name
        result = f"{name}{suffix}" if mark.kind == "site" else f"{name}.value{suffix}"
        if name in self._before_float:
            return self._spelled_out(at, value, grid, name, result)
        node = onnx_ir().node("DequantizeLinear", [value, scale, zero_point])
        return self._put(at, node, result, at.outputs[0])

    def _spelled_out(self, at: Any, value: Any, grid: Grid, name: str, result: str) -> Any:
        """Dequantize with other operations; ``DequantizeLinear`` makes onnxruntime round float weights."""
        offset = self._floats(f"{name}.offset", grid.zero_point)
        cast = onnx_ir().node("Cast", [value], {"to": onnx_ir().DataType.FLOAT})
        value = self._put(at, cast, f"{result}.float")
        value = self._put(at, onnx_ir().node("Sub", [value, offset]), f"{result}.centred")
        node = onnx_ir().node("Mul", [value, self._floats(f"{name}.scale", grid.scale)])
        return self._put(at, node, result, at.outputs[0])

    def _put(self, at: Any, node: Any, name: str, like: Any = None) -> Any:
        """Insert a node before another; return its output under a name."""
        at.graph.insert_before(at, node)
        output = node.outputs[0]
        output.name = node.name = name
        if like is not None:
            output.type, output.shape = like.type, like.shape
        return output

    def _type(self, bits: int, *, signed: bool) -> IntegerType:
        narrow = ("w" if signed else "a") not in self._wide
        type_, remark = integer_type(bits, signed=signed, narrow=narrow)
        if remark is not None and remark not in self.remarks:
            self.remarks.append(remark)
        self.opset = max(self.opset, type_.opset)
        return type_

    def _integers(self, name: str, type_: IntegerType, values: Tensor) -> Any:
        return self._constant(name, type_.code, values, to_bytes(values, type_.bits))

    def _floats(self, name: str, values: Tensor) -> Any:
        return self._constant(name, 1, values, values.detach().float().cpu().contiguous().numpy().tobytes())

    def _constant(self, name: str, type_: int, values: Tensor, data: bytes) -> Any:
        if name not in self._constants:
            proto = onnx().TensorProto(name=name, data_type=type_, dims=list(values.shape), raw_data=data)
            tensor = onnx_ir().tensor(proto)
            value = onnx_ir().val(name, const_value=tensor)
            self.model.graph.register_initializer(value)
            self._constants[name] = value
        return self._constants[name]

    def _sites_before_float(self, model: nn.Module) -> set[str]:
        """Return the names of sites that feed a layer whose weight is float at loading."""
        names = {id(quantizer): name for name, quantizer in named_quantizers(model).items()}
        return {
            names[id(layer.input_quantizer)]
            for name, layer in self._layers.items()
            if layer.input_quantizer is not None
            and (
                layer.weight_quantizer.bits is None or (self._integer_kernels and not self._is_integer(name))
            )
        }

    def _is_rounded(self, name: str) -> bool:
        """Return whether a runtime that computes a layer in integers would round its bias coarsely."""
        quantizer = self._layers[name].input_quantizer
        widths = {self._layers[name].weight_quantizer.bits, None if quantizer is None else quantizer.bits}
        return widths != {8} and not self._integer_kernels

    def _tidy(self, weight: Any, grid: Grid, keep_bias: bool) -> None:
        """Transpose the codes instead of the weight, and add in float biases that must not be rounded."""
        users = [usage.node for usage in weight.uses()]
        is_folded = weight.producer().op_type != "DequantizeLinear"
        if len(users) == 1 and users[0].op_type == "Transpose" and len(weight.shape) == 2 and not is_folded:
            self._transpose(weight, users[0], grid)
            users = [usage.node for usage in weight.uses()]
        for node in users if keep_bias else ():
            if node.op_type in _WITH_BIAS and len(node.inputs) > 2 and node.inputs[2] is not None:
                self._add_after(node, weight)

    def _transpose(self, weight: Any, transpose: Any, grid: Grid) -> None:
        dequantize = reader = weight.producer()
        while reader.inputs[0].const_value is None:  # skip the nodes that widen codes
            reader = reader.inputs[0].producer()
        old = reader.inputs[0]
        values = torch.from_numpy(old.const_value.numpy().astype("int32")).t().float()
        del self.model.graph.initializers[old.name]
        self._constants.pop(old.name)
        new = self._constant(
            old.name, old.const_value.dtype.value, values, to_bytes(values, old.const_value.dtype.bitwidth)
        )
        reader.replace_input_with(0, new)
        if grid.axis is not None:
            dequantize.attributes["axis"] = onnx_ir().AttrInt64("axis", 1 - grid.axis)
        transpose.outputs[0].replace_all_uses_with(weight)
        weight.shape = transpose.outputs[0].shape

    def _add_after(self, node: Any, weight: Any) -> None:
        bias = node.inputs[2]
        if bias.const_value is None:
            return
        values = torch.from_numpy(bias.const_value.numpy().copy())
        rank = 1 if node.op_type == "Gemm" else len(weight.shape) - 1
        shaped = self._floats(f"{bias.name}.added", values.reshape(-1, *[1] * (rank - 1)))
        node.resize_inputs(2)
        output = node.outputs[0]
        add = onnx_ir().node("Add", [output, shaped])
        node.graph.insert_after(node, add)
        for usage in list(output.uses()):
            if usage.node is not add:
                usage.node.replace_input_with(usage.idx, add.outputs[0])
        outputs = node.graph.outputs
        for i, value in enumerate(outputs):
            if value is output:
                outputs[i] = add.outputs[0]
        add.outputs[0].name, output.name = output.name, f"{output.name}.without_bias"
        add.outputs[0].type, add.outputs[0].shape = output.type, output.shape

    def _finish(self) -> None:
        common = onnx_ir().passes.common
        passes = common.RemoveUnusedNodesPass, common.NameFixPass, common.TopologicalSortPass
        for pass_ in (*passes, common.ClearMetadataAndDocStringPass):  # it contains stack traces
            pass_()(self.model)
        self.model.opset_imports[""] = self.opset
        opsets = [onnx().helper.make_opsetid("", self.opset)]
        self.model.ir_version = max(onnx().helper.find_min_ir_version_for(opsets), 8)


def occurrence(name: str, count: int) -> str:
    """Return a suffix that distinguishes the tensors of a layer with several calls."""
    return name if count == 1 else f"{name} ({count})"
