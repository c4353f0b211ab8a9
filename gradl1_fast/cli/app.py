"""The main command and its options."""

from __future__ import annotations

from typing import Annotated

import typer

from gradl1_fast._version import __version__

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
