"""The registry of export formats, used by the command and the tests. Each format registers itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gradl1_fast.quantization.export.agreement import Agreement
from gradl1_fast.quantization.export.prepared import Prepared

__all__ = ["FORMATS", "Details", "File", "Format", "register"]


class File(Protocol):
    """An exported network."""

    @property
    def data(self) -> bytes:
        """The content of the file."""

    @property
    def prepared(self) -> Prepared:
        """The simulation that the file must agree with."""

    @property
    def remarks(self) -> list[str]:
        """One sentence for each deviation from the request."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file atomically."""


@dataclass(frozen=True)
class Details:
    """A table with details of a file.

    Attributes:
        title: the title of the table.
        header: the names of the columns.
        rows: the rows.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def _no_details(file: Any, inputs: Any) -> list[Details]:
    return []


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        name: the name in the command.
        ending: the file name extension.
        summary: a line for the help of the command.
        write: takes a converted model, inputs, ``w`` and ``a``; returns the file.
        compare: takes the file, inputs and their ``labels`` or None; returns the difference from the
            simulation.
        details: takes the file and inputs; returns tables with details.
        has_widths: whether a file is for given widths; otherwise ``w`` and ``a`` are None.
    """

    name: str
    ending: str
    summary: str
    write: Callable[..., Any]
    compare: Callable[..., Agreement]
    details: Callable[[Any, Any], list[Details]] = _no_details
    has_widths: bool = True


FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Register a format."""
    FORMATS[format.name] = format
