"""``gradl1 export``: a run as a file for other programs, compared with the simulation first."""

from __future__ import annotations

import errno
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import Tensor

from gradl1_fast import _files
from gradl1_fast._plots import width_name
from gradl1_fast.cli._console import fail, pairs, table
from gradl1_fast.cli.app import app
from gradl1_fast.quantization import save_any_bit
from gradl1_fast.quantization.export import (
    Agreement,
    Prepared,
    agreement,
    compare,
    compare_torch,
    export_onnx,
    export_torch,
    prepare,
)
from gradl1_fast.training import runs
from gradl1_fast.training.loop import accuracy

__all__ = ["export"]

_EPILOG = """[bold]Examples[/bold]

gradl1 export runs/digits --w 4 --a 8

gradl1 export runs/digits --w 8 --format torch-export --out digits.pt2

gradl1 export runs/digits --format any-bit
"""


class Format(str, Enum):
    """What is written."""

    onnx = "onnx"
    torch_export = "torch-export"
    any_bit = "any-bit"
    torchao = "torchao"


_NO_TORCHAO = (
    "torchao has integer weights for linear layers alone, with steps that it finds itself, and leaves "
    "convolutions in float: it cannot hold the codes of this network. Use --format onnx or torch-export."
)
_FUSED = (
    "onnxruntime's own fusions, on by default, change the result here: in integer arithmetic it rounds "
    "biases to coarse steps. With the session option session.disable_quant_qdq=1 it computes the file as "
    "written."
)
_ENDINGS = {Format.onnx: ".onnx", Format.torch_export: ".pt2", Format.any_bit: ".safetensors"}


@app.command(epilog=_EPILOG)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, of gradl1 train.")],
    w: Annotated[
        int | None,
        typer.Option(help="Bits of the weights: 1 to 8 or 16. Without it, float.", show_default=False),
    ] = None,
    a: Annotated[
        int | None,
        typer.Option(help="Bits of the activations: 1 to 8 or 16. Without it, float.", show_default=False),
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="onnx: integers between QuantizeLinear and DequantizeLinear. torch-export: a .pt2 "
            "program with integer weights. any-bit: one file for every width."
        ),
    ] = Format.onnx,
    out: Annotated[
        Path | None, typer.Option(help="File to write. By default in RUN.", show_default=False)
    ] = None,
    inputs: Annotated[int, typer.Option(min=1, help="How many test images are compared.")] = 500,
) -> None:
    """Write a trained network as a file with integer weights, and check what the file computes.

    Batch norms are folded into the convolutions. The written network runs on
    test images (ONNX in onnxruntime) and must agree with the simulation of
    this library: codes of activations at most 1 apart, outputs within 0.1 %
    of the largest, the same decision for 99 % of the images. Otherwise
    nothing is written and the command fails.

    Quantization is simulated in floating point here, slower than float; only
    a runtime with integer kernels gains speed from the file.
    """  # fmt: skip
    if format is Format.torchao:
        fail(_NO_TORCHAO)
    try:
        loaded = runs.load(run)
        path = out or run / f"model{_widths(format, w, a)}{_ENDINGS[format]}"
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder to write to", str(path.parent))
        if format is Format.any_bit:
            if (w, a) != (None, None):
                raise ValueError(
                    "an any-bit file holds every width: leave out --w and --a, and choose when it is read"
                )
            _any_bit(loaded, path)
        else:
            images = loaded.data.test[0][:inputs]
            write = _onnx if format is Format.onnx else _torch
            write(loaded, path, images, w, a)
    except ImportError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or run}: {error.strerror or error}")
    except (ValueError, TypeError, RuntimeError) as error:
        fail(str(error))
    Console().print(f"\nFile: [bold]{path}[/bold]", soft_wrap=True, highlight=False)


def _widths(format: Format, w: int | None, a: int | None) -> str:
    return "-any-bit" if format is Format.any_bit else f"-w{width_name(w)}-a{width_name(a)}"


