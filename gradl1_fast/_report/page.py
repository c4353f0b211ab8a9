"""A report as data, and as one HTML page that needs nothing beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradl1_fast import _files
from gradl1_fast._extras import install
from gradl1_fast._report import palette
from gradl1_fast._report.figures import coloured, inline, new_figure

__all__ = [
    *("JOINED", "Chart", "Key", "Report", "Section", "Table", "Tile"),
    *("check_packages", "prepare", "render", "write"),
]

# The spaces between a number and its unit or deviation, where no line breaks.
JOINED = r"(?<=\d) (?=%|m?s\b)|(?<=\d ±) (?=\d)"


@dataclass(frozen=True)
class Tile:
    """One number at the top of a report.

    Attributes:
        name: what the number is.
        value: as text.
        note: one line below it.
        single: it comes from a single seed and is shown in grey.
    """

    name: str
    value: str
    note: str = ""
    single: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: names of the columns.
        rows: cells as text.
        single: indices of the rows that come from a single seed, shown in grey.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    single: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    style: palette.Style


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        figure: of matplotlib, drawn with the colours of :mod:`gradl1_fast._report.figures`.
        title: above it; it also names the figure to readers who cannot see it.
        caption: below it.
        keys: its legend.
        scrolls: on a phone it keeps a width at which its small numbers are legible, and scrolls.
    """

    figure: Any
    title: str
    caption: str = ""
    keys: Sequence[Key] = ()
    scrolls: bool = False

    @property
    def wide(self) -> bool:
        """Whether two fit side by side rather than three."""
        return self.figure.get_figwidth() > 4.1


@dataclass(frozen=True)
class Section:
    """A part of a report that is folded until a reader opens it.

    Attributes:
        title: always visible.
        text: paragraphs.
        items: sentences, shown as a list.
        charts: shown side by side where they fit.
        tables: below the charts.
        keys: a legend of all charts.
    """

    title: str
    text: Sequence[str] = ()
    items: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    keys: Sequence[Key] = ()


@dataclass(frozen=True)
class Report:
    """A report: tiles, the main charts, then everything else, folded.

    Attributes:
        title: the heading.
        lead: one or two sentences below it.
        tiles: the main numbers.
        charts: accuracy over bit widths, then the heat map of differences.
        sections: details.
        footer: which command wrote it, and where all numbers are.
    """

    title: str
    lead: str
    tiles: Sequence[Tile]
    charts: Sequence[Chart]
    sections: Sequence[Section]
    footer: str


def check_packages() -> None:
    """Raise what :func:`render` would raise where a package is missing.

    Raises:
        ImportError: matplotlib or Jinja2 is not installed; the message says what to install.
    """
    new_figure(1, 1)
    _environment()


def prepare(folder: Path) -> None:
    """Check that a report can be rendered, and that a file can be written to a folder, which is created.

    Raises:
        ImportError: as for :func:`check_packages`.
        OSError: the folder cannot be created or written to.
    """
    check_packages()
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".write-test"
    probe.touch()
    probe.unlink()


def write(path: Path, report: Report) -> None:
    """Write a report as an HTML page.

    Raises:
        ImportError: as for :func:`check_packages`.
        OSError: the file cannot be written.
    """
    _files.write_text(path, render(report))


def render(report: Report) -> str:
    """Return a report as an HTML page. All its text is escaped.

    Raises:
        ImportError: as for :func:`check_packages`.
    """
    page = _environment().get_template("page.html").render(report=report)
    return re.sub(JOINED, "\N{NO-BREAK SPACE}", page)


def _environment() -> Any:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(f"reports need Jinja2: {install('cli')}") from error

    def svg(chart: Chart, name: str) -> Markup:
        return Markup(inline(chart.figure, name))  # matplotlib escapes the text of its figures

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": svg, "coloured": coloured}
    return environment
