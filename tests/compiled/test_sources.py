"""How the C++ and CUDA sources are written: short lists of parameters, one word for one thing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
MOST_PARAMETERS = 9  # what has more takes a struct, whose fields have names


def parameters(text: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of parameters of each function that is defined."""
    text = re.sub(r"//.*", "", text)
    for match in re.finditer(r"(\w+|\])\s*\(", text):
        end = _end(text, match.end() - 1)
        if re.match(r"\)\s*(const\s*)?(->\s*[\w:]+\s*)?(:[^;{]*)?\{", text[end:]):
            yield match[1], _commas(text[match.end() : end]) + 1


def _end(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _commas(text: str) -> int:
    """Return the number of commas outside of brackets of any kind."""
    while (shorter := re.sub(r"\([^()]*\)|<[^<>]*>|\{[^{}]*\}|\[[^\[\]]*\]", "", text)) != text:
        text = shorter
    return text.count(",")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_no_function_has_a_long_list_of_parameters(path: Path) -> None:
    assert not [(name, n) for name, n in parameters(path.read_text()) if n > MOST_PARAMETERS]


def test_the_parameters_are_counted() -> None:
    head = "template <class A, class B>\nvoid f(int a, std::array<int, 2> (&b)[3], A c = {1, 2}) const"
    text = head + " {\n g(1, 2); }"
    assert list(parameters(text)) == [("f", 3)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_a_pass_is_no_sweep(path: Path) -> None:
    """A sweep is an evaluation over bit widths; forward, backward and double backward are passes."""
    assert "sweep" not in path.name
    assert "sweep" not in path.read_text().lower()
