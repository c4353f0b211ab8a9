"""``gradl1 export``: exports a run to a file, after comparing it with the simulation."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradl1_fast._report.figures import width_name
from gradl1_fast.cli._console import fail, pairs, table
from gradl1_fast.cli.app import app
from gradl1_fast.quantization.export import FORMATS, Agreement, Format
from gradl1_fast.quantization.export.formats import File
from gradl1_fast.training.data.batches import Batch
from gradl1_fast.training.loop.simple import accuracy
from gradl1_fast.training.runs import folder as runs

__all__ = ["export"]

_EPILOG = """[bold]Examples[/bold]

gradl1 export runs/digits --w 8 --a 8

gradl1 export runs/digits --w 4 --a 8 --format torch-export --out digits.pt2

gradl1 export runs/digits --format any-bit
"""
_ASKED = "which widths? Give --w and --a, such as --w 8 --a 8, or --w 4 for weights alone"


@app.command(epilog=_EPILOG)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished gradl1 train run.")],
    w: Annotated[
        int | None,
        typer.Option(help="Bits of the weights, 1 to 8 or 16. Default: float.", show_default=False),
    ] = None,
    a: Annotated[
        int | None,
        typer.Option(help="Bits of the activations, 1 to 8 or 16. Default: float.", show_default=False),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMATS),
            help="; ".join(f"{name}: {entry.summary}" for name, entry in FORMATS.items()) + ".",
        ),
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: a file in RUN.", show_default=False)
    ] = None,
    inputs: Annotated[int, typer.Option(min=1, help="Number of test images to compare.")] = 500,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="POINTS",
            help="Write nothing if accuracy drops more than this below float.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a trained network as a file with integer weights, and check what the file computes.

    The network's input keeps 8 bits when activations have fewer.

    Batch norms are folded into the convolutions. The exported network runs on
    test images (ONNX in a plain onnxruntime session) and must agree with the
    simulation of this library: activation codes differ by at most 1, outputs by
    at most 0.1 % of the largest, the decision is the same for 99 % of the
    images, and accuracy is at most 1 point lower. Otherwise the command fails
    and writes no file.
    """  # fmt: skip
    if format not in FORMATS:
        fail(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    try:
        loaded = runs.load(run)
        w, a = _widths(chosen, w, a)
        name = f"w{width_name(w)}-a{width_name(a)}" if chosen.has_widths else chosen.name
        path = out or run / f"model-{name}{chosen.ending}"
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder to write to does not exist", str(path.parent))
        images, labels = loaded.data.test
        _write(loaded, path, chosen, (images[:inputs], labels[:inputs]), w, a, max_drop)
    except ImportError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or run}: {error.strerror or error}")
    except (ValueError, TypeError, RuntimeError) as error:
        fail(str(error))
    Console().print(f"\nFile: [bold]{path}[/bold]", soft_wrap=True, highlight=False)


def _widths(format: Format, w: int | None, a: int | None) -> tuple[int | None, int | None]:
    """Return the given widths, or prompt for them on a terminal."""
    if not format.has_widths or (w, a) != (None, None):
        return w, a
    if not _is_answered():
        raise ValueError(_ASKED)
    widths = [typer.prompt(f"Bits of the {kind}", 8, type=int) for kind in ("weights", "activations")]
    return widths[0], widths[1]


def _is_answered() -> bool:
    return sys.stdin.isatty()


def _write(
    loaded: runs.Loaded,
    path: Path,
    format: Format,
    batch: Batch,
    w: int | None,
    a: int | None,
    max_drop: float | None,
) -> None:
    images, labels = batch
    file = format.write(loaded.model, images, w=w, a=a)
    result = format.compare(file, images, labels)
    before = accuracy(loaded.model, batch)
    _print_network(file, result, before)
    for details in format.details(file, images):
        Console().print(table(details.title, details.header, details.rows))
    _print_agreement(result, len(file.data))
    for remark in file.remarks:
        Console().print(f"- {remark}", highlight=False, markup=False)
    faults = result.faults()
    if max_drop is not None and result.accuracy is not None and result.accuracy < before - max_drop:
        drop = f"from {before:.2f} to {result.accuracy:.2f} %"
        faults.append(f"accuracy drops {drop}; at most {max_drop:g} points are allowed")
    if faults:
        raise ValueError(f"no file was written: {'; '.join(faults)}")
    file.save(path)


def _print_network(file: File, result: Agreement, before: float) -> None:
    folding = file.prepared.folding
    rows = {"widths": file.prepared.widths()}
    if norms := len(folding.folded) + len(folding.refused):
        rows["batch norms folded"] = f"{len(folding.folded)} of {norms}"
    rows["accuracy in float"] = f"{before:.2f} %"
    rows["accuracy of the file"] = f"{result.accuracy:.2f} %, in the simulation {result.expected:.2f} %"
    Console().print(pairs("Network", rows))


def _print_agreement(result: Agreement, size: int) -> None:
    rows = [("file size", "", f"{size:,} bytes"), *result.rows()]
    Console().print(
        table(f"File against simulation, {result.inputs} test images", ("", "bound", "file"), rows)
    )
