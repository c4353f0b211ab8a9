"""The ``gradl1`` command. Needs typer and rich: ``pip install 'gradl1-fast[cli]'``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gradl1_fast import backends
from gradl1_fast._version import __version__
from gradl1_fast.training import demo as demos
from gradl1_fast.training import environment, report

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train one network with the gradient-l1 penalty; quantize it on demand to any bit width.",
    epilog="Start with: gradl1 demo (one to two minutes), then open gradl1-demo/report.html",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gradl1-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None: ...


@app.command(epilog="Example: GRADL1_BACKEND=reference gradl1 info")
def info() -> None:
    """Print versions, devices, and which backend computes each operation, and why.

    Takes a few seconds. Look here first when something is slower than expected.
    """
    console = Console()
    console.print(_pairs("Versions", environment.versions()))
    console.print(_pairs("Devices", environment.devices()))
    for device in environment.devices():
        try:
            _print_backends(console, device)
        except (ValueError, backends.UnavailableError) as error:
            _fail(str(error))
    variables = environment.variables()
    if variables:
        console.print(_pairs("Environment variables in force", variables))
    else:
        console.print("No environment variable in force; GRADL1_BACKEND would choose a backend by name.")


@app.command(epilog="Example: gradl1 demo --out digits-report --seeds 5")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path("gradl1-demo"),
    seeds: Annotated[
        int, typer.Option(min=1, help="Pairs of networks to train; more tell more, and take longer.")
    ] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny settings, a few seconds: shows that it runs, no more.")
    ] = False,
) -> None:
    """Train twin networks on handwritten digits, with and without the penalty, and quantize both.

    Takes one to two minutes on two CPU cores and needs no download.

    Prints the test accuracy at equal bits for weights and activations, from
    8 down to 2, and the time of a training step: plain, with ordinary double
    backprop, and with this library. Writes a report with charts,
    gradl1-demo/report.html.
    """  # fmt: skip
    settings = _quick(seeds) if quick else demos.Settings(seeds=seeds)
    console = Console()
    try:
        report.prepare(out)
        results = _run_with_bars(settings)
        page, numbers = report.write(results, out)
    except OSError as error:
        _fail(f"cannot write to {out}: {error.strerror or error}. Choose another folder with --out.")
    except ImportError as error:
        _fail(str(error))
    _print_results(console, results)
    console.print(
        f"\nReport: [bold]{page}[/bold]  (open it in a browser)\nNumbers: {numbers}", soft_wrap=True
    )


def _quick(seeds: int) -> demos.Settings:
    recipe = demos.Recipe(epochs=2, penalty_epochs=1)
    return demos.Settings(seeds=seeds, bits=(None, 8, 4, 3), width=4, recipe=recipe, rounds=2, speed_width=4)


def _run_with_bars(settings: demos.Settings) -> demos.Results:
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def stage(what: str, total: int) -> Callable[[], None]:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        return demos.run(settings, stage)


def _print_results(console: Console, results: demos.Results) -> None:
    title = f"Test accuracy in %, equal bits for weights and activations; {report.averaged(results)}"
    header = ("bits", "plain", "penalised", "gain", "ahead in")
    console.print("", _table(title, header, report.accuracy_rows(results)), "", sep="\n")
    for speed in results.speeds:
        title = f"Time of a training step: {speed.network}"
        console.print(_table(title, ("step", "median", "to plain"), report.speed_rows(speed)), "", sep="\n")
    for line in report.verdict(results):
        console.print(f"- {line}", highlight=False, markup=False)


def _print_backends(console: Console, device: str) -> None:
    rows, reasons = [], []
    for op in backends.OPERATIONS:
        chosen, others = _choice(op, device)
        rows.append((op, chosen))
        reasons += [f"{name}: {reason}" for name, reason in others.items()]
    console.print(_table(f"Backends on {device}", ("operation", "computed by"), rows, numbers=False))
    for reason in dict.fromkeys(reasons):
        console.print(f"  not {reason}", highlight=False, markup=False)


def _choice(op: str, device: str) -> tuple[str, dict[str, str]]:
    """Return the name of the backend for an operation, and for each other the reason why not."""
    tensor = torch.empty(0, device=device)
    chosen = backends.resolve(op, tensor)
    name, others = chosen.__name__, {}
    for candidate in backends.available():
        try:
            with backends.backend(candidate):
                found = backends.resolve(op, tensor)
        except backends.UnavailableError as reason:
            others[candidate] = str(reason)
            continue
        if found is chosen:
            name = candidate
        else:
            others[candidate] = "can, but does not come first; ask for it with GRADL1_BACKEND=" + candidate
    return name, others


def _pairs(title: str, values: dict[str, str]) -> Table:
    return _table(title, ("name", "value"), values.items(), numbers=False)


def _table(
    title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, numbers: bool = True
) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if numbers and place else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _fail(message: str) -> NoReturn:
    text = f"[red]gradl1:[/red] {escape(message)}"  # a message may hold brackets, as in gradl1-fast[cli]
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
