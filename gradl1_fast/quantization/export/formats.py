"""The table of formats. A format registers itself, and the command and the tests find it here."""

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
        """The simulation that it must agree with."""

    @property
    def remarks(self) -> list[str]:
        """Sentences on what could not be written as asked for."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, whole or not at all."""


@dataclass(frozen=True)
class Details:
    """A table on a file.

    Attributes:
        title: of the table.
        header: names of its columns.
        rows: its lines.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def _no_details(file: Any, inputs: Any) -> list[Details]:
    return []


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        name: as the command knows it.
        ending: of its files.
        summary: what is in them, in a line of the command's help.
        write: takes a converted model, inputs, ``w`` and ``a``; returns the file.
        compare: takes the file, inputs and their ``labels``, or None; returns how far it is from the
            simulation.
        details: takes the file and inputs; returns what else there is to say about it.
        has_widths: whether a file is for chosen widths; otherwise ``w`` and ``a`` are None.
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
    """Add a format to the table."""
    FORMATS[format.name] = format
