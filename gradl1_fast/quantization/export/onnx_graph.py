"""A traced model in ONNX with numbered quantizers, which are then filled in for given widths."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gradl1_fast.quantization.export.marks import MARK
from gradl1_fast.quantization.export.packages import onnx_ir, onnxscript
from gradl1_fast.quantization.export.prepared import NotExportableError
from gradl1_fast.quantization.export.program import Program

__all__ = ["OPSET", "numbered_pairs", "to_onnx"]

OPSET = 21  # the first with int4, int16 and their unsigned kinds


def to_onnx(program: Program) -> Any:
    """Return the ``onnx_ir`` model of a program: a pair of Q and DQ whose scale is a number for each mark.

    Raises:
        ImportError: onnxscript is not installed.
        NotExportableError: PyTorch's exporter has no translation of an operator, by name.
    """
    exported = copy.deepcopy(program.exported)  # the exporter rewrites what it is given
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of packages among themselves
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table={MARK: _translation()},
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many classes
        raise NotExportableError(f"torch.onnx.export refuses the model: {_reason(error)}") from error
    if result is None:
        raise NotExportableError("torch.onnx.export returned nothing")
    return result.model


def _translation() -> Callable[..., Any]:
    op = onnxscript().opset21
    uint8 = int(onnx_ir().DataType.UINT8)

    def pair(x: Any, key: int) -> Any:
        scale = op.Constant(value_float=float(key))
        zero_point = op.Cast(op.Constant(value_int=0), to=uint8)
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    return pair


def numbered_pairs(model: Any) -> Iterator[tuple[int, Any, Any]]:
    """Yield the number, the Q and the DQ of each pair; a Q may have several."""
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            key = int(onnx_ir().convenience.get_const_tensor(node.inputs[1]).numpy())
            yield key, node, [usage.node for usage in node.outputs[0].uses()]


def _reason(error: Exception) -> str:
    """Return the reason inside PyTorch's report, whose first lines say what to do in general."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(inner).__name__:.400}"