def _onnx(loaded: runs.Loaded, path: Path, images: Tensor, w: int | None, a: int | None) -> None:
    exported = export_onnx(loaded.model, images, w=w, a=a)
    as_written, fused = (compare(exported, images, fused=fused) for fused in (False, True))
    _print_network(loaded, exported.prepared, len(images), len(exported.data), f"opset {exported.opset}")
    columns = {"as written": as_written, "by default": fused}
    _print_agreement(columns, f"onnxruntime against the simulation, {as_written.inputs} test images")
    for remark in exported.remarks:
        _say(remark)
    if fused.faults():
        _say(_FUSED)
    _refuse(as_written)
    exported.save(path)


def _torch(loaded: runs.Loaded, path: Path, images: Tensor, w: int | None, a: int | None) -> None:
    prepared = prepare(loaded.model, images, w=w, a=a)
    data = export_torch(prepared, images[:2])
    found = compare_torch(data, prepared, images)
    _print_network(loaded, prepared, len(images), len(data), "torch.export")
    _print_agreement(
        {"as written": found}, f"torch.export against the simulation, {found.inputs} test images"
    )
    for remark in prepared.remarks():
        _say(remark)
    if w is not None and w < 8:
        _say(f"the codes of {w} bits take a byte each: PyTorch has no narrower integers")
    _refuse(found)
    _files.write_bytes(path, data)


def _any_bit(loaded: runs.Loaded, path: Path) -> None:
    sizes = save_any_bit(loaded.model, path)
    whole = _float_bytes(loaded)
    rows = [(str(w), f"{size:,}", f"{whole / size:.1f}") for w, size in reversed(sizes.items())]
    header = ("bits", "bytes to read", "times smaller than float")
    Console().print(table(f"Any-bit file; in float the network is {whole:,} bytes", header, rows))


def _float_bytes(loaded: runs.Loaded) -> int:
    return sum(value.numel() * value.element_size() for value in loaded.model.state_dict().values())


def _print_network(loaded: runs.Loaded, prepared: Prepared, count: int, size: int, kind: str) -> None:
    batch = loaded.data.test[0][:count], loaded.data.test[1][:count]
    folding = prepared.folding
    rows = {
        "weights, activations": f"{width_name(prepared.w)}, {width_name(prepared.a)} bits",
        "file": f"{size:,} bytes, {kind}; the float weights are {_float_bytes(loaded):,} bytes",
        "batch norms folded": f"{len(folding.folded)} of {len(folding.folded) + len(folding.refused)}, "
        f"outputs then differ by {folding.difference:.2g} (largest {folding.scale:.3g})",
        "accuracy in float": f"{accuracy(loaded.model, batch):.2f} %",
        "accuracy as exported": f"{accuracy(prepared.model, batch):.2f} % (simulation)",
    }
    Console().print(pairs("Network", rows))


def _print_agreement(columns: dict[str, Agreement], title: str) -> None:
    found = list(columns.values())
    rows = []
    if any(one.where for one in found):  # there are codes
        rows = [
            ("largest code difference", str(agreement.CODES), *(str(one.codes) for one in found)),
            ("codes that differ", "", *(f"{100 * one.differing:.4f} %" for one in found)),
        ]
    rows += [
        ("outputs, of the largest", f"{agreement.OUTPUTS:g}", *(f"{one.outputs:.1e}" for one in found)),
        ("top-1 agreement", f"{100 * agreement.TOP_1:g} %", *(f"{100 * one.top_1:.2f} %" for one in found)),
    ]
    Console().print(table(title, ("", "bound", *columns), rows))


def _say(remark: str) -> None:
    Console().print(f"- {remark}", highlight=False, markup=False)


def _refuse(found: Agreement) -> None:
    if found.faults():
        raise ValueError(f"nothing is written: {'; '.join(found.faults())}")
