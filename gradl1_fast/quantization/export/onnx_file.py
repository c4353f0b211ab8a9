"""A converted model as an ONNX file with integer weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradl1_fast import _files
from gradl1_fast._version import __version__
from gradl1_fast.quantization.bits import Widths
from gradl1_fast.quantization.export.agreement import Agreement, compare, feed_of
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.filling import Filling
from gradl1_fast.quantization.export.formats import Details, Format, register
from gradl1_fast.quantization.export.integers import session
from gradl1_fast.quantization.export.marks import Grid
from gradl1_fast.quantization.export.onnx_graph import to_onnx
from gradl1_fast.quantization.export.packages import onnx, onnx_ir, onnxscript
from gradl1_fast.quantization.export.prepared import NotExportableError, Prepared, simulate
from gradl1_fast.quantization.export.program import Program, trace
from gradl1_fast.quantization.export.speed import integer_layers, latencies

__all__ = ["Exported", "export_onnx", "write_onnx"]

_RUNTIMES = ("onnxruntime", "none")


@dataclass(frozen=True)
class Exported:
    """A model as an ONNX file.

    Attributes:
        data: the content of the file.
        prepared: the model at its widths.
        program: the traced model, which simulates the file.
        grids: the grid of each mark.
        template: the ``onnx_ir`` model before quantizers were filled in.
        inputs: the names of the inputs in the file, in the order of the model's tensors.
        outputs: the names of the outputs.
        quantized: the name in the file of the codes of each quantized activation, a site or an operand of an
            operation between layers.
        remarks: one sentence for each deviation from the request.
        opset: the opset version.
    """

    data: bytes = field(repr=False)
    prepared: Prepared = field(repr=False)
    program: Program = field(repr=False)
    grids: list[Grid | None] = field(repr=False)
    template: Any = field(repr=False)
    inputs: list[str]
    outputs: list[str]
    quantized: dict[str, str]
    remarks: list[str]
    opset: int

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically."""
        _files.write_bytes(path, self.data)
        return Path(path)

    def in_float(self) -> bytes:
        """Return a file of the same network without quantizers, to compare sizes and times."""
        nothing: list[Grid | None] = [None] * len(self.grids)
        return _bytes(
            Filling(self.template, self.program.marks, nothing, self.prepared.model), self.prepared
        )[0]


def export_onnx(
    model: Any,
    inputs: Any,
    *,
    w: Widths = None,
    a: Widths = None,
    runtime: str = "onnxruntime",
    input_bits: int | None = 8,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
) -> Exported:
    """Export a converted model to ONNX with folded batch norms and quantized weights and activations.

    The operations are written by PyTorch's exporter, so every model that ``torch.export`` supports can be
    exported. A weight is an integer constant followed by a ``DequantizeLinear``; the input of a layer passes
    a ``QuantizeLinear`` and a ``DequantizeLinear``. Types are int8 and uint8; int4 and uint4 at 4 bits; int2
    and uint2 at 2 bits (opset 25) if the installed packages support them; int16 and uint16 at 16 bits. Other
    widths are stored as int8 and uint8 codes, clipped to the width.

    onnxruntime computes in 8-bit integers. For it, narrower activations are clipped uint8 codes, and weights
    of 4 and 2 bits are stored in their types and widened to int8 when the file is loaded.

    Args:
        model: a converted model in evaluation mode, in float32, calibrated if ``a`` is given. It is not
            changed.
        inputs: a batch: a tensor, a tuple of arguments or a mapping of keyword arguments.
        w: bits of the weights, 1 to 8 or 16, or None for float; or a mapping by layer. If ``w`` and ``a``
            are both None, the current widths of the model are used.
        a: bits of the activations, a number or a mapping by site.
        runtime: ``"onnxruntime"`` prepares layers of at most 8 bits for its integer kernels: operands of
            sums, concatenations and average pools are quantized to 8 bits in ranges measured on ``inputs``,
            and biases to 32 bits. ``"none"`` quantizes only weights and the inputs of layers.
        input_bits: minimum bits of the network's input if ``a`` is a single width; None keeps the input in
            float.
        dynamic_batch: make the batch size dynamic. If the model does not allow it, the size is fixed, with a
            remark.
        dynamic_size: make height and width dynamic.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        NotExportableError: PyTorch or onnxruntime refuses the model, or it is not converted, in training mode
            or not in float32; the message has the reason.
        RuntimeError: an activation has no range yet.
        TypeError: a width is not an int or None.
        ValueError: a width is out of range, or ``runtime`` is unknown.
    """
    for package in (onnx, onnxscript, onnx_ir):
        package()
    if runtime not in _RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(map(repr, _RUNTIMES))}, got {runtime!r}")
    prepared = simulate(model, inputs, w=w, a=a, input_bits=input_bits)
    joints = runtime == "onnxruntime"
    program = trace(prepared, inputs, batch=dynamic_batch, sizes=dynamic_size, joints=joints)
    program.find_ranges(Arguments.of(inputs), program.grids(prepared))
    return write_onnx(prepared, program, to_onnx(program), integers=joints)


