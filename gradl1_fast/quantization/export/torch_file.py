"""Exports a converted model as a ``torch.export`` program of plain operations with integer weights."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradl1_fast import _files
from gradl1_fast.nn.codes import along
from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization.bits import Widths
from gradl1_fast.quantization.export.agreement import Agreement, compare_torch
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.formats import Format, register
from gradl1_fast.quantization.export.marks import MARK, Grid
from gradl1_fast.quantization.export.prepared import Prepared, simulate
from gradl1_fast.quantization.export.program import Program, export_program, trace

__all__ = ["export_torch"]


def export_torch(
    prepared: Prepared, inputs: Any, *, dynamic_batch: bool = True, dynamic_size: bool = False
) -> bytes:
    """Return the content of a ``.pt2`` file that ``torch.export.load`` reads without this library.

    Weights are stored as codes, int8 up to 8 bits and int16 above, with their scales. Activations are rounded
    to their grids in float.

    Args:
        prepared: the result of :func:`gradl1_fast.quantization.export.simulate`.
        inputs: a batch.
        dynamic_batch: make the batch size dynamic; it is fixed if the model does not allow it.
        dynamic_size: make height and width dynamic.

    Raises:
        NotExportableError: ``torch.export`` refuses the model; the message has its reason.
    """
    program = trace(prepared, inputs, batch=dynamic_batch, sizes=dynamic_size, joints=False)
    return _content(program, prepared, inputs, dynamic_size)


def _content(program: Program, prepared: Prepared, inputs: Any, dynamic_size: bool) -> bytes:
    """Return the content of the file of a traced model."""
    arguments = Arguments.of(inputs)
    arguments = arguments.example() if program.batch_is_free else arguments
    module = _without_marks(program, prepared)
    file = io.BytesIO()
    torch.export.save(export_program(module, arguments, program.batch_is_free, dynamic_size), file)
    return file.getvalue()


def _without_marks(program: Program, prepared: Prepared) -> fx.GraphModule:
    """Return the traced model with marks replaced by plain operations."""
    module = program.exported.module(check_guards=False)
    layers, grids = named_layers(prepared.model), program.grids(prepared)
    for node in list(module.graph.nodes):
        if node.target is MARK:
            x, key = node.args
            mark, grid = program.marks[key], grids[key]
            if grid is None:
                node.replace_all_uses_with(x)
                continue
            weight = mark.kind == "weight"
            stand_in = _Codes(layers[mark.name], grid) if weight else _Rounding(grid)
            module.add_submodule(f"quantized_{key}", stand_in)
            with module.graph.inserting_before(node):
                new = module.graph.call_module(f"quantized_{key}", () if weight else (x,))
            node.replace_all_uses_with(new)
    module.graph.eliminate_dead_code()
    _drop_unused(module)
    module.recompile()
    return module


def _drop_unused(module: fx.GraphModule) -> None:
    """Remove parameters and buffers that the graph does not read, such as float weights replaced by codes."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]:
        if name not in read and not name.startswith("quantized_"):
            owner, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(owner), attribute)


class _Codes(nn.Module):
    """A weight as codes and scales."""

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: QuantizedLayer, grid: Grid) -> None:
        super().__init__()
        whole = layer.weight_quantizer.codes_of(used_weight(layer), grid.bits)
        self.register_buffer("codes", whole.to(torch.int8 if grid.bits <= 8 else torch.int16))
        self.register_buffer("scale", along(grid.scale, whole, grid.axis))

    def forward(self) -> Tensor:
        return self.codes * self.scale


class _Rounding(nn.Module):
    """The quantizer of an activation."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.q_min, self.q_max = grid.q_min, grid.q_max
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        codes = ((x / self.scale).round() + self.zero_point).clamp(self.q_min, self.q_max)
        return (codes - self.zero_point) * self.scale


@dataclass(frozen=True)
class TorchFile:
    """A model as a ``.pt2`` file.

    Attributes:
        data: the content of the file.
        prepared: the simulation that the file must agree with.
        remarks: one sentence for each deviation from the request.
    """

    data: bytes = field(repr=False)
    prepared: Prepared = field(repr=False)
    remarks: list[str]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically."""
        _files.write_bytes(path, self.data)
        return Path(path)


def _write(model: nn.Module, inputs: Any, *, w: Widths = None, a: Widths = None) -> TorchFile:
    prepared = simulate(model, inputs, w=w, a=a)
    program = trace(prepared, inputs, batch=True, sizes=False, joints=False)
    remarks = [*prepared.remarks(), *program.remarks]
    if any(width is not None and width < 8 for width in prepared.w.values()):
        remarks.append("codes of fewer than 8 bits take one byte each: PyTorch has no narrower integer type")
    return TorchFile(_content(program, prepared, inputs, False), prepared, remarks)


def _compare(file: TorchFile, inputs: Any, labels: Tensor | None = None) -> Agreement:
    return compare_torch(file.data, file.prepared, inputs, labels=labels)


register(Format("torch-export", ".pt2", "a program of torch.export with integer weights", _write, _compare))
