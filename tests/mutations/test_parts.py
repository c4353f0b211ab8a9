"""The parts of `make mutate` cover every operator and the whole reference, each file once."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gradl1_fast"


def test_every_file_is_in_one_part() -> None:
    parts = [path.read_text() for path in Path(__file__).parent.glob("*.toml")]
    listed = [file for part in parts for file in re.findall(r'"(gradl1_fast/[\w/]+\.py)"', part)]
    folders = (PACKAGE / "ops", PACKAGE / "backends" / "reference")
    files = [path for folder in folders for path in folder.glob("*.py") if path.name != "__init__.py"]
    expected = [path.relative_to(ROOT).as_posix() for path in (*files, PACKAGE / "_masks.py")]
    assert sorted(listed) == sorted(expected)


def test_every_part_leaves_out_the_same_changes_and_runs_in_the_makefile() -> None:
    parts = {path.stem: path.read_text() for path in Path(__file__).parent.glob("*.toml")}
    assert len({text.partition("[cosmic-ray.filters")[2] for text in parts.values()}) == 1
    named = re.search(r"^PARTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named is not None
    assert sorted(named[1].split()) == sorted(parts)


def test_every_file_of_tests_is_there() -> None:
    listed = (Path(__file__).parent / "tests.txt").read_text().split()
    assert [name for name in listed if not (ROOT / name).is_file()] == []