def write_onnx(prepared: Prepared, program: Program, template: Any, *, integers: bool = True) -> Exported:
    """Fill in the quantizers of a traced model, at the widths of a prepared one.

    Args:
        prepared: the model at its widths.
        program: the traced model.
        template: the ``onnx_ir`` model of ``program``.
        integers: prepare narrow codes for integer kernels of 8 bits.

    Raises:
        NotExportableError: onnxruntime cannot load the result.
    """
    grids, reasons = program.grids(prepared), list[str]()
    for wide in _WIDER:
        filling = Filling(template, program.marks, grids, prepared.model, integers, wide)
        data, names = _bytes(filling, prepared)
        reason = _why_not_loaded(data)
        if reason is None:
            break
        reasons.append(reason)
    else:
        raise NotExportableError(f"onnxruntime cannot load the model: {reasons[-1]}")
    remarks = [*filling.remarks, *prepared.remarks(), *program.remarks]
    if reasons:
        remarks.insert(0, _widened(wide, reasons[-1]))
    return Exported(
        data, prepared, program, grids, template, *names, filling.quantized, remarks, filling.opset
    )


# Storage of 2- and 4-bit codes to try: narrow types, then 8 bits for the kinds that the runtime fails to
# fuse.
_WIDER = ((), ("a",), ("a", "w"))
_WORDS = {"a": "activations", "w": "weights"}


def _widened(wide: Sequence[str], reason: str) -> str:
    return (
        f"codes of {' and '.join(_WORDS[kind] for kind in wide)} are stored in 8 bits: with narrower types, "
        f"onnxruntime reports: {reason}"
    )


def _why_not_loaded(data: bytes) -> str | None:
    try:
        session(data, exact=False)
    except Exception as error:  # the runtime's errors have no common class
        return f"{str(error).strip().splitlines()[0]:.160}"
    return None


def _bytes(filling: Filling, prepared: Prepared) -> tuple[bytes, tuple[list[str], list[str]]]:
    """Name inputs and outputs, set the metadata, and return the content and the names."""
    model, graph = filling.model, filling.model.graph
    for values, name in ((graph.inputs, "input"), (graph.outputs, "output")):
        if len(values) == 1:
            values[0].name = name
    model.metadata_props.update({"gradl1_fast": __version__, "widths": prepared.widths()})
    model.producer_name, model.producer_version = "gradl1_fast", __version__
    names = [value.name for value in graph.inputs], [value.name for value in graph.outputs]
    return bytes(onnx_ir().to_proto(model).SerializeToString()), names


def _compare(file: Exported, inputs: Any, labels: Tensor | None = None) -> Agreement:
    return compare(file, inputs, labels=labels)


def _speed(file: Exported, inputs: Any) -> list[Details]:
    threads = torch.get_num_threads()
    files = {"float": file.in_float(), "exported": file.data}
    feed = feed_of(file, Arguments.of(inputs).rows(0, 1))
    times = latencies(files, feed, threads=threads)
    rows = []
    for name, data in files.items():
        integer, count = integer_layers(data)
        rows.append((name, f"{len(data):,}", f"{1e3 * times[name]:.2f}", f"{integer} of {count}"))
    header = ("", "bytes", "ms for one input", "layers in integers")
    return [Details(f"onnxruntime on the CPU, {threads} thread(s), median of 20 runs", header, rows)]


register(Format("onnx", ".onnx", "integers between Q and DQ", export_onnx, _compare, _speed))
