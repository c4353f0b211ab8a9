"""Blocks of code in Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Block", "blocks", "pages", "run"]

ROOT = Path(__file__).parent.parent.parent
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: its file.
        line: of the page, where the code begins, counted from 1.
        language: after the three marks.
        code: without the indentation of the block.
    """

    page: Path
    line: int
    language: str
    code: str


def pages() -> list[Path]:
    """Return README.md and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["language"], code))
    return [block for block in found if block.language == language]


def run(block: Block, names: dict[str, Any]) -> None:
    """Execute a block; a traceback shows its line of the page."""
    source = "\n" * (block.line - 1) + block.code
    exec(compile(source, str(block.page), "exec"), names)
