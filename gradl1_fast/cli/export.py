"""``gradl1 export``: a run as a file for other programs, compared with the simulation first."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from gradl1_fast._plots import width_name
from gradl1_fast.cli._console import fail, pairs, table
from gradl1_fast.cli.app import app
from gradl1_fast.quantization import save_any_bit
from gradl1_fast.quantization.export import FORMATS, Agreement, Exported, Prepared, agreement
from gradl1_fast.quantization.export.agreement import feed_of
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.speed import integer_layers, latencies
from gradl1_fast.training import runs
from gradl1_fast.training.loop import accuracy

__all__ = ["export"]

_EPILOG = """[bold]Examples[/bold]

gradl1 export runs/digits --w 8 --a 8

gradl1 export runs/digits --w 4 --a 8 --format torch-export --out digits.pt2

gradl1 export runs/digits --format any-bit
"""
_ANY_BIT = "any-bit"


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
        str,
        typer.Option(
            metavar="|".join((*FORMATS, _ANY_BIT)),
            help="onnx: integers between QuantizeLinear and DequantizeLinear. torch-export: a .pt2 "
            "program with integer weights. any-bit: one file for every width.",
        ),
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="File to write. By default in RUN.", show_default=False)
    ] = None,
    inputs: Annotated[int, typer.Option(min=1, help="How many test images are compared.")] = 500,
) -> None:
    """Write a trained network as a file with integer weights, and check what the file computes.

    Batch norms are folded into the convolutions. The written network runs on
    test images, ONNX in a plain session of onnxruntime, and must agree with
    the simulation of this library: codes of activations at most 1 apart,
    outputs within 0.1 % of the largest, the same decision for 99 % of the
    images. Otherwise nothing is written and the command fails.
    """  # fmt: skip
    if format not in (*FORMATS, _ANY_BIT):
        fail(f"there is no format {format!r}; there are {', '.join((*FORMATS, _ANY_BIT))}")
    try:
        loaded = runs.load(run)
        ending = ".safetensors" if format == _ANY_BIT else FORMATS[format].ending
        path = out or run / f"model{_widths(format, w, a)}{ending}"
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such folder to write to", str(path.parent))
        if format == _ANY_BIT:
            if (w, a) != (None, None):
                raise ValueError(
                    "an any-bit file holds every width: leave out --w and --a, and choose when it is read"
                )
            _any_bit(loaded, path)
        else:
            _write(loaded, path, format, loaded.data.test[0][:inputs], w, a)
    except ImportError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or run}: {error.strerror or error}")
    except (ValueError, TypeError, RuntimeError) as error:
        fail(str(error))
    Console().print(f"\nFile: [bold]{path}[/bold]", soft_wrap=True, highlight=False)


def _widths(format: str, w: int | None, a: int | None) -> str:
    return f"-{_ANY_BIT}" if format == _ANY_BIT else f"-w{width_name(w)}-a{width_name(a)}"


def _write(loaded: runs.Loaded, path: Path, name: str, images: Tensor, w: int | None, a: int | None) -> None:
    format = FORMATS[name]
    file = format.write(loaded.model, images, w=w, a=a)
    found = format.compare(file, images)
    _print_network(loaded, file.prepared, len(images))
    if isinstance(file, Exported):
        _print_speed(file, images)
    _print_agreement(found, len(file.data))
    for remark in file.remarks:
        Console().print(f"- {remark}", highlight=False, markup=False)
    if found.faults():
        raise ValueError(f"nothing is written: {'; '.join(found.faults())}")
    file.save(path)


def _any_bit(loaded: runs.Loaded, path: Path) -> None:
    sizes = save_any_bit(loaded.model, path)
    whole = _float_bytes(loaded)
    rows = [(str(w), f"{size:,}", f"{whole / size:.1f}") for w, size in reversed(sizes.items())]
    header = ("bits", "bytes to read", "times smaller than float")
    Console().print(table(f"Any-bit file; in float the network is {whole:,} bytes", header, rows))


def _float_bytes(loaded: runs.Loaded) -> int:
    return sum(value.numel() * value.element_size() for value in loaded.model.state_dict().values())


def _print_network(loaded: runs.Loaded, prepared: Prepared, count: int) -> None:
    batch = loaded.data.test[0][:count], loaded.data.test[1][:count]
    folding = prepared.folding
    rows = {
        "widths": prepared.widths(),
        "batch norms folded": f"{len(folding.folded)} of {len(folding.folded) + len(folding.refused)}",
        "accuracy in float": f"{accuracy(loaded.model, batch):.2f} %",
        "accuracy as exported": f"{accuracy(prepared.model, batch):.2f} % (simulation)",
    }
    Console().print(pairs("Network", rows))


def _print_speed(file: Exported, images: Tensor) -> None:
    threads = torch.get_num_threads()
    files = {"float": file.in_float(), "exported": file.data}
    feed: dict[str, Any] = feed_of(file, Arguments.of(images[:1]))
    times = latencies(files, feed, threads=threads)
    rows = []
    for name, data in files.items():
        integer, count = integer_layers(data)
        rows.append((name, f"{len(data):,}", f"{1e3 * times[name]:.2f}", f"{integer} of {count}"))
    header = ("", "bytes", "ms for one image", "layers in integers")
    Console().print(table(f"onnxruntime on the CPU, {threads} thread(s), median of 20 runs", header, rows))


def _print_agreement(found: Agreement, size: int) -> None:
    rows = [("file size", "", f"{size:,} bytes")]
    if found.where:  # there are codes
        rows += [
            ("largest code difference", str(agreement.CODES), str(found.codes)),
            ("codes that differ", "", f"{100 * found.differing:.4f} %"),
        ]
    rows += [
        ("largest error, of the largest output", f"{agreement.OUTPUTS:g}", f"{found.outputs:.1e}"),
        ("the same end to end", "", f"{found.end_to_end:.1e}"),
        ("top-1 agreement", f"{100 * agreement.TOP_1:g} %", f"{100 * found.top_1:.2f} %"),
    ]
    Console().print(
        table(f"File against simulation, {found.inputs} test images", ("", "bound", "file"), rows)
    )
