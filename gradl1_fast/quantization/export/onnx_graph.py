"""An ONNX graph while it is written: nodes, constants, and the pair that quantizes a tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.quantization.export.integers import IntegerType, to_bytes
from gradl1_fast.quantization.export.packages import onnx

__all__ = ["OnnxGraph"]


class OnnxGraph:
    """Collects nodes and constants; names of tensors are made unique.

    Attributes:
        nodes: in order of computation.
        opset: the lowest that has all that was added.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.opset = 18  # the first with ReduceMean's axes as an input
        self._constants: list[Any] = []
        self._names = Counter[str]()

    def name(self, wanted: str) -> str:
        """Return a name that no other tensor has."""
        self._names[wanted] += 1
        count = self._names[wanted]
        return wanted if count == 1 else self.name(f"{wanted}.{count}")

    def node(self, operation: str, inputs: list[str], wanted: str, **attributes: Any) -> str:
        """Add an operation with one output; return the output's name."""
        output = self.name(wanted)
        made = onnx().helper.make_node(operation, inputs, [output], name=output, **attributes)
        self.nodes.append(made)
        return output

    def constant(self, wanted: str, value: Tensor) -> str:
        """Add a constant of float32 or int64; return its name."""
        proto = onnx().TensorProto
        code = proto.INT64 if value.dtype == torch.int64 else proto.FLOAT
        return self._constant(wanted, code, value, value.contiguous().numpy().tobytes())

    def integers(self, wanted: str, codes: Tensor, type_: IntegerType) -> str:
        """Add a constant of an integer type; return its name."""
        self.opset = max(self.opset, type_.opset)
        return self._constant(wanted, type_.code, codes, to_bytes(codes.contiguous(), type_.bits))

    def dequantized(self, wanted: str, codes: str, scale: str, zero: str | None, axis: int | None) -> str:
        """Add the operation that makes values of codes; return its output."""
        inputs = [codes, scale] if zero is None else [codes, scale, zero]
        return self.node("DequantizeLinear", inputs, wanted, **({} if axis is None else {"axis": axis}))

    def quantized(
        self, x: str, wanted: str, scale: Tensor, zero_point: Tensor, q_max: int, type_: IntegerType
    ) -> str:
        """Add what rounds a tensor to codes from 0 to ``q_max`` and back; return the output."""
        step = self.constant(f"{wanted}.scale", scale)
        zero = self.integers(f"{wanted}.zero_point", zero_point, type_)
        codes = self.node("QuantizeLinear", [x, step, zero], f"{wanted}.codes")
        if q_max < 2**type_.bits - 1:  # the type saturates further out than the width
            ends = [self.integers(f"{wanted}.{end}", torch.tensor(value), type_)
                    for end, value in (("q_min", 0), ("q_max", q_max))]  # fmt: skip
            codes = self.node("Clip", [codes, *ends], f"{wanted}.clipped")
        return self.dequantized(f"{wanted}.values", codes, step, zero, None)

    def model(self, x: tuple[str, torch.Size], y: tuple[str, torch.Size], about: dict[str, str]) -> Any:
        """Return the checked model with one input and one output; their first dimension is free."""
        helper = onnx().helper
        ends = [
            helper.make_tensor_value_info(name, onnx().TensorProto.FLOAT, ["N", *shape[1:]])
            for name, shape in (x, y)
        ]
        graph = helper.make_graph(self.nodes, "gradl1_fast", ends[:1], ends[1:], self._constants)
        opsets = [helper.make_opsetid("", self.opset)]
        # The helper's default is the newest format of a file, which older runtimes refuse.
        ir_version = helper.find_min_ir_version_for(opsets)
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=ir_version, producer_name="gradl1_fast"
        )
        helper.set_model_props(model, about)
        onnx().checker.check_model(model, full_check=True)
        return model

    def _constant(self, wanted: str, code: int, value: Tensor, data: bytes) -> str:
        name = self.name(wanted)
        made = onnx().helper.make_tensor(name, code, list(value.shape), data, raw=True)
        self._constants.append(made)
        return name
