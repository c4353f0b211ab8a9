"""``gradl1 demo``: twin networks on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradl1_fast._report.page import prepare
from gradl1_fast.cli._console import fail, table
from gradl1_fast.cli._stages import stages
from gradl1_fast.cli.app import app
from gradl1_fast.training.demo import demo as demos
from gradl1_fast.training.reports import demo as report

__all__ = ["demo"]

# On two cores of an AMD EPYC.
_SECONDS_FOR_A_PAIR, _SECONDS_FOR_TIMING = 17, 20


@app.command(epilog="Example: gradl1 demo --out digits-report --seeds 5")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path("gradl1-demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of networks to train.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny settings, to check that it runs (a few seconds).")
    ] = False,
) -> None:
    """Train twin networks on handwritten digits, with and without the penalty, and quantize both.

    Takes at most two minutes on an idle CPU, computes with one thread, and
    needs no download.

    Prints the test accuracy at equal bits for weights and activations, from
    8 down to 2, and the time of a training step: plain, with ordinary double
    backprop, and with this library. Writes a report with charts,
    gradl1-demo/report.html.
    """  # fmt: skip
    settings = _quick(seeds) if quick else demos.Settings(seeds=seeds)
    console = Console()
    try:
        prepare(out)
        what = f"{seeds} pairs of networks" if seeds > 1 else "one pair of networks"
        time = "a few seconds" if quick else _duration(seeds)
        _print_note(f"Training {what} and timing steps: {time} on an idle CPU.")
        with stages() as stage:
            results = demos.run(settings, stage)
        page, numbers = report.write(results, out)
    except OSError as error:
        fail(f"cannot write to {out}: {error.strerror or error}. Choose another folder with --out.")
    except ImportError as error:
        fail(str(error))
    _print_results(console, results)
    console.print(
        f"\nReport: [bold]{page}[/bold]  (open it in a browser)\nNumbers: {numbers}", soft_wrap=True
    )


def _duration(seeds: int) -> str:
    """Return about how long the demo takes with its default settings."""
    minutes = (_SECONDS_FOR_TIMING + seeds * _SECONDS_FOR_A_PAIR) / 60
    return "about one minute" if minutes < 1.5 else f"about {minutes:.0f} minutes"


def _print_note(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, markup=False)


def _quick(seeds: int) -> demos.Settings:
    recipe = demos.Recipe(epochs=2, penalty_epochs=1)
    return demos.Settings(seeds=seeds, bits=(None, 8, 4, 3), width=4, recipe=recipe, rounds=2, speed_width=8)


def _print_results(console: Console, results: demos.Results) -> None:
    title = f"Test accuracy in %, equal bits for weights and activations; {report.averaged(results)}"
    header = ("bits", "plain", "penalised", "gain", "ahead in")
    console.print("", table(title, header, report.accuracy_rows(results)), "", sep="\n")
    for speed in results.speeds:
        title = f"Time of a training step: {speed.network}"
        console.print(table(title, ("step", "median", "to plain"), report.speed_rows(speed)), "", sep="\n")
    for line in report.verdict(results):
        console.print(f"- {line}", highlight=False, markup=False)
