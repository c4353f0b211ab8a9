"""``gradl1 sweep``: evaluates a finished run at every width."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradl1_fast._progress import lines
from gradl1_fast._report.figures import width_name
from gradl1_fast._report.page import check_packages, write
from gradl1_fast.cli._console import fail, table
from gradl1_fast.cli.app import app
from gradl1_fast.cli.widths import bits_of
from gradl1_fast.quantization.ranges.choice import NAMES
from gradl1_fast.training.reports import sweep as sweep_report
from gradl1_fast.training.runs import folder as runs
from gradl1_fast.training.runs import sweep as sweeps

__all__ = ["sweep"]

_EPILOG = """[bold]Examples[/bold]

gradl1 sweep runs/digits

gradl1 sweep runs/digits --bits float,8,4,3 --no-prepare

gradl1 sweep runs/fashion --images 10000 --size 60000
"""
_RANGES = ", ".join(NAMES)


@app.command(epilog=_EPILOG)
def sweep(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished gradl1 train run.")],
    bits: Annotated[
        str, typer.Option(help="Widths of weights and of activations; every pair is evaluated.")
    ] = "float,8,6,5,4,3,2",
    alone: Annotated[int, typer.Option(help="Width at which each tensor is quantized by itself.")] = 4,
    images: Annotated[
        int, typer.Option(min=0, help="Number of test images, spread evenly over the set; 0 for all.")
    ] = 2000,
    ranges: Annotated[
        str | None,
        typer.Option(help=f"Recompute activation ranges on 1000 training images: {_RANGES}."),
    ] = None,
    weight_ranges: Annotated[
        str | None, typer.Option(help="Weight ranges, such as mse. Default: the range of each weight.")
    ] = None,
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare/--no-prepare",
            help="Do what costs no training: a range for each channel of a weight, ranges of least squared "
            "error, GPTQ rounding of narrow weights, batch-norm statistics at each pair of widths.",
        ),
    ] = True,
    fold: Annotated[bool, typer.Option("--fold", help="First fold batch norms into convolutions.")] = False,
    size: Annotated[
        float | None,
        typer.Option(help="Search a width for each layer within this size of all weights, in bytes."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Report to write. Default: RUN/sweep.html.")] = None,
) -> None:
    """Evaluate a finished run at every width, and write a report.

    Prints the test accuracy for every pair of widths, after preparation without
    training (gradl1_fast.prepare). The report also shows the loss of each tensor
    when only it is quantized, the ranges, and the product of step and gradient
    norm of each tensor.

    The network's input keeps 8 bits if activations have fewer.

    Quantization is simulated in floating point. It shows what a width costs in
    accuracy; it is slower than float, not faster.
    """  # fmt: skip
    console = Console()
    try:
        check_packages()
        settings = sweeps.Settings(
            bits=_bits(bits),
            alone=alone,
            images=images or None,
            ranges=ranges,
            weight_ranges=weight_ranges,
            fold=fold,
            prepare=prepare,
            size=size,
        )
        run = runs.load(folder)
        with lines():
            results = sweeps.run(run.model, run.data, settings)
        path = out or folder / "sweep.html"
        title = f"{run.config.model.name} on {run.config.data.name}, at every width"
        write(path, sweep_report.report(title, results))
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}")
    except (ValueError, TypeError, ImportError) as error:
        fail(str(error))
    _print_results(console, results)
    console.print(f"Report: [bold]{path}[/bold]  (open it in a browser)", soft_wrap=True)


def _bits(text: str) -> tuple[int | None, ...]:
    """Return the requested widths in order."""
    widths = [bits_of(part, "--bits") for part in text.split(",")]
    return tuple(dict.fromkeys(widths))


def _print_results(console: Console, results: sweeps.Results) -> None:
    widths = results.settings.bits
    header = ("weight bits", *(f"a {width_name(a)}" for a in widths))
    rows = [(width_name(w), *(f"{results.table[w, a]:.2f}" for a in widths)) for w in widths]
    prepared = " after the free steps" if results.settings.prepare else ""
    heading = f"Test accuracy in %{prepared}; widths of activations across:"
    console.print(heading, table("", header, rows), "", sep="\n")
    for line in sweep_report.found(results):
        console.print(f"- {line}", highlight=False, markup=False)
    if results.plan is not None:
        rows = [(name, str(width)) for name, width in results.plan.best.w.items()]
        console.print("", "A width for each layer:", table("", ("layer", "bits"), rows), sep="\n")
