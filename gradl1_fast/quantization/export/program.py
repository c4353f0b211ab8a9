"""Traces a model to a ``torch.export`` program with a mark at each site and weight, for any width."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gradl1_fast import functional as F
from gradl1_fast.nn.foreign import used_weight
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.attention import PlainAttention
from gradl1_fast.quantization.export.integers import shift_of
from gradl1_fast.quantization.export.joints import add_biases, add_joints
from gradl1_fast.quantization.export.marks import MARK, Grid, Mark, marked
from gradl1_fast.quantization.export.prepared import NotExportableError, Prepared

__all__ = ["Program", "export_program", "trace"]

At = Callable[[int, Tensor], Tensor]


@dataclass
class Program:
    """A traced model.

    Attributes:
        exported: the program, with marks.
        marks: the marks, by number.
        batch_is_free: whether the batch size is dynamic.
        remarks: one sentence for each deviation from the request.
    """

    exported: torch.export.ExportedProgram
    marks: list[Mark]
    batch_is_free: bool
    remarks: list[str] = field(default_factory=list)

    def run(self, arguments: Arguments, at: At) -> Any:
        """Run the program with each mark replaced by ``at(key, tensor)``."""
        return arguments.call(self.with_marks(at))

    def with_marks(self, at: At) -> fx.GraphModule:
        """Return the program as a module with each mark replaced by ``at(key, tensor)``."""
        module = self.exported.module(check_guards=False)

        def mark(x: Tensor, key: int) -> Tensor:
            return at(key, x)

        for node in module.graph.nodes:
            if node.target is MARK:
                node.target = mark
        module.recompile()
        return module

    def grids(self, prepared: Prepared) -> list[Grid | None]:
        """Return the grid of each mark at the widths of a model, None for float."""
        layers, sites = named_layers(prepared.model), named_quantizers(prepared.model)
        grids: list[Grid | None] = []
        used = self._used()
        for key, mark in enumerate(self.marks):  # a joint follows the marks it depends on
            if key not in used:  # an uncalled layer may have no range
                grids.append(None)
            elif mark.kind == "weight":
                grids.append(_weight_grid(layers[mark.name]))
            elif mark.kind == "site":
                grids.append(_site_grid(sites[mark.name]))
            else:
                needed = [grids[key] for key in mark.layers]
                if any(grid is None or grid.bits > 8 for grid in needed):
                    grids.append(None)
                elif mark.kind == "bias":
                    grids.append(_bias_grid(*needed))
                else:
                    grids.append(_joint_grid(mark) if mark.same_as is None else grids[mark.same_as])
        return grids

    def left_in_float(self) -> list[str]:
        """Return the names of layers that the model does not call, whose weights a function may use."""
        used = self._used()
        return [m.name for key, m in enumerate(self.marks) if m.kind == "weight" and key not in used]

    def _used(self) -> set[int]:
        """Return the numbers of the marks in the program."""
        nodes = self.exported.graph_module.graph.nodes
        return {node.args[1] for node in nodes if node.target is MARK}

    @property
    def keywords(self) -> list[str]:
        """The names of the keyword arguments, in the order of tracing."""
        return list(self.exported.example_inputs[1])

    @property
    def activations(self) -> dict[str, int]:
        """The numbers of the marks of activations, by name."""
        marks = enumerate(self.marks)
        return {m.name: key for key, m in marks if m.kind in ("site", "joint") and m.same_as is None}

    def has_joints(self) -> bool:
        """Whether operands of operations between layers are marked."""
        return any(mark.kind == "joint" for mark in self.marks)

    def find_ranges(self, arguments: Arguments, grids: list[Grid | None]) -> None:
        """Measure the ranges of joints in a pass with quantized layers."""
        if not self.has_joints():
            return

        def at(key: int, x: Tensor) -> Tensor:
            mark, grid = self.marks[key], grids[key]
            if mark.kind == "joint" and mark.same_as is None:
                ends = F.value_range(x)
                before = mark.range or ends
                mark.range = torch.minimum(ends[0], before[0]), torch.maximum(ends[1], before[1])
                return x
            return x if grid is None else grid.quantize(x)

        with torch.no_grad():
            module = self.with_marks(at)
            for part in arguments.split(32):
                part.call(module)


def trace(prepared: Prepared, inputs: Any, *, batch: bool, sizes: bool, joints: bool) -> Program:
    """Trace a prepared model.

    Args:
        prepared: the result of :func:`gradl1_fast.quantization.export.simulate`.
        inputs: a batch.
        batch: make the batch size dynamic; if that fails it is fixed, with a remark.
        sizes: make height and width dynamic.
        joints: also mark biases and operands of sums, concatenations and average pools.

    Raises:
        NotExportableError: ``torch.export`` refuses the model; the message has its reason.
    """
    model, marks = marked(prepared.model)
    arguments, remarks = Arguments.of(inputs), list[str]()
    try:
        exported = export_program(model, arguments.example() if batch else arguments, batch, sizes)
    except NotExportableError as error:
        if not batch or sizes:
            raise
        batch, exported = False, export_program(model, arguments, False, False)
        reason = str(error).partition(": ")[2].splitlines()[0]
        remarks.append(f"the batch is fixed at {arguments.size}: {reason:.200}")
    program = Program(exported, marks, batch, remarks)
    if uncalled := program.left_in_float():
        remarks.append(f"in float, because they are not called as layers: {', '.join(uncalled)}")
    if joints:
        add_joints(exported, marks)
        add_biases(exported, marks)
    return program


def export_program(
    model: torch.nn.Module, arguments: Arguments, batch: bool, sizes: bool
) -> torch.export.ExportedProgram:
    """Return the program of a model.

    Args:
        model: a module.
        arguments: a batch.
        batch: make the batch size dynamic.
        sizes: make height and width dynamic.

    Raises:
        NotExportableError: ``torch.export`` fails; the message names the module and the reason.
    """
    arguments = copy.deepcopy(arguments)  # some models change their arguments
    args_shapes, kwargs_shapes = arguments.dynamic(batch, sizes) or ((), {})
    shapes = _by_parameter(model, args_shapes, kwargs_shapes) if batch or sizes else None
    try:
        with torch.no_grad(), PlainAttention():
            return torch.export.export(
                model, arguments.args, arguments.kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # the exporter raises errors of many classes
        raise NotExportableError(
            f"torch.export cannot export {_place(error, model)}: {_reason(error)}"
        ) from error


def _by_parameter(model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    """Return the dynamic shapes by the name of each parameter of ``forward``."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise NotExportableError(f"the model does not accept these inputs: {error}") from error


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{text.splitlines()[0]:.400}"


