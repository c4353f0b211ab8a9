"""Output helpers of all subcommands: tables and errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["fail", "pairs", "table"]


def pairs(title: str, values: dict[str, str]) -> Table:
    """Return a table of names and values."""
    return table(title, ("name", "value"), values.items(), numbers=False)


def table(
    title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, numbers: bool = True
) -> Table:
    """Return a table of plain text cells. Columns after the first are right-aligned for numbers."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        result.add_column(name, justify="right" if numbers and index else "left")
    for row in rows:
        result.add_row(*map(escape, row))
    return result


def fail(message: str, status: int = 1) -> NoReturn:
    """Print an error message on standard error and exit with a status."""
    text = f"[red]gradl1:[/red] {escape(message)}"  # a message may hold brackets, as in '.[cli]'
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(status)
