"""An extension of griffe: docstrings of this project, which use Sphinx's roles, as Markdown."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import griffe

__all__ = ["Docstrings", "documented"]

PACKAGE = "gradl1_fast"
REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
_ROLE = re.compile(r":(?:func|class|meth|data|mod|attr|exc):`(?P<hidden>~)?(?P<name>[\w.]+)`")
_LITERAL = re.compile(r"::\n\n(?=    )")


class Docstrings(griffe.Extension):
    """Turns roles into links where the reference has the name, and `::` into a colon before code.

    griffe knows attributes as a section, and reads a section of class attributes as one with a title.
    """

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None and obj.path.split(".")[0] == PACKAGE:
            text = _ROLE.sub(lambda role: _link(role, obj), obj.docstring.value)
            text = text.replace("\nClass attributes:\n", "\nAttributes: Class attributes:\n")
            obj.docstring.value = _LITERAL.sub(":\n\n", text)


@functools.cache
def documented() -> dict[str, str]:
    """Return the addresses that the reference documents, by their last part."""
    lines = [line for page in sorted(REFERENCE.glob("*.md")) for line in page.read_text().splitlines()]
    names = [line.removeprefix("::: ").strip() for line in lines if line.startswith("::: ")]
    return {name.rpartition(".")[2]: name for name in names}


def _link(role: re.Match[str], obj: Any) -> str:
    name = role["name"]
    last = name.rpartition(".")[2]
    shown = last if role["hidden"] else name
    owner = obj if obj.is_class else obj.parent
    if owner is not None and owner.is_class and owner.name in documented() and name in owner.members:
        # What only the section on attributes tells of has no address of its own.
        target = f"{documented()[owner.name]}.{name}"
        return f"[`{shown}`][{target}]" if owner.members[name].has_docstring else f"`{shown}`"
    return f"[`{shown}`][{documented()[last]}]" if last in documented() else f"`{shown}`"
