"""How to get a package that only a part of the library needs; the wording of every such message."""

from __future__ import annotations

__all__ = ["install"]


def install(extra: str) -> str:
    """Return the command that installs an extra of ``pyproject.toml``, and where to run it."""
    return f"pip install '.[{extra}]' in a checkout of gradl1_fast"
