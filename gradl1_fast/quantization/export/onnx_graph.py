"""Translates a traced model to ONNX with numbered quantizers, to be filled in for given widths."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradl1_fast.quantization.export.marks import MARK, Grid
from gradl1_fast.quantization.export.packages import onnx_ir, onnxscript
from gradl1_fast.quantization.export.prepared import NotExportableError
from gradl1_fast.quantization.export.program import Program

__all__ = ["OPSET", "numbered_pairs", "to_onnx", "without_clip"]

OPSET = 21  # the first with int4, int16, uint4 and uint16


def to_onnx(program: Program) -> Any:
    """Return the ``onnx_ir`` model of a program, with a pair of Q and DQ per mark whose scale is its number.

    Raises:
        ImportError: onnxscript is not installed.
        NotExportableError: PyTorch's exporter does not support some operators, or translates them wrongly;
            the message names all of them, with the modules that use them.
    """
    if wrong := _mistranslated(program.exported):
        raise NotExportableError(f"torch.onnx.export drops divisor_override of {'; '.join(wrong)}")
    try:
        with _quiet(), torch.no_grad():
            exported = copy.deepcopy(program.exported)  # the exporter changes its argument
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table={MARK: _translation()},
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many classes
        missing = _untranslated(program.exported)
        reason = f"it does not support {'; '.join(missing)}" if missing else _reason(error)
        raise NotExportableError(f"torch.onnx.export cannot export the model: {reason}") from error
    if result is None:
        raise NotExportableError("torch.onnx.export returned nothing")
    return result.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide deprecations between packages, and that the operators of torchvision are missing."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


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


def without_clip(value: Any, grid: Grid) -> Any:
    """Return the input of a ReLU or clip that is redundant, because codes below 8 bits imply its bounds.

    It would prevent runtimes from fusing the preceding layer with the quantizer. At 8 bits, runtimes remove
    it themselves.
    """
    node = value.producer()
    if node is None or node.op_type not in ("Relu", "Clip") or grid.bits >= 8:
        return value
    if any(usage.node.op_type != "QuantizeLinear" for usage in value.uses()):
        return value
    bounds = [0.0, None] if node.op_type == "Relu" else [_number(bound) for bound in node.inputs[1:3]]
    low, high = (*bounds, None, None)[:2]
    ends = [float((code - grid.zero_point) * grid.scale) for code in (grid.q_min + 0.4, grid.q_max - 0.4)]
    if not ((low is None or low <= ends[0]) and (high is None or high >= ends[1])):
        return value
    return node.inputs[0]


def _number(value: Any) -> float | None:
    """Return a constant bound, or 0 for a bound that is not constant."""
    if value is None:
        return None
    constant = onnx_ir().convenience.get_const_tensor(value)
    return float("nan") if constant is None else float(constant.numpy())


def _mistranslated(exported: torch.export.ExportedProgram) -> list[str]:
    """Return the average pools with a custom divisor, which PyTorch's exporter drops."""
    pools = (torch.ops.aten.avg_pool2d.default, torch.ops.aten.avg_pool3d.default)
    nodes = [node for node in exported.graph.nodes if node.target in pools]
    return [f"{node.name} (in {_module_of(node)})" for node in nodes if node.args[6:] not in ((), (None,))]


def _module_of(node: torch.fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return (stack[-1][0] if stack else "") or "the model"


def _untranslated(exported: torch.export.ExportedProgram) -> list[str]:
    """Return the unsupported operators, each with the first module that uses it.

    PyTorch's message names only the first one. If PyTorch's internals have changed, nothing is found and that
    message is shown.
    """
    try:
        from torch.onnx._internal.exporter import _fx_passes, _registration

        with _quiet():
            registry = _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
        nodes = _fx_passes.decompose_with_registry(copy.deepcopy(exported), registry).graph.nodes
        modules: dict[str, str] = {}
        for node in nodes:
            is_operator = isinstance(node.target, torch._ops.OpOverload) and node.target is not MARK
            # Nothing uses an assertion, and the exporter drops it.
            if is_operator and node.users and not registry.is_registered(node.target):
                modules.setdefault(str(node.target), _module_of(node))
    except (ImportError, AttributeError, TypeError):
        return []
    return [f"{name} (in {module})" for name, module in modules.items()]


def _reason(error: Exception) -> str:
    """Return the reason from PyTorch's report, whose first lines are general advice."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(inner).__name__:.400}"
