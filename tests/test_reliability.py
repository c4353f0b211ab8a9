"""docs/reliability.md names a guard, a test and a failing change for every fault, and all of them exist."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
FAULTS = range(1, 24)
ON_A_GPU = re.compile(r"not yet run on a GPU|run on .+ on \d{4}-\d\d-\d\d")


class Line(NamedTuple):
    """A line of a table; ``number`` is that of the heading above it."""

    number: int
    fault: str
    outcome: str
    guard: str
    test: str
    red: str

    @property
    def tests(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.test)

    @property
    def guards(self) -> list[str]:
        return [name for name in re.findall(r"`([^`]+)`", self.guard) if "/" in name or name.endswith(".py")]

    @property
    def places(self) -> list[tuple[str, str]]:
        """Return the names in the code that answer for it, each with its file or folder."""
        return re.findall(r"`([^`]+)` in `([^`]+)`", self.guard)


def read() -> list[Line]:
    found, number = [], 0
    for text in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (\d+)\. \S", text):
            number = int(heading[1])
        elif text.startswith("| ") and not text.startswith("| fault |"):
            found.append(Line(number, *(cell.strip() for cell in text.strip("| ").split(" | "))))
    return found


LINES = read()
EACH = pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.number} {line.fault}")


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Return the functions that a test file defines, or takes whole from another one."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            found |= names_in(ROOT / (str(node.module).replace(".", "/") + ".py"))
    return frozenset(found)


def occurs(name: str, place: Path) -> bool:
    """Return whether a name is a word in a source file, or in one of a folder's."""
    files = place.rglob("*.py") if place.is_dir() else [place]
    return any(re.search(rf"\b{re.escape(name)}\b", file.read_text(encoding="utf-8")) for file in files)


def test_every_section_has_complete_rows() -> None:
    numbers = [line.number for line in LINES]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(FAULTS)


@EACH
def test_every_named_test_exists(line: Line) -> None:
    assert line.tests
    for test in line.tests:
        file, separator, name = test.partition("::")
        assert separator
        assert Path(file).name.startswith("test_"), f"pytest does not collect {file}"
        assert name in names_in(ROOT / file), test


@EACH
def test_every_named_guard_exists(line: Line) -> None:
    assert line.guards or "`" not in line.guard
    for guard in line.guards:
        assert (ROOT / guard).exists(), guard
    for name, place in line.places:
        assert occurs(name, ROOT / place), f"{name} in {place}"


@EACH
def test_every_row_gives_a_failing_change_or_needs_a_gpu(line: Line) -> None:
    assert line.red
    on_a_gpu = [test.startswith("tests/gpu/") for test in line.tests]
    assert len(set(on_a_gpu)) == 1, "tests that need a GPU have lines of their own"
    assert bool(ON_A_GPU.search(line.red)) == on_a_gpu[0]


def test_a_missing_test_name_is_detected() -> None:
    assert "test_layouts" in names_in(ROOT / "tests" / "gpu" / "test_triton_elementwise.py")
    assert "test_no_such_thing" not in names_in(Path(__file__))


def test_a_missing_guard_is_detected() -> None:
    checkpoints = ROOT / "gradl1_fast" / "training" / "runs" / "checkpoints.py"
    assert occurs("_check", checkpoints)
    assert not occurs("_chec", checkpoints)
    assert occurs("save_for_backward", ROOT / "gradl1_fast" / "ops")
    assert not occurs("no_such_name", ROOT / "gradl1_fast" / "ops")
