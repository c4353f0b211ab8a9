"""Export of a converted model at two pairs of widths, and what a plain onnxruntime session computes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.quantization.export import NotExportableError, compare, simulate
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.onnx_file import write_onnx
from gradl1_fast.quantization.export.onnx_graph import to_onnx
from gradl1_fast.quantization.export.program import export_program, trace

__all__ = ["exported"]

WIDTHS = ((8, 8), (4, 8))


def exported(original: nn.Module, model: nn.Module, batch: Any) -> str | None:
    """Export a model at each pair of widths and compare the file with the simulation.

    Args:
        original: what ``torch.export`` is asked to take if the converted network cannot be exported.
        model: the same network; it is converted here, in float32.
        batch: its inputs.

    Returns:
        None where ``torch.export`` does not take the original; else what is wrong, or nothing.
    """
    batch = _in_float32(batch)
    try:
        return _faults(model, batch)
    except NotExportableError:
        if _is_taken(copy.deepcopy(original).float().eval(), batch):
            raise
        return None


def _faults(model: nn.Module, batch: Any) -> str:
    """Return what is wrong with the files, or nothing."""
    converted = gl.convert(copy.deepcopy(model).float().eval())
    gl.calibrate(converted, [batch])
    program = template = None
    for w, a in WIDTHS:
        prepared = simulate(converted, batch, w=w, a=a)
        if program is None:
            program = trace(prepared, batch, batch=True, sizes=False, joints=True)
            program.find_ranges(Arguments.of(batch), program.grids(prepared))
            template = to_onnx(program)
        found = compare(write_onnx(prepared, program, template), batch)
        # End to end, decisions of random weights on two inputs hang on single edges between codes.
        faults = dataclasses.replace(found, top_1=1.0).faults()
        if faults:
            return f"at {w, a}: {'; '.join(faults)}"
    return ""


def _is_taken(original: nn.Module, batch: Any) -> bool:
    try:
        export_program(original, Arguments.of(batch), batch=False, sizes=False)
    except NotExportableError:
        return False
    return True


def _in_float32(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: _in_float32(value) for name, value in batch.items()}
    return batch.float() if isinstance(batch, Tensor) and batch.is_floating_point() else batch
