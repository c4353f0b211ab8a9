"""Every row of docs/interoperability.md names existing test files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "interoperability.md"


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[1:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_has_a_status_and_names_its_tests(row: list[str]) -> None:
    assert len(row) == 3
    _, stands, where = row
    assert re.match(r"works|refused|PyTorch's error|an error", stands)
    files = re.findall(r"`([^`]+)`", where)
    assert files or where == "the same"
    for file in files:
        assert Path(file).name.startswith("test_"), f"pytest does not collect {file}"
        assert (ROOT / file).is_file(), file


def test_the_first_row_cannot_refer_to_another() -> None:
    assert len(rows()) > 20
    assert not rows()[0][-1].startswith("the same")
