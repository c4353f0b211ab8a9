"""``gradl1 experiment``: comparison of methods over seeds and widths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradl1_fast._report.page import prepare, write
from gradl1_fast.cli._console import fail, table
from gradl1_fast.cli._stages import stages
from gradl1_fast.cli.app import app
from gradl1_fast.cli.widths import bits_of
from gradl1_fast.training import experiment as experiments
from gradl1_fast.training.experiment.experiment import DEFAULT_REGIMES, WIDTHS
from gradl1_fast.training.experiment.methods import at, text_of
from gradl1_fast.training.loop.trainer import TrainingError
from gradl1_fast.training.models import INITIALISERS
from gradl1_fast.training.reports import experiment_tables as tables
from gradl1_fast.training.reports.experiment import report

__all__ = ["experiment"]


_METHODS = "\n".join(f"- {name}: {text_of(name)}\n" for name in experiments.VARIANTS)
_REGIMES = "\n".join(f"- {name}: {regime.text}\n" for name, regime in experiments.REGIMES.items())
_HELP = f"""Train a network by each method, quantize each to many widths, and compare.

On Fashion-MNIST, one network takes five to fifteen minutes on one CPU core.
The same seed and settings give the same rows on the same computer. Finished
runs are stored in the folder --out; after an interruption, the same command
continues.

Methods:

{_METHODS}
Regimes, the data available when a network is quantized:

{_REGIMES}"""
_EXAMPLE = "Example: gradl1 experiment fashion-mnist --methods plain,gradl1 --seeds 1 --json rows.json"


@app.command(help=_HELP, epilog=_EXAMPLE)
def experiment(
    name: Annotated[str, typer.Argument(help=f"What to train on: {' or '.join(experiments.EXPERIMENTS)}.")],
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated methods from the list above, or all; gradl1+kure combines two."),
    ] = "plain,gradl1",
    seeds: Annotated[int, typer.Option(min=1, help="Networks of each method; the seeds are 0, 1, ...")] = 3,
    json: Annotated[
        Path | None,
        typer.Option(
            help="File for the accuracies: rows of method, seed, regime, w, a, top1. Default: in the folder."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for report.html and one file per run; runs already there are kept.")
    ] = Path("gradl1-experiment"),
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set, if it is not in its usual place.")
    ] = None,
    regimes: Annotated[
        str, typer.Option(help="Semicolon-separated regimes from the list above, or all.")
    ] = "; ".join(DEFAULT_REGIMES),
    widths: Annotated[
        str | None,
        typer.Option(
            help="Semicolon-separated pairs of bits of weights and activations, such as "
            '"float; 8,8; 4,4; 2,float". Default: eleven pairs, down to 2 bits.'
        ),
    ] = None,
    initialisers: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated distributions of the initial weights, or all. Each method runs with "
            f"each of them. Available: {', '.join(INITIALISERS)}. Default: that of the network."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny settings, to check that it runs (seconds per method).")
    ] = False,
) -> None:
    """Train a network by each method, quantize all of them to many widths, and compare."""
    chosen = list(experiments.VARIANTS) if methods == "all" else _split(methods)
    if initialisers is not None:
        starts = list(INITIALISERS) if initialisers == "all" else _split(initialisers)
        chosen = [at(method, start) for start in starts for method in chosen]
    rows = json or out / "results.json"
    try:
        among = list(experiments.REGIMES) if regimes == "all" else _split(regimes, ";")
        at_widths = WIDTHS if widths is None else [_pair(part) for part in _split(widths, ";")]
        full = experiments.named(name, None if data is None else str(data), among, at_widths)
        prepare(out)
        prepare(rows.parent)
        with stages() as stage:
            results = experiments.run(
                full.quick() if quick else full,
                chosen,
                range(seeds),
                out,
                stage,
                lambda so_far: so_far.write_rows(rows),
            )
        results.write_rows(rows)
        write(out / "report.html", report(results))
    except OSError as error:
        fail(
            f"{error.filename or out}: {error.strerror or error}. Choose other places with --out and --json."
        )
    except (ImportError, ValueError, TrainingError) as error:
        fail(str(error))
    console = Console()
    console.print(
        "", table("Test accuracy in %: (weight bits, activation bits)", *tables.accuracy_table(results))
    )
    own = tables.own_table(results)
    if own[1]:
        console.print(table("With the method's own quantizer, in %", *own))
    for line in tables.verdict(results):
        console.print(f"- {line}", highlight=False, markup=False)
    console.print(f"\nReport: [bold]{out / 'report.html'}[/bold]\nRows: {rows}", soft_wrap=True)


def _split(text: str, mark: str = ",") -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(mark) if part.strip()))


def _pair(text: str) -> tuple[int | None, int | None]:
    """Return a pair of widths, ``float`` for both in float."""
    words = ["float", "float"] if text == "float" else text.split(",")
    if len(words) != 2:
        raise ValueError(
            f"--widths: give pairs of weight and activation bits, such as 4,4 or 2,float, got {text!r}"
        )
    w, a = (bits_of(word, "--widths") for word in words)
    return w, a
