"""A converted model as an ONNX file with integer weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradl1_fast import _files
from gradl1_fast._version import __version__
from gradl1_fast.nn.converted import ConvertedModel
from gradl1_fast.quantization.export.integers import session
from gradl1_fast.quantization.export.operations import Writer
from gradl1_fast.quantization.export.prepared import NotExportableError, Prepared, ends, prepare

__all__ = ["Exported", "export_onnx"]


@dataclass(frozen=True)
class Exported:
    """A model in ONNX.

    Attributes:
        data: the content of the file.
        prepared: the simulation that it must agree with.
        quantized: name in the file of the output of each activation quantizer, by its name in the model.
        remarks: sentences on what could not be said as asked for.
        opset: the version of the operators.
    """

    data: bytes = field(repr=False)
    prepared: Prepared = field(repr=False)
    quantized: dict[str, str]
    remarks: list[str]
    opset: int

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, whole or not at all."""
        _files.write_bytes(path, self.data)
        return Path(path)


def export_onnx(model: nn.Module, inputs: Tensor, *, w: int | None, a: int | None) -> Exported:
    """Say a converted model in ONNX, batch norms folded, with weights and activations quantized.

    A weight is a constant of integers behind a ``DequantizeLinear``; an activation goes through
    ``QuantizeLinear`` and ``DequantizeLinear``. Types are int8 and uint8; int4 and uint4 at 4 bits
    (opset 21); int2 and uint2 at 2 bits (opset 25) where the installed packages run them; int16 and uint16
    at 16 bits. Other widths are codes of int8 and uint8, clipped to the width. The batch is of any size,
    other sizes are those of ``inputs``. A batch norm that cannot be folded is written as one.

    Args:
        model: a converted model in evaluation mode, in float32, calibrated if ``a`` is given. It stays as
            it is.
        inputs: a batch, ``(N, ...)``.
        w: bits of the weights, 1 to 8 or 16, or None for float.
        a: bits of the activations, likewise.

    Raises:
        ImportError: onnx or onnxruntime is not installed.
        NotExportableError: the model has an operation, a type or a mode that export does not know, by name.
        RuntimeError: an activation has no range yet.
        TypeError: a width is not an int or None.
        ValueError: a width is out of range.
    """
    prepared = prepare(model, inputs, w=w, a=a)
    shapes = _shapes(prepared.model, inputs)
    reasons: list[str] = []
    for wide in _WIDER:
        writer = Writer(prepared.model, w, a, shapes, wide=wide)
        data = _write(writer)
        reason = _why_not_loaded(data)
        if reason is None:
            break
        reasons.append(reason)
    else:
        raise NotExportableError(f"onnxruntime cannot load the model: {reasons[-1]}")
    if reasons:
        writer.remark(
            f"codes of {' and '.join(_WORDS[what] for what in wide)} take 8 bits: with narrower types, "
            f"onnxruntime says: {reasons[-1]}"
        )
    remarks = [*writer.remarks, *prepared.remarks()]
    return Exported(data, prepared, writer.quantized, remarks, writer.graph.opset)


# Types that hold codes of 2 and 4 bits: all of their own, then in 8 bits what the runtime's fusions fail at.
_WIDER = ((), ("a",), ("a", "w"))
_WORDS = {"a": "activations", "w": "weights"}


def _why_not_loaded(data: bytes) -> str | None:
    try:
        session(data)
    except Exception as error:  # the runtime's errors have no class in common
        return f"{str(error).strip().splitlines()[0]:.160}"
    return None


def _write(writer: Writer) -> bytes:
    begin, end = ends(writer.model)
    x = writer.graph.name("input")
    writer.values[begin] = x
    for node in writer.model.graph.nodes:
        if node.op not in ("placeholder", "output"):
            writer.write(node)
    y = writer.graph.node("Identity", [writer.values[end]], "output")
    about = {"gradl1_fast": __version__, "widths": f"w={writer.w} a={writer.a}"}
    proto = writer.graph.model((x, writer.shapes[begin]), (y, writer.shapes[end]), about)
    return bytes(proto.SerializeToString())


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of each tensor."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result


def _shapes(model: ConvertedModel, inputs: Tensor) -> dict[fx.Node, torch.Size]:
    interpreter = _Shapes(model)
    with torch.no_grad():
        interpreter.run(inputs[:2])
    return interpreter.shapes
