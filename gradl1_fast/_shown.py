"""How results show themselves: as text in a console, and as tables in a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Grid", "Shown", "html"]


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        header: names of the columns.
        rows: the cells of each row, one for each column.
        title: shown above the table; a table without rows then says so.
        right: indices of the columns that are aligned right, as numbers are.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    right: Sequence[int] = ()

    def text(self) -> str:
        """Return the table with columns padded to one width each."""
        if self.title and not self.rows:
            return f"{self.title}: none"
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if self.title:
            lines = [self.header, ["-" * width for width in widths], *self.rows]
        return "\n".join(([self.title] if self.title else []) + [self._line(line, widths) for line in lines])

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = [
            cell.rjust(width) if i in self.right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    def html(self) -> str:
        """Return the table as HTML; cells are escaped."""
        if self.title and not self.rows:
            return html([self.text()])
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        head = self._cells("th", self.header)
        body = "".join(self._cells("td", row) for row in self.rows)
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"

    def _cells(self, tag: str, cells: Sequence[str]) -> str:
        # Notebooks align everything right unless a cell says otherwise.
        sides = ("right" if i in self.right else "left" for i in range(len(cells)))
        pairs = zip(cells, sides, strict=True)
        row = (f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for cell, side in pairs)
        return f"<tr>{''.join(row)}</tr>"


def html(parts: Iterable[Grid | str]) -> str:
    """Return tables and paragraphs of text as HTML without colours: those of a light or dark page apply."""
    return "".join(part.html() if isinstance(part, Grid) else f"<p>{escape(part)}</p>" for part in parts)


class Shown(ABC):
    """A result that is shown as text by ``print`` and in a console, and as tables in a notebook."""

    _between = "\n"

    @abstractmethod
    def _parts(self) -> Iterable[Grid | str]:
        """Return the tables and the lines of text, in order."""

    def __repr__(self) -> str:
        """Return the result as text."""
        parts = [part.text() if isinstance(part, Grid) else part for part in self._parts()]
        return self._between.join(parts)

    def _repr_html_(self) -> str:
        """Return the result as HTML, for notebooks."""
        return html(self._parts())