def _place(error: Exception, model: torch.nn.Module) -> str:
    """Return the innermost module whose forward pass was running when the error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    place, trace_ = "", error.__traceback__
    while trace_ is not None:
        owner = trace_.tb_frame.f_locals.get("self")
        # _call_impl is PyTorch's caller of forward(), whose own first argument may have another name.
        if trace_.tb_frame.f_code.co_name in ("forward", "_call_impl") and names.get(id(owner)):
            place = f"{names[id(owner)]} ({type(owner).__name__})"
        trace_ = trace_.tb_next
    return place or "the model"


def _weight_grid(layer: Any) -> Grid | None:
    quantizer = layer.weight_quantizer
    if quantizer.bits is None:
        return None
    weight, bits = used_weight(layer), quantizer.bits
    chosen = quantizer.codes_of(weight, bits) if bits in quantizer.rounded else None
    scale, zero_point, q_min, q_max = quantizer.grid(weight, bits)
    return Grid(scale, zero_point, q_min, q_max, bits, quantizer.axis, chosen)


def _site_grid(quantizer: Any) -> Grid | None:
    if quantizer.bits is None:
        return None
    scale, zero_point, q_min, q_max = quantizer.grid(torch.float32, quantizer.bits)
    return Grid(scale, zero_point, q_min, q_max, quantizer.bits)


def _bias_grid(site: Any, weight: Any) -> Grid:
    """Return the grid of a bias that integer kernels add to products of codes."""
    scale = site.scale * weight.scale / 2 ** shift_of(weight.bits)
    zero = torch.zeros_like(scale)
    return Grid(scale, zero, -(2**31), 2**31 - 1, 32, None if weight.axis is None else 0)


def _joint_grid(mark: Mark) -> Grid | None:
    if mark.range is None:
        return None
    scale, zero_point, q_min, q_max = F.quantization_grid(*mark.range, 8, symmetric=False)
    return Grid(scale, zero_point, q_min, q_max, 8)
