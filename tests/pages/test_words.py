"""The prose of the project keeps to its glossary: words to avoid, and what to write instead."""

from __future__ import annotations

import io
import re
import token
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.blocks import ROOT, pages

# In docstrings, comments, messages, help texts and pages; case does not matter.
INSTEAD_OF = {
    # spelling
    r"penaliz\w*": "penalise",
    r"quantis\w*": "quantize",
    r"bit-?widths?\b": "bit width",
    # one word for one thing
    r"\b(first|second|third|two|three|each|every|all|raw|later|no) sweeps?\b": "pass; a sweep is over widths",
    r"\b(rooms?|houses?)\b": "package, module, layer",
    # plain words
    r"\banew\b": "again",
    r"\bby chance\b": "random",
    r"\bin silence\b|\bwithout a word\b": "silently",
    r"\bkin\b": "name them",
    r"\blikewise\b": "say it again, or 'the same for ...'",
    r"\bso many(-th)?\b": "N, or 'number of ...'",
    r"\btak(e|es|en|ing) up\b": "load, resume",
    r"\bwhoever\b": "the caller, or 'to ...'",
    # a noun that is denied: "is no module"
    r"\bno (finite )?number\b": "NaN or infinite, not a number",
    r"(?<!there )\bis no (?!longer\b|more\b|such\b)\w+": "is not a ...",
}
GENERATED = ("docs/compatibility.md", "docs/performance.md", "docs/results/")

_PROSE = {token.STRING, token.COMMENT, getattr(token, "FSTRING_MIDDLE", token.STRING)}


def files() -> list[str]:
    found = [*pages(), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "gradl1_fast").rglob("*.py"))]
    names = [path.relative_to(ROOT).as_posix() for path in found]
    return [name for name in names if not name.startswith(GENERATED)]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a page, or of the docstrings, comments and strings of a module."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text().splitlines(), 1)
        return
    for part in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if part.type in _PROSE:
            yield from enumerate(part.string.splitlines(), part.start[0])


def avoided(lines: Iterator[tuple[int, str]]) -> list[str]:
    """Return a sentence for each word to avoid."""
    return [
        f"line {number}: {match.group()!r}: write {instead}"
        for number, line in lines
        for pattern, instead in INSTEAD_OF.items()
        if (match := re.search(pattern, line, re.IGNORECASE))
    ]


@pytest.mark.parametrize("name", files())
def test_the_words_are_those_of_the_glossary(name: str) -> None:
    found = avoided(prose(ROOT / name))
    assert not found, "\n".join([name, *found])


def test_a_word_to_avoid_is_found_in_prose_alone(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""Whoever reads.\n\nIt is no module."""\n\nrooms = f"so many {1}"  # Anew.\n'
    )
    found = avoided(prose(tmp_path / "a.py"))
    assert [line.partition(": write")[0] for line in found] == [
        "line 1: 'Whoever'", "line 3: 'is no module'", "line 5: 'so many'", "line 5: 'Anew'"
    ]  # fmt: skip
    (tmp_path / "a.md").write_text("There is no such page.\nThe third sweep.\n")
    assert len(avoided(prose(tmp_path / "a.md"))) == 1
